"""A base that is already quantized: what it holds, and what a recipe can do with it; no torch needed."""

import pytest
from support import quantization

from quantune.backends.checkpoints import as_stored, format_problem, in_words

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "router"]}
OTHERS = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "quark, but for 2 modules, e.g. lm_head": {"quant_method": "quark", "exclude": ["lm_head", "mlp.gate"]},
    "compressed-tensors, but for lm_head": {
        "quant_method": "compressed-tensors",
        "ignore": ["lm_head"],
    },
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {}}},
    "its config.json names no method": {"bits": 4},
}


@pytest.mark.parametrize(("words", "stored"), OTHERS.items(), ids=str)
@pytest.mark.parametrize("backend", ["bnb", "mxfp4", "fp8"])
def test_a_checkpoint_that_no_backend_takes_over_leaves_the_unquantized_base(words, stored, backend):
    problem = format_problem(stored, quantization(backend=backend))
    assert problem.code == "QT122"
    assert problem.message == f'is already quantized ({words}), and the recipe asks for backend = "{backend}"'
    assert problem.way_out == "choose the unquantized base"


@pytest.mark.parametrize(("words", "stored"), OTHERS.items(), ids=str)
def test_without_a_table_it_can_not_be_trained_on_either(words, stored):
    problem = format_problem(stored, None)
    assert problem.code == "QT123" and words in problem.message
    assert problem.way_out.startswith("choose the unquantized base")


@pytest.mark.parametrize(("stored", "asked"), [(MXFP4, "bnb"), (MXFP4, "fp8"), (FP8, "bnb"), (FP8, "mxfp4")])
def test_another_format_over_one_that_can_be_taken_over_can_be_dropped(stored, asked):
    problem = format_problem(stored, quantization(backend=asked))
    assert problem.code == "QT122" and f'asks for backend = "{asked}"' in problem.message
    method = stored["quant_method"]
    ways = f'drop [quantization] to take it over as it is (backend = "{method}"), or choose the unquantized base'
    assert problem.way_out == ways


@pytest.mark.parametrize("stored", [MXFP4, FP8])
def test_a_format_of_a_backend_is_taken_over_with_its_table_or_without(stored):
    assert format_problem(stored, None) is None
    assert format_problem(stored, quantization(backend=stored["quant_method"])) is None
    assert as_stored(stored).backend == stored["quant_method"]


def test_blocks_of_another_size_are_another_format_which_the_table_can_be_dropped_for():
    stored = {**FP8, "weight_block_size": [64, 64]}
    problem = format_problem(stored, quantization(backend="fp8"))
    assert problem.code == "QT122" and "blocks of [64, 64]" in problem.message and "drop" in problem.way_out
    assert format_problem(stored, quantization(backend="fp8", block_size=(64, 64))) is None
    assert as_stored(stored).options.block_size == (64, 64) and format_problem(stored, None) is None


@pytest.mark.parametrize("table", [None, "fp8"])
def test_fp8_with_one_scale_a_weight_is_not_taken_over(table):
    problem = format_problem({"quant_method": "fp8"}, None if table is None else quantization(backend=table))
    assert problem.code == "QT122" and "one scale per weight" in problem.message
    assert problem.way_out == "choose the unquantized base"


def test_a_checkpoint_of_an_old_bitsandbytes_names_its_bits_only():
    assert in_words({"load_in_4bit": True}) == "bitsandbytes"
