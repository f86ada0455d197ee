"""Spellings of older tools: what each comes to, what contradicts what, and that no order of the keys matters."""

import itertools
import random

import pytest
import tomli
from recipe_support import write

from quantune.backends.registry import backends_with_option, options_of
from quantune.backends.torchao import TorchaoOptions
from quantune.errors import RecipeError
from quantune.recipe.legacy import rewrite
from quantune.recipe.legacy.claims import DEFAULTS, GROUP_SIZES
from quantune.recipe.load import load_recipe

NF4 = {"backend": "bnb", "weight_dtype": "nf4"}
INT8 = {"backend": "bnb", "weight_dtype": "int8"}
INT4 = {"backend": "torchao", "weight_dtype": "int4", "group_size": 128}
LORA = {"adapter": {"type": "lora"}}


def rewritten(text):
    return rewrite(tomli.loads(text))


@pytest.mark.parametrize(
    ("text", "table", "old"),
    [
        ('adapter = "qlora"', NF4, ["adapter"]),
        ('adapter = "qlora"\nload_in_4bit = true', NF4, ["adapter", "load_in_4bit"]),
        ('adapter = "qlora"\nload_in_8bit = false', NF4, ["adapter", "load_in_8bit"]),
        ('adapter = "lora"\nload_in_4bit = true', NF4, ["adapter", "load_in_4bit"]),
        ('[adapter]\ntype = "qlora"', NF4, ["adapter.type"]),
        ("load_in_4bit = true", NF4, ["load_in_4bit"]),
        ("load_in_4bit = true\nload_in_8bit = false", NF4, ["load_in_4bit", "load_in_8bit"]),
        ('load_in_8bit = " TRUE "', INT8, ["load_in_8bit"]),
        ('load_in_8bit = true\nload_in_4bit = "False"', INT8, ["load_in_4bit", "load_in_8bit"]),
        ('load_in_4bit = "false"', None, ["load_in_4bit"]),
        ("[model]\nload_in_4bit = true", NF4, ["model.load_in_4bit"]),
        ("[quantization]\nload_in_8bit = true", INT8, ["quantization.load_in_8bit"]),
        ("[adapter]\nload_in_4bit = true", NF4, ["adapter.load_in_4bit"]),
        ('load_in_4bit = true\n[quantization]\nbackend = "bnb"', {**NF4, "backend": "bnb"}, ["load_in_4bit"]),
        (
            'load_in_4bit = true\n[quantization]\nbackend = "bnb"\nblock_size = 128',
            {**NF4, "block_size": 128},
            ["load_in_4bit"],
        ),
        ('load_in_4bit = true\n[quantization]\nskip = ["a"]', {**NF4, "skip": ["a"]}, ["load_in_4bit"]),
        ('model_quantization_config = "Mxfp4Config"', {"backend": "mxfp4"}, ["model_quantization_config"]),
        ('model_quantization_config = "FineGrainedFP8Config"', {"backend": "fp8"}, ["model_quantization_config"]),
        (
            'model_quantization_config = "FineGrainedFP8Config"\n'
            'model_quantization_config_kwargs = {weight_block_size = [64, 64], modules_to_not_convert = ["a"]}',
            {"backend": "fp8", "block_size": [64, 64], "skip": ["a"]},
            ["model_quantization_config", "model_quantization_config_kwargs"],
        ),
        (
            'model_quantization_config = "Mxfp4Config"\nmodel_quantization_config_kwargs = {}',
            {"backend": "mxfp4"},
            ["model_quantization_config", "model_quantization_config_kwargs"],
        ),
        ('model_quantization_config = {torchao = {weight_dtype = "int4"}}', INT4, ["model_quantization_config"]),
        ('model_quantization_config = {bnb = {weight_dtype = "nf4"}}', NF4, ["model_quantization_config"]),
        ("model_quantization_config = {bnb = {}}", NF4, ["model_quantization_config"]),
        ("model_quantization_config = {mxfp4 = {}}", {"backend": "mxfp4"}, ["model_quantization_config"]),
        (
            'model_quantization_config = {fp8 = {weight_dtype = "fp8"}}',
            {"backend": "fp8"},
            ["model_quantization_config"],
        ),
        (
            'model_quantization_config = {backend = "torchao", weight_dtype = "int4", group_size = 64}',
            {**INT4, "group_size": 64},
            ["model_quantization_config"],
        ),
        (
            'model_quantization_config = {backend = "torchao", weight_dtype = "int8"}',
            {"backend": "torchao", "weight_dtype": "int8", "group_size": 128},
            ["model_quantization_config"],
        ),
        (
            'model_quantization_config = {backend = "torchao", weight_dtype = "fp8"}',
            {"backend": "torchao", "weight_dtype": "fp8"},
            ["model_quantization_config"],
        ),
        (
            'model_quantization_config = {backend = "fp8", config_kwargs = {modules_to_not_convert = ["a"]}}',
            {"backend": "fp8", "skip": ["a"]},
            ["model_quantization_config", "model_quantization_config.config_kwargs"],
        ),
        (
            'model_quantization_config = {backend = "torchao", weight_dtype = "int4", group_size = 0}',
            {**INT4, "group_size": 0},
            ["model_quantization_config"],
        ),
        (
            '[model]\nmodel_quantization_config = "Mxfp4Config"',
            {"backend": "mxfp4"},
            ["model.model_quantization_config"],
        ),
        ('peft = {backend = "bnb", weight_dtype = "nf4"}', NF4, ["peft"]),
        ('peft = {backend = "torchao", weight_dtype = "int4"}', INT4, ["peft"]),
        (
            'adapter = "qlora"\nbnb_config_kwargs = {bnb_4bit_quant_type = "fp4", bnb_4bit_use_double_quant = false}',
            {"backend": "bnb", "weight_dtype": "fp4", "double_quant": False},
            ["adapter", "bnb_config_kwargs"],
        ),
        (
            'load_in_8bit = true\nbnb_config_kwargs = {llm_int8_skip_modules = ["a"], llm_int8_threshold = 6.0}',
            {**INT8, "skip": ["a"]},
            ["bnb_config_kwargs", "load_in_8bit"],
        ),
        (
            'bnb_config_kwargs = {load_in_4bit = true, bnb_4bit_quant_storage = "bfloat16"}',
            NF4,
            ["bnb_config_kwargs", "bnb_config_kwargs.load_in_4bit"],
        ),
        (
            "load_in_4bit = true\nbnb_config_kwargs = {llm_int8_has_fp16_weight = false}",
            NF4,
            ["bnb_config_kwargs", "load_in_4bit"],
        ),
        (
            'quantize_moe_experts = true\n[quantization]\nbackend = "bnb"',
            {"backend": "bnb", "experts": True},
            ["quantize_moe_experts"],
        ),
        (
            "load_in_4bit = true\nquantize_moe_experts = false",
            {**NF4, "experts": False},
            ["load_in_4bit", "quantize_moe_experts"],
        ),
        ("quantize_moe_experts = false", None, ["quantize_moe_experts"]),
        (
            'model_quantization_config = {torchao = {weight_dtype = "int4"}}\n'
            '[quantization]\nbackend = "torchao"\nweight_dtype = "int4"',
            {"backend": "torchao", "weight_dtype": "int4"},
            ["model_quantization_config"],
        ),
        ("gptq = false\nqat = {}\nrelora = 'false'", None, ["gptq", "qat", "relora"]),
        ('[quantization]\nbackend = "bnb"\n[adapter]', {"backend": "bnb"}, []),
        (
            '[quantization]\nbackend = "fp8"\nconfig_kwargs = {weight_block_size = [64, 64]}',
            {"backend": "fp8", "block_size": [64, 64]},
            ["quantization.config_kwargs"],
        ),
        (
            '[quantization]\nbackend = "bnb"\nquantize_moe_experts = false',
            {"backend": "bnb", "experts": False},
            ["quantization.quantize_moe_experts"],
        ),
        ('[quantization]\nbackend = "plugin"\nload_in_4bit = 3', {"backend": "plugin", "load_in_4bit": 3}, []),
    ],
)
def test_every_old_spelling_comes_to_a_table_and_warns_once(text, table, old):
    made = rewritten(text)
    assert made.findings == []
    assert made.document.get("quantization") == table
    assert sorted(warning.where for warning in made.warnings) == sorted(old)
    assert all(warning.code == "QT040" and "is DEPRECATED" in warning.message for warning in made.warnings)


