"""The sum of base and adapter: with all bits, and looked at once."""

import torch
from support import FORMATS, quantization
from torch.utils._python_dispatch import TorchDispatchMode

from quantune.backends import registry
from quantune.model.device import tf32
from quantune.quantized.merged import lora_delta, pack_merged


class Watched(TorchDispatchMode):
    """Notes which operators run, and in which precision fp32 matrices are multiplied then."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ran.append((function._schema.name, torch.get_float32_matmul_precision()))
        return function(*args, **(kwargs or {}))


def test_factors_are_multiplied_in_full_precision_in_a_run_with_tf32():
    before = torch.get_float32_matmul_precision()
    with tf32(True), Watched() as watched:
        torch.ones(2, 2) @ torch.ones(2, 2)
        lora_delta(torch.randn(4, 8), torch.randn(6, 4), 2.0)
        after = torch.get_float32_matmul_precision()
    assert [one for one in watched.ran if one[0] == "aten::mm"] == [("aten::mm", "high"), ("aten::mm", "highest")]
    assert (after, torch.get_float32_matmul_precision()) == ("high", before)


def test_packing_a_sum_waits_for_the_device_once():
    made = quantization(**FORMATS["bnb nf4"])
    backend = registry.load_backend(registry.describe("bnb"))
    layout = backend.layout((64, 64), torch.float32, made.options)
    with Watched() as watched:
        pack_merged(backend, torch.randn(64, 64), layout)
    assert [name for name, _ in watched.ran].count("aten::_local_scalar_dense") == 1
