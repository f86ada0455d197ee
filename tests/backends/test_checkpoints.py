"""What a checkpoint says of its own quantization, and what a recipe makes of it."""

import pytest
from support import quantization

from quantune.backends.checkpoints import checkpoint_problems, format_problem, holds, stored_quantization
from quantune.recipe.schema import AdapterConfig, DataConfig, ModelConfig, Recipe, SourceConfig

UNQUANTIZED = "choose the unquantized base"
AS_IT_IS = f"leave [quantization] out to train on it as it is, or {UNQUANTIZED}"
FOREIGN = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, "awq, 4 bits, groups of 128"),
    "gptq": ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "gptq, 8 bits"),
    "bitsandbytes 4 bit": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "bitsandbytes, nf4",
    ),
    "bitsandbytes 8 bit without a method": ({"load_in_8bit": True}, "bitsandbytes, int8"),
    "quark with exclusions": ({"quant_method": "quark", "exclude": ["lm_head"]}, "quark"),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]},
        "compressed-tensors, pack-quantized",
    ),
    "torchao": ({"quant_method": "torchao", "quant_type": {"default": {}}}, "torchao"),
    "no method": ({"bits": 4}, "its config.json names no method"),
    "nothing at all": ({}, "its config.json names no method"),
    "a method of another type": ({"quant_method": ["awq"]}, "its config.json names no method"),
}
ADOPTED = {
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def problem(stored, **plan):
    return format_problem(stored, quantization(**plan) if plan else None)


def found(config, plan=None, **adapter):
    recipe = Recipe(
        model=ModelConfig(base="some/base"),
        quantization=plan,
        adapter=AdapterConfig(**adapter),
        data=DataConfig(train=(SourceConfig(path="train.jsonl", format="chat"),)),
    )
    return list(checkpoint_problems(config, recipe))


@pytest.mark.parametrize("backend", ["bnb", "torchao", "mxfp4", "fp8"])
@pytest.mark.parametrize(("stored", "held"), FOREIGN.values(), ids=FOREIGN)
def test_a_format_that_no_backend_takes_over_is_refused_whatever_the_recipe_says(stored, held, backend):
    options = {"weight_dtype": "int8"} if backend == "torchao" else {}
    message, hint = problem(stored, backend=backend, **options)
    assert message == f'the base is already quantized ({held}), and [quantization] asks for backend = "{backend}"'
    assert hint == UNQUANTIZED


@pytest.mark.parametrize(("stored", "held"), FOREIGN.values(), ids=FOREIGN)
def test_such_a_format_is_refused_without_quantization_too(stored, held):
    assert problem(stored) == (
        f"the base is already quantized ({held}), and no backend trains on that as it is",
        UNQUANTIZED,
    )


@pytest.mark.parametrize(("name", "stored"), ADOPTED.items(), ids=ADOPTED)
def test_a_format_of_a_backend_is_taken_over_with_it_or_without_quantization(name, stored):
    assert problem(stored, backend=name) is None
    assert problem(stored) is None


@pytest.mark.parametrize(("name", "stored"), ADOPTED.items(), ids=ADOPTED)
def test_beside_another_backend_the_way_out_is_to_leave_quantization_out(name, stored):
    message, hint = problem(stored, backend="bnb")
    assert f'already quantized ({name}), and [quantization] asks for backend = "bnb"' in message and hint == AS_IT_IS


def test_other_blocks_of_fp8_are_told_and_taken_over_with_their_option():
    stored = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    assert "set block_size = [64, 64]" in problem(stored, backend="fp8")[0]
    message, hint = problem(stored)
    assert "set block_size = [64, 64]" in message
    assert hint == 'it is taken over with [quantization] backend = "fp8"'
    assert problem(stored, backend="fp8", block_size=(64, 64)) is None


def test_one_scale_per_weight_is_not_the_fp8_of_blocks():
    assert "one scale per weight" in problem({"quant_method": "fp8"}, backend="fp8")[0]


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"text_config": None}, {"text_config": {}}])
def test_a_base_that_says_nothing_is_not_quantized(config):
    assert stored_quantization(config) is None
    assert found(config, quantization(backend="bnb"), init="pissa") == []


def test_a_text_model_within_another_says_it_for_itself():
    assert stored_quantization({"text_config": {"quantization_config": {"quant_method": "awq"}}}) == {
        "quant_method": "awq"
    }


@pytest.mark.parametrize("plan", [quantization(backend="fp8"), None])
def test_an_initialization_that_changes_weights_is_refused_beside_packed_ones(plan):
    config = {"quantization_config": ADOPTED["fp8"]}
    (finding,) = found(config, plan, init="pissa")
    assert (finding.path, finding.other) == (("adapter", "init"), ("model", "base"))
    assert found(config, plan, init="gaussian") == []


def test_a_format_that_does_not_fit_points_at_the_base_and_at_the_backend():
    (finding,) = found({"quantization_config": {"quant_method": "awq"}}, quantization(backend="bnb"), init="pissa")
    assert (finding.code, finding.path) == ("QT150", ("model", "base"))
    assert finding.other == ("quantization", "backend")


def test_what_a_checkpoint_says_is_fit_for_one_line():
    assert "\n" not in holds({"quant_method": "a\nb" * 50, "format": "x\x1b[31m"})
    assert len(holds({"quant_method": "a" * 500})) < 60