@pytest.mark.parametrize(
    ("text", "message", "now"),
    [
        ('adapter = "lora"', 'adapter = "lora" is', 'write [adapter] type = "lora"'),
        (
            'adapter = "qlora"',
            'adapter = "qlora" is',
            'write [adapter] type = "lora"; write [quantization] backend = "bnb", weight_dtype = "nf4"',
        ),
        (
            "[model]\nload_in_8bit = true",
            "[model] load_in_8bit = true is",
            'write [quantization] backend = "bnb", weight_dtype = "int8"',
        ),
        (
            'load_in_4bit = true\n[quantization]\nbackend = "bnb"\nweight_dtype = "nf4"',
            "load_in_4bit = true is",
            "leave it out: [quantization] says so",
        ),
        ("load_in_4bit = false", "load_in_4bit = false is", "leave it out: that is how it is anyway"),
        (
            'model_quantization_config = {torchao = {weight_dtype = "int8"}}',
            "model_quantization_config is",
            'write [quantization] backend = "torchao", weight_dtype = "int8", group_size = 128',
        ),
        (
            'bnb_config_kwargs = {llm_int8_skip_modules = ["b"]}\n[quantization]\nbackend = "bnb"\nskip = ["a"]',
            "bnb_config_kwargs is",
            'write [quantization] skip = ["a", "b"]',
        ),
        (
            'bnb_config_kwargs = {bnb_4bit_compute_dtype = "torch.bfloat16"}\n[quantization]\nbackend = "bnb"',
            "bnb_config_kwargs is",
            'write [training] precision = "bf16"',
        ),
        (
            'bnb_config_kwargs = {bnb_4bit_quant_storage = "uint8"}\n[quantization]\nbackend = "bnb"',
            "bnb_config_kwargs is",
            "bnb_4bit_quant_storage needs no key: packed weights are stored as uint8, and shard as that",
        ),
        ("gptq = false", "gptq = false is", "leave it out"),
    ],
)
def test_a_warning_shows_the_old_spelling_and_the_new_one(text, message, now):
    (warning,) = rewritten(text).warnings
    assert warning.message.startswith(message) and warning.hint == now


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        ('adapter = "qlora"\nload_in_4bit = false', []),
        ('adapter = "qlora"\nload_in_4bit = false\n[model]\nload_in_4bit = false', []),
        ('load_in_8bit = false\nadapter = "qlora"\n[quantization]\nbackend = "fp8"', ["load_in_8bit"]),
        (
            'bnb_config_kwargs = {bnb_4bit_compute_dtype = "bfloat16"}\nload_in_4bit = true\n'
            '[training]\nprecision = "fp32"',
            ["load_in_4bit"],
        ),
    ],
)
def test_what_is_contradicted_is_no_warning_as_well(text, warned):
    made = rewritten(text)
    assert made.findings and [warning.where for warning in made.warnings] == warned


