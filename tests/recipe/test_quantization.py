"""`[quantization]` with the built-in backends: every option error with its place and way out, and older spellings."""

import pytest
from recipe_support import write

from quantune.backends.registry import backends_with_option, options_of
from quantune.errors import RecipeError
from quantune.recipe.load import load_recipe

RECIPE = """\
[model]
base = "builtin:mini"

[quantization]
{table}

[adapter]

[[data.train]]
path = "train.jsonl"
format = "chat"
"""


def load(tmp_path, table):
    path = write(tmp_path, RECIPE.replace("{table}", table))
    return load_recipe(path, options_of=options_of, backends_with=backends_with_option)


def problem(tmp_path, table):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, table)
    (found,) = caught.value.problems
    assert found.line is not None and found.line >= 4
    return found


@pytest.mark.parametrize(
    ("table", "options"),
    [
        ('backend = "torchao"\nweight_dtype = "int4"', {"weight_dtype": "int4", "group_size": 128}),
        (
            'backend = "torchao"\nweight_dtype = "nf4"',
            {"weight_dtype": "nf4", "group_size": 64, "scaler_block_size": 256},
        ),
        ('backend = "torchao"\nweight_dtype = "nvfp4"', {"weight_dtype": "nvfp4", "group_size": 16}),
        ('backend = "torchao"\nweight_dtype = "int8"', {"weight_dtype": "int8", "group_size": None}),
        ('backend = "torchao"\nweight_dtype = "fp8"', {"weight_dtype": "fp8", "group_size": None}),
        ('backend = "fp8"', {"block_size": (128, 128)}),
        ('backend = "fp8"\nblock_size = [64, 128]', {"block_size": (64, 128)}),
        ('backend = "mxfp4"', {}),
    ],
)
def test_every_format_has_its_defaults(tmp_path, table, options):
    found = load(tmp_path, table).recipe.quantization.options
    for key, value in options.items():
        assert getattr(found, key) == value


@pytest.mark.parametrize(
    ("table", "code", "where", "message", "hint"),
    [
        ('backend = "torchao"', "QT010", "quantization.weight_dtype", "lacks the key", 'expected one of "int4", "nf4"'),
        (
            'backend = "torchao"\nweight_dtype = "int5"',
            "QT013",
            "quantization.weight_dtype",
            'one of "int4", "nf4", "nvfp4", "int8", "fp8", found "int5"',
            None,
        ),
        (
            'backend = "torchao"\nweight_dtype = "mxfp4"',
            "QT013",
            "quantization.weight_dtype",
            'found "mxfp4"',
            'backend = "mxfp4"',
        ),
        (
            'backend = "fp8"\ngroup_size = 64',
            "QT016",
            "quantization.group_size",
            'group_size has no meaning for backend "fp8"',
            'it is an option of "torchao"',
        ),
        (
            'backend = "bnb"\ngroup_size = 64',
            "QT016",
            "quantization.group_size",
            'group_size has no meaning for backend "bnb"',
            "torchao",
        ),
        (
            'backend = "mxfp4"\nweight_dtype = "mxfp4"',
            "QT016",
            "quantization.weight_dtype",
            'weight_dtype has no meaning for backend "mxfp4"',
            "leave it out, there is one format",
        ),
        (
            'backend = "torchao"\nweight_dtype = "fp8"\ngroup_size = 64',
            "QT016",
            "quantization.group_size",
            "one scale per row",
            None,
        ),
        (
            'backend = "torchao"\nweight_dtype = "int4"\ngroup_size = 0',
            "QT016",
            "quantization.group_size",
            "expected one of 32, 64, 128, 256",
            None,
        ),
        (
            'backend = "torchao"\nweight_dtype = "int8"\ngroup_size = -32',
            "QT016",
            "quantization.group_size",
            "must be greater than 0, found -32",
            None,
        ),
        (
            'backend = "fp8"\nblock_size = [128, 0]',
            "QT016",
            "quantization.block_size",
            "two numbers greater than 0",
            None,
        ),
        (
            'backend = "fp8"\nblock_size = 128',
            "QT013",
            "quantization.block_size",
            "expected a list of whole numbers",
            None,
        ),
        (
            'backend = "bnb"\nweight_dtype = "int4"',
            "QT013",
            "quantization.weight_dtype",
            'found "int4" (a string)',
            '"int4" is a weight_dtype of "torchao"',
        ),
        ('backend = ""', "QT014", "quantization.backend", "must not be empty", "quantune backends list"),
        ('skip = ["a"]', "QT010", "quantization.backend", "lacks the key", "quantune backends list"),
        ('backend = "hqq4"', "QT015", "quantization.backend", 'found "hqq4"', 'did you mean "hqq"?'),
        ('backend = "hqq"', "QT015", "quantization.backend", 'found "hqq"', "pip install quantune-hqq"),
    ],
)
def test_every_wrong_option_says_what_there_is(tmp_path, table, code, where, message, hint):
    found = problem(tmp_path, table)
    assert (found.code, found.where) == (code, where)
    assert message in found.message
    assert hint is None or hint in found.hint


