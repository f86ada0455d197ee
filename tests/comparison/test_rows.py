"""The rows of a comparison are what direct computation gives, and a format that fails is a row that says why."""

from __future__ import annotations

import json
import math

import attrs
import pytest
import torch
from comparison.measured import CPU, TEXT, Recorder, run

from quantune.comparison import compare as comparing
from quantune.comparison import formats
from quantune.comparison.text import Text
from quantune.errors import InputError, ModelError
from quantune.model.load import load_model


@pytest.fixture(scope="module")
def observer():
    return Recorder()


@pytest.fixture(scope="module")
def rows(base, observer):
    """By name, over formats that can and that can't store rows of 80."""
    found = run(base, "bnb:nf4", "torchao:int4", "bnb:int8", "mxfp4", "fp8", observer=observer)
    return {row.format: row for row in found.rows}


def load(base, name=None):
    quantization = None if name is None else formats.select([name])[0].quantization
    return load_model(base, quantization, compute_dtype=torch.float32, device=CPU)


def test_every_format_is_a_row_after_the_unquantized_model(rows, observer):
    assert list(rows) == ["unquantized", "bnb:nf4", "torchao:int4", "bnb:int8", "mxfp4", "fp8"]
    assert observer.rows == list(rows) and observer.total == len(rows)
    assert ("bnb:int8", "loading") in observer.phases


def test_the_relative_error_of_a_kind_is_that_of_its_layers_together(base, rows):
    original, packed = load(base), load(base, "bnb:nf4")
    error = signal = 0.0
    for index in range(2):
        weight = original.model.layers[index].mlp.down_proj.weight.double()
        error += (packed.model.layers[index].mlp.down_proj.dequantize().double() - weight).square().sum().item()
        signal += weight.square().sum().item()
    kind = next(kind for kind in rows["bnb:nf4"].kinds if kind.kind == "down_proj")
    assert kind.layers == 2 and kind.weights == 2 * 80 * 160
    assert kind.relative_error == pytest.approx(math.sqrt(error / signal), rel=1e-6)
    assert kind.snr_db == pytest.approx(10 * math.log10(signal / error), rel=1e-6)


def test_the_bits_are_those_of_the_packed_bytes(base, rows):
    packed = load(base, "bnb:nf4")
    layouts = [module.weight_format.layout for module in packed.modules() if hasattr(module, "weight_format")]
    nbytes, weights = sum(layout.nbytes for layout in layouts), sum(math.prod(layout.shape) for layout in layouts)
    assert rows["bnb:nf4"].weights.bits_per_weight == 8 * nbytes / weights
    assert rows["unquantized"].weights.bits_per_weight == 32
    assert rows["unquantized"].weights.weights == weights == rows["bnb:nf4"].weights.weights


def test_all_layers_together_have_an_error_between_those_of_the_kinds(rows):
    errors = [kind.relative_error for kind in rows["bnb:nf4"].kinds]
    assert len(errors) == 7 and min(errors) <= rows["bnb:nf4"].weights.relative_error <= max(errors)


def test_perplexity_and_kl_are_those_of_the_whole_logits(base, rows):
    ids = torch.tensor([base.tokenizer(TEXT.content).input_ids])
    with torch.no_grad():
        log_p = load(base)(input_ids=ids).logits[0, :-1].log_softmax(-1)
        log_q = load(base, "bnb:nf4")(input_ids=ids).logits[0, :-1].log_softmax(-1)
    loss = torch.nn.functional.nll_loss(log_q, ids[0, 1:]).item()
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert rows["bnb:nf4"].outputs.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert rows["bnb:nf4"].outputs.kl == pytest.approx(kl, rel=1e-3)


def test_the_unquantized_model_is_zero_away_from_itself(rows):
    assert rows["unquantized"].outputs.kl == 0.0 and rows["unquantized"].weights.relative_error == 0.0
    assert rows["unquantized"].weights.snr_db is None and rows["unquantized"].dequantize is None


def test_eight_bits_lose_less_than_four_and_take_more(rows):
    four, eight = rows["bnb:nf4"], rows["bnb:int8"]
    assert eight.weights.relative_error < four.weights.relative_error / 5
    assert eight.outputs.kl < four.outputs.kl
    assert four.model_bytes < eight.model_bytes < rows["unquantized"].model_bytes


def test_times_are_measured(rows):
    for name in ("bnb:nf4", "bnb:int8", "fp8"):
        assert rows[name].dequantize.ms_per_million > 0 and rows[name].dequantize.memcpys > 0
        assert rows[name].training.tokens_per_second > 0 and rows[name].load_seconds > 0
    assert rows["unquantized"].training.tokens_per_second > 0


@pytest.mark.parametrize(
    ("name", "why"), [("torchao:int4", "group_size = 128 does not divide its 80"), ("mxfp4", "blocks of 32")]
)
def test_a_format_that_can_not_store_a_layer_is_a_row_that_says_why(rows, name, why):
    assert why in rows[name].problem
    assert rows[name].weights is None and rows[name].outputs is None and rows[name].kinds == ()


def test_figures_but_times_are_the_same_again(base, rows):
    (_, again) = run(base, "bnb:nf4").rows
    assert again.outputs == rows["bnb:nf4"].outputs and again.kinds == rows["bnb:nf4"].kinds


def test_everything_is_json(base):
    found = run(base, "bnb:int8", "mxfp4")
    document = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    reference, int8, mxfp4 = document["rows"]
    assert int8["outputs"]["perplexity"] > 1 and int8["weights"]["bits_per_weight"] > 8
    assert int8["options"]["weight_dtype"] == "int8" and int8["kinds"][0]["snr_db"] > 20
    assert reference["dequantize"] is None and mxfp4["problem"]
    assert document["setting"]["tokens"] > 16


def test_only_the_first_tokens_of_a_long_text_are_used(base):
    found = run(base, max_tokens=20).setting
    assert found.tokens == 20 and found.text_tokens > 60


@pytest.mark.parametrize("content", ["Too short.", "   "])
def test_a_text_of_a_few_tokens_is_refused(base, content):
    with pytest.raises(InputError, match="expected at least 16"):
        run(base, "bnb:nf4", text=Text(name="short.txt", content=content))


def test_a_tokenizer_of_another_model_is_refused(base):
    config = type(base.config)(**{**base.config.to_dict(), "vocab_size": 100})
    with pytest.raises(ModelError, match="don't belong together"):
        run(attrs.evolve(base, config=config), "bnb:nf4")


def test_whatever_a_third_party_raises_becomes_its_row(base, monkeypatch):
    theirs = attrs.evolve(formats.select(["bnb:nf4"])[0], name="mine:w4", built_in=False)

    def load_or_fail(base, quantization, **arguments):
        if quantization is not None:
            raise ZeroDivisionError("[oops]")
        return load_model(base, quantization, **arguments)

    monkeypatch.setattr(comparing, "load_model", load_or_fail)
    assert run(base, theirs).rows[1].problem == "ZeroDivisionError: [oops]"


def test_a_built_in_format_does_not_hide_a_bug(base, monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(comparing, "time_dequantize", fail)
    with pytest.raises(ZeroDivisionError):
        run(base, "bnb:nf4")


def test_a_format_that_can_not_be_imported_is_a_row_that_says_why(base):
    broken = formats.Format(name="mine", built_in=False, problem="can't be imported")
    assert run(base, broken).rows[1].problem == "can't be imported"