def test_null_is_no_value():
    nothing = dict.fromkeys(
        ("adapter", "load_in_4bit", "model_quantization_config", "peft", "gptq", "bnb_config_kwargs")
    )
    made = rewrite({**nothing, "quantize_moe_experts": None})
    assert (made.document, made.warnings, made.findings) == ({}, [], [])
    assert rewrite({"adapter": "qlora", "load_in_4bit": None}).document["quantization"] == NF4
    assert rewrite({"model_quantization_config": {"mxfp4": None}}).document["quantization"] == {"backend": "mxfp4"}
    flat = {"backend": "torchao", "weight_dtype": "int4", "group_size": None, "config_kwargs": None}
    assert rewrite({"model_quantization_config": flat}).document["quantization"] == INT4


def test_a_compute_dtype_becomes_the_precision_and_must_agree_with_it():
    text = 'bnb_config_kwargs = {bnb_4bit_compute_dtype = "float32"}\n[quantization]\nbackend = "bnb"\n'
    assert rewritten(text).document["training"] == {"precision": "fp32"}
    assert rewritten(text + '[training]\nprecision = "fp32"').findings == []
    (finding,) = rewritten(text + '[training]\nprecision = "bf16"').findings
    assert (finding.code, finding.other) == ("QT020", ("training", "precision"))
    (finding,) = rewritten(text.replace("float32", "float16")).findings
    assert finding.code == "QT013" and "bf16 or fp32" in finding.hint


