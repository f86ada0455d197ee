"""A right merge is known by its answers, and so is a wrong one."""

import attrs
import pytest
import torch
from merge.conftest import CPU, Quiet, train
from support import quantization
from transformers import AutoModelForCausalLM

from quantune.comparison.outputs import predict
from quantune.comparison.text import Windows
from quantune.errors import VerificationError
from quantune.merge import comparison, verify
from quantune.merge.answers import without_adapter
from quantune.merge.comparison import Figures
from quantune.merge.merge import merge
from quantune.merge.opening import open_merge
from quantune.merge.prompts import Prompts
from quantune.merge.trial import load_reference

NF4 = quantization(weight_dtype="nf4")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def prompts():
    """16 rows of 32 tokens."""
    rows = torch.randint(3, 320, (16, 32), generator=torch.Generator().manual_seed(0)).tolist()
    windows = Windows(rows=tuple(map(tuple, rows)), text_tokens=512)
    targets_N = torch.ones(windows.predicted, dtype=torch.bool)
    return Prompts(source="random tokens", held_out=True, windows=windows, targets_N=targets_N)


def merged(trained, folder, dtype, weight=1.0):
    """Loads the merge of an adapter, its update times `weight`."""
    if not folder.exists():
        merge(attrs.evolve(trained.request(folder, dtype=dtype), weights=(weight,)), CPU, Quiet())
    return lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def reference(trained, out):
    """Loads base and adapter as they were trained."""
    request = trained.request(out)
    return lambda: load_reference(open_merge(request, CPU, Quiet()), request)


@pytest.fixture(scope="module")
def on_llama(bases, tmp_path_factory):
    return train(bases["llama"], tmp_path_factory.mktemp("adapter"), NF4)


