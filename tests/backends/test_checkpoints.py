"""A base that is already quantized: what it holds, and what a recipe can do with it; no torch needed."""

import pytest
from support import quantization

from quantune.backends.checkpoints import as_stored, format_problem, in_words

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "router"]}


def torchao(kind, **data):
    """What a `config.json` says of torchao's."""
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_version": 2, "_data": data}}}


OTHERS = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "hqq": {"quant_method": "hqq", "quant_config": {}},
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


@pytest.mark.parametrize(
    ("stored", "backend", "options"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "bnb",
            {"weight_dtype": "nf4", "double_quant": False},
        ),
        ({"load_in_8bit": True}, "bnb", {"weight_dtype": "int8"}),
        (torchao("Int8WeightOnlyConfig"), "torchao", {"weight_dtype": "int8"}),
        (
            torchao("Int8WeightOnlyConfig", granularity={"_type": "PerGroup", "_data": {"group_size": 64}}),
            "torchao",
            {"weight_dtype": "int8", "group_size": 64},
        ),
        (torchao("Int4WeightOnlyConfig", group_size=32), "torchao", {"weight_dtype": "int4", "group_size": 32}),
        (torchao("NVFP4WeightOnlyConfig"), "torchao", {"weight_dtype": "nvfp4"}),
        (
            torchao("Float8DynamicActivationFloat8WeightConfig", granularity=[{"_type": "PerRow"}] * 2),
            "torchao",
            {"weight_dtype": "fp8"},
        ),
    ],
)
def test_what_transformers_writes_of_other_libraries_is_taken_over(stored, backend, options):
    found = as_stored(stored)
    assert found.backend == backend
    assert found.options.resolved() == quantization(backend=backend, **options).options
    assert format_problem(stored, quantization(backend=backend, **options)) is None


@pytest.mark.parametrize(
    "stored",
    [
        torchao("Int8WeightOnlyConfig", granularity={"_type": "PerTensor", "_data": {}}),
        torchao("Float8DynamicActivationFloat8WeightConfig"),  # with one scale for the weight
        torchao("Int4WeightOnlyConfig", int4_packing_format={"_type": "Int4PackingFormat", "_data": "PRESHUFFLED"}),
        torchao("IntxWeightOnlyConfig"),
    ],
)
def test_variants_of_torchaos_that_quantune_has_not_are_refused(stored):
    assert as_stored(stored) is None
    assert format_problem(stored, None).code == "QT123"
    problem = format_problem(stored, quantization(backend="torchao", weight_dtype="int8"))
    assert problem.code == "QT122" and "does not say int8, fp8, int4 or nvfp4 as quantune has them" in problem.message


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