def test_two_compute_dtypes_must_agree():
    one = 'bnb_config_kwargs = {bnb_4bit_compute_dtype = "float32"}\nload_in_4bit = true\n'
    two = '[model]\nbnb_config_kwargs = {bnb_4bit_compute_dtype = "bfloat16"}\n'
    (finding,) = rewritten(one + two).findings
    assert (finding.code, finding.where) == ("QT020", "model.bnb_config_kwargs.bnb_4bit_compute_dtype")
    assert finding.other == ("bnb_config_kwargs", "bnb_4bit_compute_dtype") and 'means "fp32"' in finding.message
    assert rewritten(one + two.replace("bfloat16", "float32")).findings == []
    with_precision = rewritten(one + two + '[training]\nprecision = "bf16"').findings
    assert [(found.path[0], found.other) for found in with_precision] == [
        ("bnb_config_kwargs", ("training", "precision"))
    ]


CONTRADICTIONS = [
    ('adapter = "qlora"', 'peft = {backend = "torchao", weight_dtype = "int4"}', "QT101"),
    ('adapter = "qlora"', 'model_quantization_config = "Mxfp4Config"', "QT101"),
    ('adapter = "qlora"', 'quantization = {backend = "fp8"}', "QT101"),
    ('adapter = "qlora"', 'quantization = {backend = "plugin"}', "QT101"),
    ('adapter = "qlora"', 'quantization = {backend = "bnb", weight_dtype = "int8"}', "QT101"),
    ('adapter = {type = "qlora"}', 'quantization = {backend = "bnb", weight_dtype = "fp4"}', "QT101"),
    ('adapter = "qlora"', "load_in_8bit = true", "QT102"),
    ('adapter = "qlora"', "load_in_4bit = false", "QT103"),
    ("load_in_4bit = true", 'load_in_8bit = "true"', "QT104"),
    ("load_in_4bit = false", 'quantization = {backend = "bnb", weight_dtype = "nf4"}', "QT105"),
    ("load_in_4bit = false", 'quantization = {backend = "bnb"}', "QT105"),
    ("load_in_4bit = false", 'peft = {backend = "bnb", weight_dtype = "nf4"}', "QT105"),
    ("load_in_8bit = true", 'model_quantization_config = {bnb = {weight_dtype = "nf4"}}', "QT106"),
    ("load_in_8bit = true", 'quantization = {backend = "bnb"}', "QT106"),
    ("load_in_8bit = false", 'model_quantization_config = {bnb = {weight_dtype = "int8"}}', "QT107"),
    ("load_in_4bit = true", 'quantization = {backend = "bnb", weight_dtype = "int8"}', "QT108"),
    *(
        (f"load_in_{bits}bit = true", table, "QT109")
        for bits in (4, 8)
        for table in (
            'quantization = {backend = "torchao", weight_dtype = "int4"}',
            'model_quantization_config = "Mxfp4Config"',
            "model_quantization_config = {fp8 = {}}",
            'quantization = {backend = "plugin"}',
        )
    ),
    ("load_in_4bit = true", 'quantization = {backend = "bnb", weight_dtype = "fp4"}', "QT100"),
    ("load_in_4bit = true", "model = {load_in_4bit = false}", "QT100"),
    ('peft = {backend = "bnb", weight_dtype = "nf4"}', 'model_quantization_config = "Mxfp4Config"', "QT100"),
    (
        'model_quantization_config = {torchao = {weight_dtype = "int8"}}',
        'quantization = {backend = "torchao", weight_dtype = "int8"}',
        "QT100",
    ),
    (
        'model_quantization_config = {torchao = {weight_dtype = "int4", group_size = 64}}',
        'quantization = {backend = "torchao", weight_dtype = "int4"}',
        "QT100",
    ),
    ("quantize_moe_experts = true", 'quantization = {backend = "bnb", experts = false}', "QT100"),
    ("quantize_moe_experts = false", 'quantization = {backend = "bnb"}', "QT100"),
    ("bnb_config_kwargs = {bnb_4bit_use_double_quant = false}", 'quantization = {backend = "bnb"}', "QT100"),
    ('peft = {backend = "bnb", block_size = 128}', 'quantization = {backend = "bnb"}', "QT100"),
    ('bnb_config_kwargs = {bnb_4bit_quant_type = "fp4"}', 'quantization = {backend = "bnb"}', "QT100"),
    ('bnb_config_kwargs = {bnb_4bit_quant_type = "nf4"}', "load_in_8bit = true", "QT100"),
    (
        "bnb_config_kwargs = {bnb_4bit_use_double_quant = true}",
        'quantization = {backend = "torchao", weight_dtype = "int4"}',
        "QT124",
    ),
    (
        'model_quantization_config_kwargs = {modules_to_not_convert = ["a"]}',
        'model_quantization_config = {backend = "fp8"}',
        "QT118",
    ),
    *(
        (key, base, code)
        for key, code in (
            ("gptq = true", "QT110"),
            ("qat = {weight_dtype = 'int4'}", "QT111"),
            ("fp8 = true", "QT113"),
            ("relora = true", "QT114"),
            ("merge_lora = true", "QT115"),
        )
        for base in (
            'model_quantization_config = {torchao = {weight_dtype = "int4"}}',
            'quantization = {backend = "torchao", weight_dtype = "int4"}',
            'adapter = "qlora"',
        )
    ),
    (
        'quantization = {weight_dtype = "int4", group_size = 32}',
        'model_quantization_config = {torchao = {weight_dtype = "int4"}}',
        "QT112",
    ),
    ('quantization = {activation_dtype = "int8", weight_dtype = "int8"}', 'adapter = "qlora"', "QT112"),
]


