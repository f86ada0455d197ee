"""A base in fp32, an adapter trained in bf16: the merge and what it is compared with begin with the same values."""

import json
import shutil

import attrs
import pytest
import torch
from merge.conftest import CPU, TOKENS, Quiet, train
from merge.test_exact import EXPERTS
from safetensors.torch import load_file, save_file
from support import quantization

from quantune.merge.merge import write
from quantune.merge.opening import open_merge
from quantune.merge.trial import load_merged, load_reference
from quantune.recipe.schema import QatConfig

KINDS = {
    "layers that are not packed": ("llama", {"skip": ("q_proj", "down_proj")}, {}, {}),
    "embedding and head": ("tied", {}, {"targets": ("all-linear", "embed_tokens")}, {}),
    "a share of the weights": ("llama", None, {"init": "pissa", "use_dora": True}, {}),
    "experts that are not packed": ("mixtral", {"skip": ("experts",)}, {"target_parameters": EXPERTS}, {}),
    "weights that were rounded": ("llama", {}, {}, {"qat": QatConfig()}),
    "weights that were rounded with dora": ("llama", {}, {"use_dora": True}, {"qat": QatConfig()}),
}
"""Base, keys of `[quantization]`, of `[adapter]`, and of the setting."""


def in_fp32(base, folder):
    """A copy of a base whose weights bf16 can't hold."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    tensors = load_file(folder / "model.safetensors")
    moved = {name: tensor.float() + 1e-3 * torch.randn(tensor.shape) for name, tensor in tensors.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_merge_begins_with_the_values_that_were_trained_on(kind, bases, tmp_path):
    base, packing, options, setting = KINDS[kind]
    plan = None if packing is None else quantization(weight_dtype="nf4", **packing)
    trained = train(in_fp32(bases[base], tmp_path / "base"), tmp_path / "adapter", plan, precision="bf16", **options)
    trained = attrs.evolve(trained, setting=attrs.evolve(trained.setting, **setting))
    onto = "packed" if setting else "dequantized"
    request = trained.request(tmp_path / "merged", onto=onto, dtype=None if setting else torch.float32)
    opened = open_merge(request, CPU, Quiet())
    write(opened, request, Quiet())
    expected = load_reference(opened, request).eval()(TOKENS).logits
    found = load_merged(request.out, opened, packed=onto == "packed")(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