@pytest.mark.parametrize(
    ("table", "meant"),
    [
        ('backend = "torchao"\nweight_dtype = "int8"\ngroup_size = 0', "0"),
        ('backend = "bnb"\nblock_size = 48', "48"),
        ('backend = "bnb"\nweight_dtype = "int8"\nblock_size = 64', "block_size"),
        ('backend = "mxfp4"\nblock_size = 64', "block_size"),
        ('backend = "bbn"', '"bbn"'),
        ('[model_quantization_config]\ntorchoa = {weight_dtype = "int4"}', "torchoa"),
    ],
)
def test_the_value_is_underlined_or_the_key_whichever_is_wrong(tmp_path, table, meant):
    found = problem(tmp_path, table)
    start, length = found.underline
    assert found.source_line[start - 1 : start - 1 + length] == meant


def test_config_kwargs_of_older_configs_are_understood_with_a_warning(tmp_path):
    loaded = load(
        tmp_path,
        'backend = "fp8"\nskip = ["a"]\n'
        'config_kwargs = {weight_block_size = [64, 64], modules_to_not_convert = ["a", "b"], dequantize = false}',
    )
    quantization = loaded.recipe.quantization
    assert quantization.skip == ("a", "b") and quantization.options.block_size == (64, 64)
    (warning,) = loaded.warnings
    assert warning.code == "QT040" and warning.line == 7 and "DEPRECATED" in warning.message
    assert warning.hint == 'write [quantization] block_size = [64, 64], skip = ["a", "b"]'


def test_config_kwargs_that_say_what_is_so_anyway_can_go(tmp_path):
    loaded = load(tmp_path, 'backend = "mxfp4"\nconfig_kwargs = {dequantize = false}')
    assert loaded.recipe.quantization.skip == ()
    assert loaded.warnings[0].hint == "leave it out: that is how it is anyway"


@pytest.mark.parametrize(
    ("table", "code", "where", "message"),
    [
        (
            'backend = "mxfp4"\nconfig_kwargs = {dequantize = true}',
            "QT021",
            "quantization.config_kwargs.dequantize",
            "would train on the base in full precision",
        ),
        (
            'backend = "mxfp4"\nconfig_kwargs = {weight_block_size = [128, 128]}',
            "QT021",
            "quantization.config_kwargs.weight_block_size",
            'no meaning for backend "mxfp4"',
        ),
        (
            'backend = "fp8"\nconfig_kwargs = {activation_scheme = "dynamic"}',
            "QT012",
            "quantization.config_kwargs.activation_scheme",
            "unknown key",
        ),
        (
            'backend = "fp8"\nblock_size = [128, 128]\nconfig_kwargs = {weight_block_size = [64, 64]}',
            "QT100",
            "quantization.config_kwargs.weight_block_size",
            "means block_size = [64, 64], and [quantization] means fp8 with block_size = [128, 128]",
        ),
        (
            'backend = "fp8"\nconfig_kwargs = {modules_to_not_convert = "lm_head"}',
            "QT013",
            "quantization.config_kwargs.modules_to_not_convert",
            "expected a list of strings",
        ),
        ('backend = "fp8"\nconfig_kwargs = 3', "QT013", "quantization.config_kwargs", "expected a table, found 3"),
        (
            'backend = "torchao"\nweight_dtype = "int8"\nconfig_kwargs = {}',
            "QT021",
            "quantization.config_kwargs",
            'no meaning for backend "torchao"',
        ),
        (
            'backend = "bnb"\nconfig_kwargs = {load_in_4bit = true}',
            "QT021",
            "quantization.config_kwargs",
            'no meaning for backend "bnb"',
        ),
    ],
)
def test_config_kwargs_without_a_meaning_are_refused(tmp_path, table, code, where, message):
    found = problem(tmp_path, table)
    assert (found.code, found.where) == (code, where)
    assert message in found.message


def test_a_backend_is_known_whatever_the_case_of_its_letters(tmp_path):
    found = problem(tmp_path, 'backend = "BNB"')
    assert found.code == "QT015" and 'did you mean "bnb"?' in f"{found.message} {found.hint}"
