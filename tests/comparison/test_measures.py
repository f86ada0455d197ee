"""The measures on their own: packed parameters of every kind, divergence, windows of a text."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from quantune.backends.backend import pack_weight
from quantune.backends.bnb import BnbOptions
from quantune.backends.bnb.formats import BnbBackend
from quantune.comparison import outputs
from quantune.comparison.outputs import Predictions, output_figures
from quantune.comparison.text import Text, cut
from quantune.comparison.weights import kind_of, packed_parameters, packed_sums, time_dequantize
from quantune.errors import QuantizationError
from quantune.quantized.linear import WeightFormat, Workspace

INT8 = BnbOptions(weight_dtype="int8")


class Experts(nn.Module):
    """Packed fused experts: a parameter of shape (experts, bytes), described by name in `packed_formats`."""

    def __init__(self, stack, transposed) -> None:
        super().__init__()
        packed = [pack_weight(BnbBackend(), weight, INT8) for weight in stack]
        self.down_proj = nn.Parameter(torch.stack([one.data for one in packed]), requires_grad=False)
        self.is_transposed = transposed
        self.packed_formats = {"down_proj": WeightFormat(BnbBackend(), packed[0].layout, Workspace())}


def packed_experts(stack, transposed=False):
    model = nn.Module()
    model.experts = Experts(stack, transposed)
    return list(packed_parameters(model))


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_experts_are_measured_matrix_by_matrix(transposed):
    torch.manual_seed(0)
    stack = torch.randn(3, 8, 8)
    (parameter,) = packed_experts(stack, transposed)
    dense = stack.mT.contiguous() if transposed else stack
    sums = packed_sums([parameter], {"experts.down_proj": dense})
    figures = sums["experts.down_proj"].figures("experts.down_proj")
    found = torch.stack([parameter.weight_format.dequantize(row, torch.float32) for row in parameter.data_EB])
    assert parameter.weights == figures.weights == 3 * 8 * 8
    assert figures.relative_error == pytest.approx((found - stack).norm().item() / stack.norm().item(), rel=1e-5)
    assert figures.bits_per_weight == parameter.weight_format.layout.bits_per_weight


def test_experts_that_the_unquantized_model_does_not_have_are_an_error():
    parameters = packed_experts(torch.randn(3, 8, 16))
    with pytest.raises(QuantizationError, match="expected .3, 8, 16. .* found None"):
        packed_sums(parameters, {})
    with pytest.raises(QuantizationError, match="found \\(2, 8, 16\\)"):
        packed_sums(parameters, {"experts.down_proj": torch.randn(2, 8, 16)})


def test_a_weight_that_is_dequantized_to_nan_is_an_error(monkeypatch):
    parameters = packed_experts(torch.randn(1, 8, 16))
    broken = torch.full((8, 16), math.nan)
    monkeypatch.setattr(BnbBackend, "dequantize", lambda *arguments: broken)
    with pytest.raises(QuantizationError, match="dequantized to NaN"):
        packed_sums(parameters, {"experts.down_proj": torch.randn(1, 8, 16)})


def test_zeros_that_stay_zeros_have_no_error():
    sums = packed_sums(packed_experts(torch.zeros(1, 8, 16)), {"experts.down_proj": torch.zeros(1, 8, 16)})
    assert sums["experts.down_proj"].figures("all").relative_error == 0.0


def test_zeros_that_become_something_else_are_an_error():
    sums = packed_sums(packed_experts(torch.ones(1, 8, 16)), {"experts.down_proj": torch.zeros(1, 8, 16)})
    with pytest.raises(QuantizationError, match="experts.down_proj: weights that are all zero"):
        sums["experts.down_proj"].figures("experts.down_proj")


def test_dequantizing_is_timed_against_a_copy():
    figures = time_dequantize(packed_experts(torch.randn(2, 64, 64)), torch.float32)
    assert figures.ms_per_million > 0 and figures.memcpys > 0


@pytest.mark.parametrize(
    ("parameter", "kind"),
    [
        ("model.layers.11.mlp.down_proj.weight", "down_proj"),
        ("model.layers.1.mlp.experts.gate_up_proj", "experts.gate_up_proj"),
        ("visual.merger.mlp.0.weight", "mlp.0"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_kinds_of_layers(parameter, kind):
    assert kind_of(parameter) == kind


def predictions(logits):
    return Predictions(states_ND=logits, head=lambda states: states)


def test_divergence_in_chunks_is_that_of_the_whole(monkeypatch):
    torch.manual_seed(0)
    p, q, targets = torch.randn(50, 300), torch.randn(50, 300), torch.randint(0, 300, (50,))
    monkeypatch.setattr(outputs, "CHUNK_BYTES", 4 * 300 * 7)
    found = output_figures(predictions(q), predictions(p), targets)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    assert found.kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-5)
    assert found.loss == pytest.approx(torch.nn.functional.nll_loss(log_q, targets).item(), rel=1e-6)


def test_tokens_that_a_model_masks_with_infinity_do_not_count():
    logits = torch.randn(4, 10)
    logits[:, 7:] = -math.inf
    assert output_figures(predictions(logits), predictions(logits.clone()), torch.zeros(4, dtype=torch.long)).kl == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_are_an_error(value):
    broken = torch.randn(4, 10)
    broken[2, 3] = value
    with pytest.raises(QuantizationError, match="NaN or infinite"):
        output_figures(predictions(broken), predictions(torch.randn(4, 10)), torch.zeros(4).long())


class Tokenizer:
    """A token a letter, between a begin and an end token."""

    bos_token_id, eos_token_id = 0, 1

    def __call__(self, text, verbose):
        return type("Encoded", (), {"input_ids": [0, *(ord(letter) for letter in text), 1]})


def test_a_text_is_cut_into_windows_that_each_begin_with_the_begin_token():
    windows = cut(Text(name="t", content="abcdefghijklmnopqrstuvwxyz"), Tokenizer(), max_tokens=20, window=9)
    assert [len(row) for row in windows.rows] == [9, 9, 5]
    assert all(row[0] == 0 for row in windows.rows) and 1 not in windows.rows[-1]
    assert windows.predicted == 20 and windows.text_tokens == 26
