"""Roundings that are chosen for what a layer reads."""

import attrs
import pytest
import torch
from merge.conftest import CPU, Quiet, train
from support import FORMATS, quantization

from quantune.backends import registry
from quantune.backends.backend import pack_weight
from quantune.errors import InputError
from quantune.merge.aware import pack_aware
from quantune.merge.merge import merge
from quantune.merge.opening import open_merge
from quantune.merge.prompts import prompts_of
from quantune.merge.rounding import choose_codes, emphasize, grid_of, pack_for, with_codes
from quantune.merge.trial import load_reference
from quantune.model.base import open_base
from quantune.model.load import packed_fingerprint
from quantune.recipe.schema import ModelConfig

NF4 = quantization(weight_dtype="nf4")


def packed(name, weight):
    """A weight packed in a format, and its backend."""
    chosen = quantization(**FORMATS[name])
    backend = registry.load_backend(registry.describe(chosen.backend))
    return backend, pack_weight(backend, weight, chosen.options)


def weight_and_inputs():
    """A weight of 48 x 256, and the second moment of inputs that go together, as those of a model do."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(1024, 24, generator=generator) @ torch.randn(24, 256, generator=generator)
    inputs = mixed + 0.3 * torch.randn(1024, 256, generator=generator)
    return torch.randn(48, 256, generator=generator) / 16, inputs.T @ inputs / len(inputs)


def error(found, wanted, moment):
    """The mean square of what the outputs are off by."""
    off = found - wanted
    return float(((off @ moment) * off).sum())


@pytest.mark.parametrize("name", FORMATS)
def test_grid_is_what_the_format_dequantizes_to(name):
    backend, weight = packed(name, weight_and_inputs()[0])
    grid = grid_of(backend, weight)
    index = torch.randint(len(grid.codes_C), weight.layout.shape, generator=torch.Generator().manual_seed(1))
    found = backend.dequantize(with_codes(backend, weight, grid.codes_C[index]), torch.float32)
    expected = grid.values_C[index] * grid.scale_IO.T + grid.offset_IO.T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_outputs_are_nearer_than_after_plain_packing(name):
    wanted, moment = weight_and_inputs()
    backend, plain = packed(name, wanted)
    chosen = pack_for(backend, plain, wanted, moment)
    assert chosen.layout == plain.layout
    nearer, before = (error(backend.dequantize(one, torch.float32), wanted, moment) for one in (chosen, plain))
    assert nearer < 0.2 * before


def require_plain(backend, found, plain, wanted):
    """Every weight is as near as it can be."""
    off, least = ((backend.dequantize(one, torch.float32) - wanted).abs() for one in (found, plain))
    torch.testing.assert_close(off, least, rtol=1e-4, atol=1e-7)


def test_inputs_that_have_nothing_to_do_with_each_other_leave_plain_rounding():
    wanted, _ = weight_and_inputs()
    backend, plain = packed("torchao int8", wanted)
    codes = choose_codes(wanted, grid_of(backend, plain), torch.eye(256))
    require_plain(backend, with_codes(backend, plain, codes), plain, wanted)


def test_inputs_that_are_never_there_leave_plain_rounding():
    wanted, _ = weight_and_inputs()
    backend, plain = packed("torchao int8", wanted)
    require_plain(backend, pack_for(backend, plain, wanted, torch.zeros(256, 256)), plain, wanted)


def test_emphasis_keeps_an_update_that_rounding_drowns():
    base, moment = weight_and_inputs()
    backend, stored = packed("bnb nf4", base)
    generator = torch.Generator().manual_seed(2)
    lora_A, lora_B = torch.randn(4, 256, generator=generator), torch.randn(48, 4, generator=generator)
    weight = backend.dequantize(stored, torch.float32)
    update = 1e-4 * lora_B @ lora_A
    plain = pack_weight(backend, weight + update, stored.layout.options)
    chosen = pack_for(backend, plain, weight + update, emphasize(moment, lora_A, 1e4))

    def kept(found):
        """The fraction of the update that is there in the directions that it reads."""
        learned = (backend.dequantize(found, torch.float32) - weight) @ lora_A.T
        wanted = update @ lora_A.T
        return float((learned * wanted).sum() / wanted.square().sum())

    assert kept(plain) < 0.2
    assert kept(chosen) == pytest.approx(1.0, abs=0.2)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small update of the built-in model, to be tried on few tokens."""
    monkeypatch.setattr("quantune.merge.trial.MAX_TOKENS", 256)
    trained = train("builtin:mini", tmp_path / "adapter", NF4)
    return attrs.evolve(trained.request(tmp_path / "merged"), dtype=None, onto="packed", verify=True)


def test_merge_with_chosen_roundings_is_nearer_to_what_was_trained(small, tmp_path):
    plain = merge(small, CPU, Quiet()).verification
    aware = merge(attrs.evolve(small, aware=True, out=tmp_path / "aware"), CPU, Quiet()).verification
    assert aware.found.kl < 0.5 * plain.found.kl


def test_choosing_leaves_the_model_as_it_was(small):
    opened = open_merge(small, CPU, Quiet())
    model = load_reference(opened, small)
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        before, bytes_before = model(tokens).logits, packed_fingerprint(model)
        windows = prompts_of(None, opened.base.tokenizer, max_tokens=128).windows
        found = pack_aware(model, opened.update.apply, windows)
        assert torch.equal(model(tokens).logits, before)
    assert packed_fingerprint(model) == bytes_before
    assert found.kl[found.emphasis] == min(found.kl.values()) < found.kl[None]


def test_adapter_on_no_packed_layer_leaves_nothing_to_choose(tmp_path):
    options = quantization(skip=("q_proj",), weight_dtype="nf4")
    trained = train("builtin:mini", tmp_path / "adapter", options, targets=("q_proj",))
    request = attrs.evolve(trained.request(tmp_path / "merged"), onto="packed", aware=True)
    with pytest.raises(InputError, match="the adapter is on no packed linear layer"):
        merge(request, CPU, Quiet())


def test_prompts_say_where_they_are_from():
    base = open_base(ModelConfig(base="builtin:mini"))
    found = prompts_of(None, base.tokenizer, max_tokens=64)
    assert found.source == "the built-in text"
    assert found.windows.predicted == len(found.targets_N) == int(found.targets_N.sum())