@pytest.fixture(scope="module")
def on_mixtral(bases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    return train(bases["mixtral"], folder, NF4, target_parameters=EXPERTS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", ["on_llama", "on_mixtral"])
def test_right_merge_passes_and_one_without_the_adapter_fails(base, dtype, request, tmp_path):
    trained = request.getfixturevalue(base)
    expected = reference(trained, tmp_path / "right")
    right = verify.measure(expected, merged(trained, tmp_path / "right", DTYPES[dtype]), prompts(), dtype=DTYPES[dtype])
    assert right.passed and right.telling
    assert right.found.kl < 2 * right.rounding.kl  # far within the bound
    without = merged(trained, tmp_path / "without", DTYPES[dtype], weight=0.0)
    with pytest.raises(VerificationError, match="as far away as the base without the adapter"):
        verify.verify(expected, without, prompts(), dtype=DTYPES[dtype])


@pytest.mark.parametrize("weight", [0.9, 2.0])
def test_wrong_scaling_fails(weight, on_llama, tmp_path):
    candidate = merged(on_llama, tmp_path / "merged", torch.bfloat16, weight=weight)
    with pytest.raises(VerificationError, match="which rounding the weights to bfloat16 explains"):
        verify.verify(reference(on_llama, tmp_path), candidate, prompts(), dtype=torch.bfloat16)


def test_merge_onto_another_base_fails(on_llama, tmp_path):
    merge(on_llama.request(tmp_path / "merged", onto="original", verify=False), CPU, Quiet())
    candidate = merged(on_llama, tmp_path / "merged", torch.float32)
    found = verify.measure(reference(on_llama, tmp_path), candidate, prompts(), dtype=torch.float32)
    assert found.found.kl > 1e4 * found.kl_bound


def test_one_wrong_weight_among_thousands_fails(on_llama, tmp_path):
    """The mean hardly moves, the largest difference does."""

    def candidate():
        model = merged(on_llama, tmp_path / "merged", torch.float32)()
        model.lm_head.weight.data[7, 3] += 0.01
        return model

    found = verify.measure(reference(on_llama, tmp_path), candidate, prompts(), dtype=torch.float32)
    assert found.found.max_difference > found.difference_bound
    assert not found.passed


def test_another_vocabulary_is_said(on_llama, tmp_path):
    def candidate():
        model = merged(on_llama, tmp_path / "merged", torch.float32)()
        model.resize_token_embeddings(330)
        return model

    with pytest.raises(VerificationError, match="expected logits over a vocabulary of 320 tokens, found 330"):
        verify.measure(reference(on_llama, tmp_path), candidate, prompts(), dtype=torch.float32)


def test_nan_is_said(on_llama, tmp_path):
    def candidate():
        model = merged(on_llama, tmp_path / "merged", torch.float32)()
        model.model.norm.weight.data[0] = torch.nan
        return model

    with pytest.raises(VerificationError, match="NaN or infinite"):
        verify.measure(reference(on_llama, tmp_path), candidate, prompts(), dtype=torch.float32)


def test_adapter_that_changes_nothing_tells_nothing(on_llama, tmp_path):
    trained = attrs.evolve(on_llama, setting=on_llama.setting)

    def no_adapter():
        model = reference(trained, tmp_path)()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        return model

    candidate = merged(trained, tmp_path / "merged", torch.bfloat16, weight=0.0)
    found = verify.measure(no_adapter, candidate, prompts(), dtype=torch.bfloat16)
    assert found.passed and not found.telling


def test_base_alone_is_without_an_adapted_head(bases, tmp_path):
    trained = train(bases["llama"], tmp_path / "adapter", NF4, targets=("all-linear", "lm_head"))
    plain = merged(trained, tmp_path / "plain", torch.float32, weight=0.0)()
    model = reference(trained, tmp_path)()
    alone, expected = without_adapter(model, prompts().windows), predict(plain, prompts().windows)
    everything = slice(None)
    torch.testing.assert_close(alone.log_probabilities(everything), expected.log_probabilities(everything))


def test_moving_weights_moves_them_by_up_to_half_a_unit():
    model = torch.nn.Linear(64, 64)
    before = model.weight.detach().clone()
    verify.move_weights(model, torch.bfloat16)
    unit = torch.ldexp(torch.full_like(before, 2.0**-7), torch.frexp(before).exponent - 1)
    moved = (model.weight - before).abs() / unit
    assert 0.45 < float(moved.max()) <= 0.5 + 1e-3
    assert abs(float(moved.mean()) - 0.25) < 0.01


def test_fraction_of_the_improvement_is_1_for_what_was_trained_and_0_for_the_base():
    base, trained = Figures(loss=3.0, kl=0.5), Figures(loss=1.0, kl=0.0)
    half = Figures(loss=2.0, kl=0.1)
    rows = comparison.rows(base, trained, {"dequantized": trained, "packed": half})
    assert [row.kept for row in rows] == [0.0, 1.0, 1.0, 0.5]
    assert [row.way for row in rows] == [comparison.BASE, comparison.TRAINED, "dequantized", "packed"]
    assert comparison.warning("dequantized", rows[2].kept) is None
    assert "packed keeps only 50% of the adapter's improvement" in comparison.warning("packed", rows[3].kept)


def test_without_an_improvement_there_is_no_fraction():
    base = Figures(loss=1.0, kl=0.0)
    rows = comparison.rows(base, Figures(loss=1.5, kl=0.0), {"packed": base})
    assert {row.kept for row in rows} == {None}


def test_measured_table_keeps_all_of_the_exact_merge_and_nothing_of_the_base(on_llama, tmp_path):
    model = reference(on_llama, tmp_path)()
    trained = comparison.measure_trained(model, prompts())
    ways = {
        name: comparison.measure(merged(on_llama, tmp_path / name, torch.float32, weight=weight)(), trained, prompts())
        for name, weight in {"exact": 1.0, "none": 0.0}.items()
    }
    assert ways["exact"].kl < 1e-9 < ways["none"].kl
    assert ways["exact"].loss == pytest.approx(trained.trained.loss, abs=1e-5)
    assert ways["none"].loss == pytest.approx(trained.base.loss, abs=1e-5)
