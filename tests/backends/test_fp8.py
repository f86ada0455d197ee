"""The fp8 backend equals transformers' fine-grained fp8 where that holds, and the definition at ragged edges."""

from types import SimpleNamespace

import pytest
import torch
from backends.weights import DTYPES, KINDS, weights
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from quantune.backends.backend import adopt_weight, pack_weight
from quantune.backends.fp8 import Fp8Options
from quantune.backends.fp8.formats import Fp8Backend
from quantune.errors import QuantizationError

BACKEND = Fp8Backend()
OPTIONS = Fp8Options()
HF = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=[128, 128], scale_fmt="float"))


def by_definition(codes, scale_inv, block=(128, 128)):
    """w = code * scale_inv of its block."""
    rows, columns = codes.shape
    spread = scale_inv.repeat_interleave(block[0], dim=0)[:rows].repeat_interleave(block[1], dim=1)[:, :columns]
    return codes.float() * spread


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "subnormal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_equals_transformers(dtype, kind):
    weight = weights((256, 384), dtype, kind)
    reference = Fp8Quantize(HF).convert({"a.weight": weight})
    packed = pack_weight(BACKEND, weight, OPTIONS)
    views = packed.views()
    assert torch.equal(views["weight"].view(torch.uint8), reference["a.weight"].view(torch.uint8))
    assert torch.equal(views["weight_scale_inv"], reference["a.weight_scale_inv"])
    for out in DTYPES:
        expected = Fp8Dequantize(HF)._dequantize_one(views["weight"], views["weight_scale_inv"], out)
        assert torch.equal(BACKEND.dequantize(packed, out), expected)


@pytest.mark.parametrize("shape", [(576, 320), (192, 128), (129, 1), (1, 127), (100, 500)])
def test_blocks_at_the_edges_are_cut_off(shape):
    """576 rows have 5 rows of scales: the block is 128 with a short tail, where transformers infers 576 // 5."""
    weight = weights(shape, torch.float32, "normal")
    packed = pack_weight(BACKEND, weight, OPTIONS)
    views = packed.views()
    assert views["weight_scale_inv"].shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    assert torch.equal(
        BACKEND.dequantize(packed, torch.float32), by_definition(views["weight"], views["weight_scale_inv"])
    )
    padded = torch.zeros([-(-size // 128) * 128 for size in shape])
    padded[: shape[0], : shape[1]] = weight
    reference = Fp8Quantize(HF).convert({"a.weight": padded})
    assert torch.equal(views["weight_scale_inv"], reference["a.weight_scale_inv"])


def test_every_code_but_nan_dequantizes_to_its_value():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)[None]
    for factor in (1.0, 1.5e-3, 2.0**-126, 2.0**110):
        tensors = {"weight": codes, "weight_scale_inv": torch.full((1, 2), factor)}
        packed = adopt_weight(BACKEND, tensors, (1, 254), torch.float32, OPTIONS)
        expected = (codes.double() * torch.tensor(factor).double()).float()
        assert torch.equal(BACKEND.dequantize(packed, torch.float32), expected)


def test_other_block_sizes():
    options = Fp8Options(block_size=(64, 32))
    packed = pack_weight(BACKEND, weights((100, 100), torch.float32, "outliers"), options)
    views = packed.views()
    assert views["weight_scale_inv"].shape == (2, 4)
    expected = by_definition(views["weight"], views["weight_scale_inv"], (64, 32))
    assert torch.equal(BACKEND.dequantize(packed, torch.float32), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_weight_becomes_finite_values_near_it(kind):
    weight = weights((130, 140), torch.float32, kind)
    found = BACKEND.dequantize(pack_weight(BACKEND, weight, OPTIONS), torch.float32)
    assert torch.isfinite(found).all()
    assert (found - weight).abs().max() <= weight.abs().max() * 0.04


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_taken_over_bit_for_bit(scale_dtype):
    codes = torch.randn(576, 200).to(torch.float8_e4m3fn)
    scale_inv = torch.rand(5, 2).to(scale_dtype)
    tensors = {"weight": codes, "weight_scale_inv": scale_inv}
    packed = adopt_weight(BACKEND, tensors, (576, 200), torch.bfloat16, OPTIONS)
    assert torch.equal(BACKEND.dequantize(packed, torch.float32), by_definition(codes, scale_inv.float()))
    back = BACKEND.export(packed)
    assert torch.equal(back["weight"].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(back["weight_scale_inv"], scale_inv.float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale_inv": torch.ones(4, 2)}, r"expected \(5, 2\) scales .* found \(4, 2\)"),
        ({"weight": torch.full((576, 200), float("nan")).to(torch.float8_e4m3fn)}, "not numbers"),
        ({"scale": torch.ones(5, 2)}, "expected the tensors weight and weight_scale_inv"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(change, message):
    good = {"weight": torch.randn(576, 200).to(torch.float8_e4m3fn), "weight_scale_inv": torch.rand(5, 2)}
    with pytest.raises(QuantizationError, match="kv_proj: .*" + message):
        adopt_weight(BACKEND, {**good, **change}, (576, 200), torch.float32, OPTIONS, name="kv_proj")


@pytest.mark.parametrize("block_size", [(128,), (0, 128), (-1, 1), (1, 2, 3)])
def test_a_block_size_that_is_none_says_so(block_size):
    ((key, message),) = Fp8Options(block_size=block_size).problems()
    assert key == "block_size" and "two numbers greater than 0" in message