@pytest.mark.parametrize(("one", "two", "code"), CONTRADICTIONS)
def test_spellings_that_disagree_are_an_error_that_names_both(one, two, code):
    found = [rewritten("\n".join(order)).findings for order in ((one, two), (two, one))]
    assert found[0] == found[1]
    (finding,) = found[0]
    assert finding.code == code
    assert {finding.path[0], finding.other[0]} == {one.split()[0], two.split()[0]}
    assert finding.hint and (finding.other_label or code == "QT118")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (
            'peft = {backend = "bnb"}\nload_in_4bit = false',
            "leave out load_in_4bit, or peft to train on the base as it is",
        ),
        ('load_in_8bit = true\n[quantization]\nbackend = "fp8"', "leave out load_in_8bit: it is bitsandbytes'"),
        (
            '[model]\nload_in_8bit = true\n[quantization]\nbackend = "bnb"',
            'leave out [model] load_in_8bit, or write weight_dtype = "int8" in [quantization]',
        ),
        (
            'load_in_4bit = true\n[quantization]\nweight_dtype = "int8"',
            'leave out load_in_4bit, or write weight_dtype = "nf4" in [quantization]',
        ),
        (
            'peft = {backend = "bnb"}\nmodel_quantization_config = "Mxfp4Config"',
            "keep one of them, best as [quantization]",
        ),
        (
            'peft = {backend = "fp8"}\nbnb_config_kwargs = {bnb_4bit_quant_type = "nf4"}',
            'leave it out, or name backend = "bnb" in peft',
        ),
        ('adapter = "dora"', "write [adapter] use_dora = true"),
    ],
)
def test_the_way_out_names_keys_that_are_there(text, hint):
    (finding,) = rewritten(text).findings
    assert finding.hint == hint


