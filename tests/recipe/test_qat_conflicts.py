"""What `[training.qat]` and `type = "full"` are refused with."""

from pathlib import Path

import pytest
from recipe_support import write

from quantune.backends.registry import options_of
from quantune.errors import RecipeError
from quantune.recipe.load import load_recipe

RECIPE = """\
[model]
base = "builtin:mini"
{quantization}
[adapter]
{adapter}
[[data.train]]
path = "train.jsonl"
format = "chat"

[training]
max_steps = 10
{training}
"""
NF4 = '[quantization]\nbackend = "bnb"\n'
INT8 = '[quantization]\nbackend = "torchao"\nweight_dtype = "int8"\n'
QAT = "[training.qat]\n"


def load(tmp_path, quantization="", adapter="", training=""):
    text = RECIPE.format(quantization=quantization, adapter=adapter, training=training)
    return load_recipe(write(tmp_path, text), options_of=options_of).recipe


@pytest.mark.parametrize(
    ("quantization", "adapter", "training", "where", "code", "message"),
    [
        ("", "", QAT, "training.qat", "QT022", "for the format of [quantization], and there is none"),
        (NF4, "", "compile = true\n" + QAT, "training.compile", "QT020", "outside of graphs"),
        (NF4, "dropout = 0.1", QAT, "adapter.dropout", "QT020", "which has one input"),
        (NF4, 'type = "full"', "", "adapter.type", "QT020", "packed weights can't be trained"),
        (NF4, 'type = "full"\nr = 4', QAT, "adapter.r", "QT021", 'r belongs to type = "lora"'),
        ("", 'type = "full"\nuse_dora = true', "", "adapter.use_dora", "QT021", 'belongs to type = "lora"'),
        ("", 'type = "full"', "loraplus_lr_ratio = 2", "training.loraplus_lr_ratio", "QT021", "the B matrices of LoRA"),
        (NF4, 'type = "full"', QAT + 'lora_base = "packed"', "training.qat.lora_base", "QT021", 'of type = "full"'),
        (NF4, 'init = "loftq"', QAT, "adapter.init", "QT020", "does not pack it"),
        (
            NF4,
            "",
            QAT + "fake_quant_after_steps = 10",
            "training.qat.fake_quant_after_steps",
            "QT020",
            "never comes within max_steps = 10",
        ),
        (
            NF4,
            "",
            QAT + 'activation_dtype = "int8"',
            "training.qat.activation_dtype",
            "QT020",
            'no reader of backend = "bnb", weight_dtype = "nf4" rounds activations to "int8"; it leaves them',
        ),
        *(
            (
                f'[quantization]\nbackend = "{backend}"\n' + options,
                "",
                QAT + f'activation_dtype = "{dtype}"',
                "training.qat.activation_dtype",
                "QT020",
                f"{dtype} layers always round activations to {dtype}, in a way of their own",
            )
            for backend, options, dtype in (("bnb", 'weight_dtype = "int8"\n', "int8"), ("fp8", "", "fp8"))
        ),
        (INT8, "", QAT + 'activation_dtype = "fp8"', "training.qat.activation_dtype", "QT020", 'only to "int8"'),
        (
            INT8 + "group_size = 32\n",
            "",
            QAT + 'activation_dtype = "int8"',
            "training.qat.activation_dtype",
            "QT020",
            "it leaves them",
        ),
        (NF4, "", QAT + 'activation_dtype = "nf4"', "training.qat.activation_dtype", "QT013", 'one of "int8", "fp8"'),
        (NF4, "", QAT + 'weight_dtype = "int4"', "training.qat.weight_dtype", "QT012", "unknown key"),
        (NF4, "", "qat = true", "training.qat", "QT013", "expected a table"),
    ],
)
def test_a_wrong_combination_is_refused_with_its_place(tmp_path, quantization, adapter, training, where, code, message):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, quantization, adapter, training)
    (problem,) = caught.value.problems
    assert (problem.where, problem.code) == (where, code)
    assert message in problem.message


def test_what_is_understood(tmp_path):
    made = load(tmp_path, INT8, "", QAT + 'activation_dtype = "int8"\nfake_quant_after_steps = 9')
    assert (made.training.qat.lora_base, made.training.qat.activation_dtype) == ("dense", "int8")
    assert load(tmp_path, NF4, 'type = "full"', QAT).training.qat is not None
    assert load(tmp_path, "", 'type = "full"').training.qat is None


def test_the_recipe_that_comes_with_quantune_is_right():
    path = Path(__file__).parents[2] / "recipes" / "qat.toml"
    loaded = load_recipe(path, options_of=options_of)
    assert loaded.recipe.training.qat is not None and loaded.warnings == ()
