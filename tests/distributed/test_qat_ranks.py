"""Quantization-aware training is the same run in one process and in two."""

import attrs
import pytest
import torch
from distributed.test_worlds import CLOSE, evolved, losses, recipe, run  # noqa: F401  # a fixture
from safetensors.torch import load

from quantune.recipe.schema import AdapterConfig, QatConfig

KINDS = {
    "lora": (AdapterConfig(r=4), QatConfig()),
    "dora": (AdapterConfig(r=4, use_dora=True), QatConfig()),
    "dora on the packed base": (AdapterConfig(r=4, use_dora=True), QatConfig(lora_base="packed")),
    "full": (AdapterConfig(type="full"), QatConfig()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_round_as_one_does(recipe, tmp_path, kind):  # noqa: F811  # the fixture
    adapter, qat = KINDS[kind]
    made = attrs.evolve(evolved(recipe, training={"qat": qat, "max_steps": 2}), adapter=adapter)
    alone, expected = run(1, made, tmp_path)
    shared, found = run(2, made, tmp_path)
    torch.testing.assert_close(losses(shared), losses(alone), rtol=CLOSE, atol=0)
    expected, found = load(expected), load(found)
    assert found.keys() == expected.keys() and any(tensor.any() for tensor in expected.values())
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().mean() <= 1e-5, name