@pytest.mark.parametrize(
    ("text", "code", "where", "message"),
    [
        ("gptq = true", "QT110", "gptq", "quantune does not do that"),
        ("merge_lora = true", "QT115", "merge_lora", "quantune does not do that"),
        ('[quantization]\nactivation_dtype = "int8"', "QT112", "quantization", "without a backend"),
        ("model_quantization_config = {}", "QT116", "model_quantization_config", "found nothing"),
        ('model_quantization_config = {weight_dtype = "int4"}', "QT116", "model_quantization_config", "weight_dtype"),
        (
            "model_quantization_config = {torchao = {}, group_size = 64}",
            "QT116",
            "model_quantization_config.group_size",
            "group_size stands beside torchao's table",
        ),
        (
            "model_quantization_config = {torchao = {}, bnb = {}}",
            "QT117",
            "model_quantization_config.torchao",
            "bnb, torchao",
        ),
        (
            'model_quantization_config = {torchao = {backend = "bnb"}}',
            "QT117",
            "model_quantization_config.torchao.backend",
            "bnb, torchao",
        ),
        (
            'model_quantization_config = {backend = "bnb", torchao = {}}',
            "QT117",
            "model_quantization_config.torchao",
            "bnb, torchao",
        ),
        ("peft = {loftq_config = {loftq_bits = 4}}", "QT116", "peft", "names no backend"),
        (
            "model_quantization_config_kwargs = {dequantize = true}",
            "QT118",
            "model_quantization_config_kwargs",
            "there is no model_quantization_config",
        ),
        ("bnb_config_kwargs = {bnb_4bit_use_double_quant = true}", "QT124", "bnb_config_kwargs", "nothing quantizes"),
        ("quantize_moe_experts = true", "QT119", "quantize_moe_experts", "nothing quantizes the base"),
        ('model_quantization_config = "BitsAndBytesConfig"', "QT013", "model_quantization_config", "expected"),
        ('model_quantization_config = "MxFp4Config"', "QT013", "model_quantization_config", "expected"),
        ("model_quantization_config = 4", "QT013", "model_quantization_config", "found 4"),
        ("model_quantization_config = {torchao = 4}", "QT013", "model_quantization_config.torchao", "found 4"),
        ("peft = 4", "QT013", "peft", "found 4"),
        ('adapter = "llama-adapter"', "QT013", "adapter", 'expected a table, "lora" or "qlora"'),
        ("load_in_4bit = 1", "QT013", "load_in_4bit", "expected true or false, found 1"),
        ('load_in_4bit = "yes"', "QT013", "load_in_4bit", 'found "yes"'),
        ("bnb_config_kwargs = 4", "QT013", "bnb_config_kwargs", "expected a table"),
        (
            "load_in_4bit = true\nbnb_config_kwargs = {bnb_4bit_quant_typ = 'nf4'}",
            "QT012",
            "bnb_config_kwargs.bnb_4bit_quant_typ",
            "unknown key",
        ),
        (
            "load_in_8bit = true\nbnb_config_kwargs = {llm_int8_has_fp16_weight = true}",
            "QT021",
            "bnb_config_kwargs.llm_int8_has_fp16_weight",
            "base is frozen",
        ),
        (
            "load_in_4bit = true\nbnb_config_kwargs = {bnb_4bit_quant_type = 'int4'}",
            "QT013",
            "bnb_config_kwargs.bnb_4bit_quant_type",
            'expected "nf4" or "fp4"',
        ),
        (
            'model_quantization_config = "Mxfp4Config"\nmodel_quantization_config_kwargs = {dequantize = true}',
            "QT021",
            "model_quantization_config_kwargs.dequantize",
            "in full precision",
        ),
    ],
)
def test_an_old_spelling_that_means_nothing_is_an_error_at_its_key(text, code, where, message):
    (finding,) = rewritten(text).findings
    assert (finding.code, finding.where) == (code, where) and message in finding.message
    assert finding.hint or code == "QT013"
    assert code != "QT117" or finding.other not in (None, finding.path)


def test_every_two_spellings_that_contradict_each_other_are_reported():
    text = 'adapter = "qlora"\nload_in_8bit = true\n[quantization]\nbackend = "torchao"\nweight_dtype = "int4"'
    made = rewritten(text)
    assert [(finding.code, finding.path) for finding in made.findings] == [
        ("QT109", ("load_in_8bit",)),
        ("QT101", ("adapter",)),
        ("QT102", ("adapter",)),
    ]
    assert made.document["quantization"] == {"backend": "torchao", "weight_dtype": "int4"}


POOL = {
    "adapter": ["lora", "qlora", {"type": "qlora"}, {"r": 4}, "dora", None, ""],
    "load_in_4bit": [True, False, "true", None, 4],
    "load_in_8bit": [True, False, "FALSE", None],
    "model_quantization_config": [
        "Mxfp4Config",
        "Fp4Config",
        {"torchao": {"weight_dtype": "int4"}},
        {"torchao": {"weight_dtype": "int8"}, "bnb": None},
        {"bnb": {}, "fp8": {}},
        {"backend": "bnb", "weight_dtype": "nf4"},
        {"backend": "fp8", "config_kwargs": {"modules_to_not_convert": ["b"]}},
        {"group_size": 64, "weight_dtype": "int4"},
    ],
    "model_quantization_config_kwargs": [{"modules_to_not_convert": ["a"]}, {}, {"x": 1, "dequantize": True}],
    "peft": [{"backend": "bnb", "weight_dtype": "nf4"}, {"weight_dtype": "nf4"}, {"loftq_config": {}, "x": 1}],
    "bnb_config_kwargs": [
        {"bnb_4bit_quant_type": "fp4", "llm_int8_skip_modules": ["c"]},
        {"load_in_8bit": True, "bnb_4bit_compute_dtype": "bfloat16", "y": 0},
    ],
    "quantize_moe_experts": [True, False],
    "gptq": [True, False],
    "relora": [True, "false"],
    "quantization": [
        {"backend": "bnb"},
        {"backend": "bnb", "weight_dtype": "int8", "load_in_8bit": True},
        {"backend": "torchao", "weight_dtype": "int4", "skip": ["a"]},
        {"weight_dtype": "int4", "activation_dtype": "int8"},
        {"backend": "plugin", "config_kwargs": {}},
        {"skip": ["a"]},
        [1],
    ],
    "model": [{"base": "b"}, {"load_in_4bit": True, "base": "b", "peft": {"backend": "bnb"}}],
    "training": [{"precision": "fp32"}, {}],
}


def shuffled(value, randomly):
    """The value with the keys of every table in another order."""
    if not isinstance(value, dict):
        return value
    keys = list(value)
    randomly.shuffle(keys)
    return {key: shuffled(value[key], randomly) for key in keys}


def outcome(document):
    made = rewrite(document)
    return (
        made.document,
        made.sources,
        frozenset(made.warnings),
        frozenset(made.findings),
        len(made.warnings) + len(made.findings),
    )


def test_any_order_of_the_keys_gives_the_same_document_warnings_and_findings():
    randomly = random.Random(0)
    contradicted = clean = 0
    for _ in range(3000):
        keys = randomly.sample(sorted(POOL), randomly.randrange(1, 7))
        document = {key: randomly.choice(POOL[key]) for key in keys}
        expected = outcome(document)
        assert document == {key: document[key] for key in keys}  # as it was
        for _ in range(3):
            assert outcome(shuffled(document, randomly)) == expected
        contradicted, clean = contradicted + bool(expected[3]), clean + (not expected[3])
    assert contradicted > 500 and clean > 300


def test_every_order_of_a_few_keys_gives_the_same():
    document = {
        "adapter": "qlora",
        "load_in_8bit": True,
        "model_quantization_config": {"torchao": {"weight_dtype": "int4"}},
        "gptq": True,
        "quantization": {"backend": "bnb"},
    }
    outcomes = [outcome(dict(order)) for order in itertools.permutations(document.items())]
    assert all(one == outcomes[0] for one in outcomes) and len(outcomes[0][3]) == 6


def test_the_groups_of_older_tools_are_quantunes_where_nothing_is_written_for_them():
    for dtype, size in GROUP_SIZES.items():
        own = TorchaoOptions(weight_dtype=dtype).resolved().group_size
        assert own == size or (dtype == "int8" and own is None)


def test_what_a_table_leaves_unsaid_is_the_backends_default():
    for (backend, dtype), defaults in DEFAULTS.items():
        cls = options_of(backend)
        made = cls() if dtype is None else cls(weight_dtype=dtype)
        made = made.resolved() if hasattr(made, "resolved") else made
        for key, value in defaults.items():
            own = getattr(made, key)
            assert (list(own) if isinstance(own, tuple) else own) == value


# In a recipe ----------------------------------------------------------------------------------------------------------

RECIPE = """\
{top}
[model]
base = "builtin:mini"

[[data.train]]
path = "train.jsonl"
format = "chat"
{more}
"""


def load(tmp_path, top, more="", overrides=()):
    path = write(tmp_path, RECIPE.format(top=top, more=more))
    return load_recipe(path, options_of=options_of, backends_with=backends_with_option, overrides=overrides)


def problems(tmp_path, top, more="", overrides=()):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, top, more, overrides)
    return caught.value.problems


def test_a_recipe_in_old_spellings_is_the_recipe_in_new_ones(tmp_path):
    old = load(tmp_path, 'adapter = "qlora"\nbnb_config_kwargs = {bnb_4bit_use_double_quant = false}')
    new = load(tmp_path, "", '[adapter]\n[quantization]\nbackend = "bnb"\nweight_dtype = "nf4"\ndouble_quant = false')
    assert old.recipe == new.recipe and new.warnings == ()
    assert [(warning.line, warning.code) for warning in old.warnings] == [(1, "QT040"), (2, "QT040")]


def test_a_contradiction_shows_both_lines(tmp_path):
    (problem,) = problems(tmp_path, "load_in_8bit = true\n", '[adapter]\n[quantization]\nbackend = "bnb"')
    (related,) = problem.related
    assert (problem.line, problem.code) == (1, "QT106")
    assert (related.line, related.label) == (10, "says bnb nf4")


def test_a_mistake_inside_an_old_spelling_is_shown_where_it_is_written(tmp_path):
    top = 'adapter = "lora"\nmodel_quantization_config = {torchao = {weight_dtype = "int5", group_siz = 4}}'
    unknown, wrong = sorted(problems(tmp_path, top), key=lambda problem: problem.code)
    assert unknown.where == "model_quantization_config.torchao.group_siz" and unknown.line == 2
    assert wrong.where == "model_quantization_config.torchao.weight_dtype" and 'found "int5"' in wrong.message
    (missing,) = problems(tmp_path, 'adapter = "lora"\npeft = {backend = "torchao"}')
    assert (missing.where, missing.line) == ("peft.weight_dtype", 2)


def test_a_group_size_of_0_is_an_error_and_no_default(tmp_path):
    top = 'adapter = "lora"\nmodel_quantization_config = {backend = "torchao", weight_dtype = "int4", group_size = 0}'
    (problem,) = problems(tmp_path, top)
    assert problem.where == "model_quantization_config.group_size" and "found 0" in problem.message


def test_a_contradiction_hides_no_other_problem(tmp_path):
    found = problems(tmp_path, "load_in_4bit = true\nload_in_8bit = true", "[adapter]\nalpa = 3")
    assert [problem.code for problem in found] == ["QT104", "QT012"]


@pytest.mark.parametrize(
    ("top", "table", "code"),
    [
        ("load_in_4bit = true", 'backend = "bmb"', "QT015"),
        ("load_in_4bit = true", 'backend = "bnb"\nweight_dtype = "nf5"', "QT013"),
        ("load_in_4bit = true", 'weight_dtype = "nf5"', "QT013"),
        ('adapter = "qlora"', 'backend = "bmb"\nweight_dtype = "int8"', "QT015"),
        ("quantize_moe_experts = true", 'backend = "bnb"\nexperts = "x"', "QT013"),
        ("bnb_config_kwargs = {bnb_4bit_use_double_quant = true}", 'backend = "bmb"', "QT015"),
    ],
)
def test_what_is_no_value_contradicts_nothing(tmp_path, top, table, code):
    adapter = "" if top.startswith("adapter") else "[adapter]\n"
    (problem,) = problems(tmp_path, top, f"{adapter}[quantization]\n{table}")
    assert problem.code == code


def test_an_override_can_contradict_an_old_spelling(tmp_path):
    overrides = ["quantization.backend=torchao", "quantization.weight_dtype=int4"]
    (problem,) = problems(tmp_path, 'adapter = "qlora"', overrides=overrides)
    assert problem.code == "QT101" and problem.line == 1
    assert [place.origin for place in problem.related] == ["--set quantization.backend=torchao"]


@pytest.mark.parametrize(
    ("top", "more", "code", "line"),
    [
        ("load_in_4bit = true", "", "QT120", 1),
        ("", '[quantization]\nbackend = "bnb"', "QT120", 8),
        ("", "", "QT010", None),
    ],
)
def test_a_recipe_without_an_adapter_trains_nothing(tmp_path, top, more, code, line):
    (problem,) = problems(tmp_path, top, more)
    assert (problem.code, problem.line) == (code, line) and problem.hint.startswith("add [adapter]")


def test_what_is_found_later_is_shown_at_the_old_spelling_too(tmp_path):
    loaded = load(tmp_path, 'adapter = "qlora"')
    problem = loaded.problem("QT030", "quantization.backend", "no")
    assert (problem.where, problem.line) == ("adapter", 1)
