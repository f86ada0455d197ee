"""What a recipe may say: every error once, with its place; all of them at once."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from recipe_support import VALID, load, options_of, problems, write

from quantune.errors import Place
from quantune.recipe.load import load_recipe
from quantune.recipe.structure import Finding


def test_a_valid_recipe_is_structured_with_defaults_and_backend_options(tmp_path):
    recipe = load(write(tmp_path, VALID))
    assert recipe.adapter.targets == ("q_proj", "v_proj")
    assert recipe.adapter.alpha == 32.0 and isinstance(recipe.adapter.alpha, float)
    assert recipe.quantization.options.block_size == 64
    assert recipe.training.micro_batch_size == "auto"
    assert recipe.data.train[0].format == "chat"


def test_a_whole_number_is_fine_where_a_number_is_expected(tmp_path):
    assert load(write(tmp_path, VALID.replace("1e-3", "1"))).training.learning_rate == 1.0


CASES = [
    # old, new, code, line, where, message, hint
    ("[adapter]", "[adaptr]", "QT011", 8, "adaptr", 'unknown section "adaptr"', 'did you mean "adapter"?'),
    ("r = 8", "rank = 8", "QT012", 9, "adapter.rank", 'unknown key "rank"', "there are: alpha"),
    ("r = 8", "alpa = 8", "QT012", 9, "adapter.alpa", 'unknown key "alpa"', 'did you mean "alpha"?'),
    (
        'weight_dtype = "nf4"',
        "blok_size = 64",
        "QT012",
        6,
        "quantization.blok_size",
        'unknown key "blok_size" for backend "toy"',
        'did you mean "block_size"?',
    ),
    ("r = 8", "r = true", "QT013", 9, "adapter.r", "expected a whole number, found true (a boolean)", None),
    ("r = 8", "r = 8.0", "QT013", 9, "adapter.r", "expected a whole number, found 8.0 (a number)", None),
    ("r = 8", 'r = "8"', "QT013", 9, "adapter.r", 'expected a whole number, found "8"', "remove the quotes"),
    ("1e-3", '"1e-3"', "QT013", 18, "training.learning_rate", 'number, found "1e-3"', "remove the quotes"),
    (
        "max_steps = 10",
        'activation_checkpointing = "yes"',
        "QT013",
        17,
        "training.activation_checkpointing",
        'true or false or "offload", found "yes"',
        "write true, without quotes",
    ),
    ("max_steps = 10", 'optimizer = "adamw_muon"', "QT013", 17, "training.optimizer", "one of", 'mean "adamw"?'),
    ("max_steps = 10", 'optimizer = "adam_8bit"', "QT013", 17, "training.optimizer", "one of", 'mean "adamw_8bit"?'),
    ('"builtin:mini"', "3", "QT013", 2, "model.base", "expected a string, found 3 (a whole number)", None),
    ('["q_proj", "v_proj"]', "7", "QT013", 10, "adapter.targets", "expected a string or a list of strings", None),
    (
        '["q_proj", "v_proj"]',
        '["q_proj", 7]',
        "QT013",
        10,
        "adapter.targets[1]",
        "expected a string, found 7",
        None,
    ),
    (
        "r = 8",
        'use_dora = "false"',
        "QT013",
        9,
        "adapter.use_dora",
        'expected true or false, found "false"',
        "write false",
    ),
    (
        '"chat"',
        '"chatt"',
        "QT013",
        14,
        "data.train[0].format",
        'one of "chat", "instruct", "alpaca", "completion"',
        None,
    ),
    ('"nf4"', '"nf5"', "QT013", 6, "quantization.weight_dtype", 'found "nf5" (a string)', 'did you mean "nf4"?'),
    ("[model]\n", "adapter = 3\n[model]\n", "QT002", 9, "recipe", "not valid TOML", None),
    ("r = 8", "r = 0", "QT014", 9, "adapter.r", "must be greater than 0, found 0", None),
    ("r = 8", "r = -8", "QT014", 9, "adapter.r", "must be greater than 0, found -8", None),
    ("r = 8", "dropout = 1.0", "QT014", 9, "adapter.dropout", "at least 0 and less than 1, found 1.0", None),
    ("1e-3", "nan", "QT014", 18, "training.learning_rate", "must be greater than 0, found nan", None),
    ("max_steps = 10", "seed = -1", "QT014", 17, "training.seed", "must be at least 0, found -1", None),
    ('"builtin:mini"', '""', "QT014", 2, "model.base", "must not be empty", None),
    ("max_steps = 10", "checkpoint.keep = 1", "QT012", 17, "training.checkpoint", 'unknown key "checkpoint"', None),
    ('base = "builtin:mini"\n', "", "QT010", 1, "model.base", '[model] lacks the key "base"', None),
    ('[model]\nbase = "builtin:mini"\n', "", "QT010", None, "model", 'the recipe lacks the section "model"', None),
    ('format = "chat"', "", "QT010", 12, "data.train[0].format", '[data.train[0]] lacks the key "format"', None),
    ('backend = "toy"', 'backend = "toyy"', "QT015", 5, "quantization.backend", 'found "toyy"', None),
    ('backend = "toy"', 'backend = "hqq"', "QT015", 5, "quantization.backend", "pip install quantune-hqq", None),
    ('"nf4"', '"nf4"\nblock_size = 48', "QT016", 7, "quantization.block_size", "expected one of 32, 64", None),
    ('"nf4"', '"int8"\nblock_size = 64', "QT016", 7, "quantization.block_size", "block_size has no meaning", None),
    ('"nf4"', '"nf4"\noptions = 1', "QT012", 7, "quantization.options", 'unknown key "options"', None),
    ("[adapter]", "[zzz]", "QT011", 8, "zzz", 'unknown section "zzz"', "there are: adapter, checkpoint"),
    ("1e-3", "true", "QT013", 18, "training.learning_rate", "expected a number, found true (a boolean)", None),
    ("max_steps = 10", "max_steps = true", "QT013", 17, "training.max_steps", "found true (a boolean)", None),
    ("max_steps = 10", 'max_steps = "10"', "QT013", 17, "training.max_steps", "expected a whole number", None),
    ('"builtin:mini"', "false", "QT013", 2, "model.base", "expected a string, found false (a boolean)", None),
    ('"builtin:mini"', "[]", "QT013", 2, "model.base", "expected a string, found a list", None),
    ("r = 8", "use_dora = 1", "QT013", 9, "adapter.use_dora", "expected true or false, found 1", None),
    ("r = 8", "r = 2026-01-01", "QT013", 9, "adapter.r", "expected a whole number, found 2026-01-01 (date)", None),
    ("r = 8", 'modules_to_save = "x"', "QT013", 9, "adapter.modules_to_save", 'list of strings, found "x"', None),
    (
        '"chat"',
        "3",
        "QT013",
        14,
        "data.train[0].format",
        'one of "chat", "instruct", "alpaca", "completion", found 3',
        None,
    ),
    ("[[data.train]]", "[data.train]", "QT013", 12, "data.train", "list of tables, found a table", "[[data.train]]"),
    ("[adapter]", "[[adapter]]", "QT013", 8, "adapter", "expected a table, found a list", "write [adapter]"),
    ("max_steps = 10", "micro_batch_size = 'aut'", "QT013", 17, "training.micro_batch_size", "or", 'mean "auto"?'),
    ("max_steps = 10", "micro_batch_size = '2'", "QT013", 17, "training.micro_batch_size", "or", "remove the quotes"),
    ('["q_proj", "v_proj"]', '"["', "QT014", 10, "adapter.targets", "regular expression", "in a list"),
    ('["q_proj", "v_proj"]', '"all_linear"', "QT014", 10, "adapter.targets", 'expected "all-linear"', "did you mean"),
    ('["q_proj", "v_proj"]', '"all-linaer"', "QT014", 10, "adapter.targets", 'expected "all-linear"', "did you mean"),
    ("[quantization]", "[[quantization]]", "QT013", 4, "quantization", "expected a table, found a list", None),
    ("max_steps = 10", "micro_batch_size = 'all'", "QT013", 17, "training.micro_batch_size", 'or "auto", found', None),
    ("max_steps = 10", "micro_batch_size = 0", "QT014", 17, "training.micro_batch_size", "greater than 0", None),
    ("max_steps = 10", "warmup_steps = -1", "QT014", 17, "training.warmup_steps", "at least 0, found -1", None),
    ("max_steps = 10", "min_lr_ratio = 1.5", "QT014", 17, "training.min_lr_ratio", "at most 1, found 1.5", None),
    ("1e-3", "inf", "QT014", 18, "training.learning_rate", "must be finite, found inf", None),
    ("max_steps = 10", "weight_decay = inf", "QT014", 17, "training.weight_decay", "must be finite", None),
    ('["q_proj", "v_proj"]', '["q_proj", " "]', "QT014", 10, "adapter.targets", "must not hold an empty name", None),
    ('format = "chat"', 'format = "chat"\nlimit = 0', "QT014", 15, "data.train[0].limit", "greater than 0", None),
    ("[training]", "[checkpoint]\nkeep = 1\n[training]", "QT014", 17, "checkpoint.keep", "at least 2", None),
    ("[[data.train]]", "[[data.eval]]", "QT010", 12, "data.train", '[data] lacks the key "train"', None),
    ('backend = "toy"', "", "QT010", 4, "quantization.backend", '[quantization] lacks the key "backend"', None),
    ('backend = "toy"', "backend = 4", "QT013", 5, "quantization.backend", "expected a string, found 4", None),
    ('"nf4"', '"nf4"\ndouble_quant = 1', "QT013", 7, "quantization.double_quant", "expected true or false", None),
    ('"nf4"', '"int3"', "QT013", 6, "quantization.weight_dtype", 'expected one of "nf4", "fp4", "int8"', None),
]


@pytest.mark.parametrize(("old", "new", "code", "line", "where", "message", "hint"), CASES)
def test_every_error_names_its_place_what_was_expected_and_what_to_do(
    tmp_path, old, new, code, line, where, message, hint
):
    text = VALID.replace(old, new, 1)
    assert text != VALID
    found = {problem.where: problem for problem in problems(write(tmp_path, text))}
    problem = found[where]
    assert problem.code == code
    assert problem.line == line
    assert message in problem.message
    assert hint is None or hint in problem.hint
    if line is not None:
        assert problem.source_line == text.splitlines()[line - 1]
        assert problem.origin.endswith("recipe.toml")


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(tmp_path):
    text = (
        VALID.replace("r = 8", "r = 0\nalpa = 3")
        .replace('"nf4"', '"nf5"')
        .replace("1e-3", "-1")
        .replace('"chat"', '"chatt"')
    )
    found = problems(write(tmp_path, text))
    assert [problem.where for problem in found] == [
        "quantization.weight_dtype",
        "adapter.r",
        "adapter.alpa",
        "data.train[0].format",
        "training.learning_rate",
    ]
    assert [problem.line for problem in found] == sorted(problem.line for problem in found)


def test_any_order_of_the_tables_gives_the_same_problems(tmp_path):
    tables = ["[" + table for table in VALID.replace("r = 8", "r = 0").replace('"nf4"', '"nf5"').split("\n[")]
    tables[0] = tables[0][1:]
    found = {
        tuple(sorted((p.where, p.message) for p in problems(write(tmp_path, "\n".join(order)))))
        for order in itertools.permutations(tables)
    }
    assert len(found) == 1


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        (
            "[model]",
            "load_in_4bits = true\n[model]",
            'unknown key "load_in_4bits"',
            'did you mean "load_in_4bit"? write',
        ),
        ("[model]", "learning_rate = 1\n[model]", 'unknown key "learning_rate"', "it belongs in [training]"),
        ("[model]", "learning_rat = 1\n[model]", 'unknown key "learning_rat"', "mean [training] learning_rate?"),
        ("[model]", "every_steps = 1\n[model]", "unknown key", "[evaluation] or [checkpoint] or [logging]"),
        ("[model]", "lora_r = 8\n[model]", 'unknown key "lora_r"', "write [adapter] r"),
        ("[model]", "zzz = [1]\n[model]", 'unknown key "zzz"', "under the header of its section"),
        ("[model]", "[special_tokens]\n[model]", 'unknown section "special_tokens"', "it belongs in [model]"),
        ("r = 8", "lora_rank = 8", 'unknown key "lora_rank"', "write [adapter] r"),
        ("r = 8", "merge_lora = true", 'unknown key "merge_lora"', "remove merge_lora"),
        ("r = 8", "max_steps = 8", 'unknown key "max_steps"', "it belongs in [training]"),
        ("r = 8", "lora_on_cpu = true", 'unknown key "lora_on_cpu"', "leave it out: the base is streamed"),
        ("max_steps = 10", "load_in_4bit = true", "unknown key", 'write [quantization] backend = "bnb", weight_dtype'),
        ("max_steps = 10", "neftune_noise_alpha = 5", "unknown key", "adds no noise to embeddings"),
        ('format = "chat"', 'format = "chat"\ntype = "sharegpt"', 'unknown key "type"', "write format"),
        ("max_steps = 10", 'optimizer = "adamw_bnb_8bit"', "expected one of", 'write "adamw_8bit"'),
        ("max_steps = 10", 'optimizer = "adamw_torch"', "expected one of", 'write "adamw"'),
    ],
)
def test_a_key_of_another_section_or_tool_is_told_where_to_go(tmp_path, old, new, message, hint):
    (problem,) = problems(write(tmp_path, VALID.replace(old, new, 1)))
    assert message in problem.message and hint in problem.hint


def test_a_missing_file_suggests_one_that_is_there(tmp_path):
    write(tmp_path, VALID)
    (problem,) = problems(tmp_path / "recpe.toml")
    assert problem.code == "QT001" and "no such file" in problem.message and "recipe.toml" in problem.hint


def test_a_folder_is_no_recipe(tmp_path):
    assert "found a folder" in problems(tmp_path)[0].message


def test_text_that_is_not_utf8_says_where(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"[model]\nbase = '\xff'")
    (problem,) = problems(path)
    assert problem.code == "QT001" and "expected UTF-8 text" in problem.message and "position 16" in problem.message


def test_a_missing_file_with_no_name_like_it_has_no_suggestion(tmp_path):
    write(tmp_path, VALID)
    (problem,) = problems(tmp_path / "nowhere" / "recipe.toml")
    assert problem.code == "QT001" and problem.hint is None and problem.line is None


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xef\xbb\xbf" + VALID.replace("r = 8", "r = 0").replace("\n", "\r\n").encode())
    (problem,) = problems(path)
    assert (problem.line, problem.column, problem.source_line) == (9, 1, "r = 0")


def test_line_separators_of_unicode_do_not_shift_the_lines(tmp_path):
    text = VALID.replace("r = 8", 'modules_to_save = ["a\u2028b"]  # \u2028\nr = 0')
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    (problem,) = problems(path)
    assert (problem.line, problem.source_line) == (10, "r = 0")


def test_toml_nested_too_deeply_is_a_problem_of_the_recipe(tmp_path):
    (problem,) = problems(write(tmp_path, VALID.replace("r = 8", "r = " + "[" * 2000 + "]" * 2000)))
    assert problem.code == "QT002" and "nested too deeply" in problem.message


def test_an_empty_recipe_lacks_its_required_sections(tmp_path):
    assert [(p.code, p.where, p.line) for p in problems(write(tmp_path, ""))] == [
        ("QT010", "adapter", None),
        ("QT010", "data", None),
        ("QT010", "model", None),
    ]


def test_quantization_can_be_left_out(tmp_path):
    text = VALID.replace('[quantization]\nbackend = "toy"\nweight_dtype = "nf4"\n', "")
    assert load(write(tmp_path, text)).quantization is None


def test_a_wrong_value_hides_no_problem_of_another_table_or_of_the_backend(tmp_path):
    text = VALID.replace('"nf4"', '"nf4"\nblock_size = 48').replace("r = 8", "r = 0")
    assert [(p.code, p.where) for p in problems(write(tmp_path, text))] == [
        ("QT016", "quantization.block_size"),
        ("QT014", "adapter.r"),
    ]


def test_a_mistake_in_one_section_hides_no_contradiction_in_another(tmp_path):
    text = VALID.replace("r = 8", "r = 0").replace('"nf4"', '"nf5"') + "epochs = 3\n[evaluation]\nat_start = true\n"
    assert [(p.code, p.where) for p in problems(write(tmp_path, text))] == [
        ("QT013", "quantization.weight_dtype"),
        ("QT014", "adapter.r"),
        ("QT020", "training.epochs"),
        ("QT022", "evaluation.at_start"),
    ]


SOURCE = '[[data.eval]]\npath = "a.jsonl"\n'


@pytest.mark.parametrize(
    ("addition", "found"),
    [
        ("epochs = 1\nlearning_rat = 1", [("QT020", "epochs"), ("QT012", "learning_rat")]),
        ("epochs = 1\nzzz = 1", [("QT020", "epochs"), ("QT012", "zzz")]),
        ("epochs = 1\nzzz = 1\noptimizer = 'adamv'", [("QT020", "epochs"), ("QT012", "zzz"), ("QT013", "optimizer")]),
        ("epoch = 1", [("QT012", "epoch")]),  # what is known to be wrong is no contradiction as well
        ("epochs = 1\nseed = 'x'", [("QT013", "seed")]),
        (f'{SOURCE}format = "chta"\nroles = {{assistnt = ["a"]}}', [("QT013", "format"), ("QT014", "roles")]),
        (f'{SOURCE}format = "chat"\nlimt = 1\nroles = {{assistnt = ["a"]}}', [("QT012", "limt"), ("QT014", "roles")]),
        (f'{SOURCE}format = "chta"\nmessages_column = "a"', [("QT013", "format")]),
    ],
)
def test_a_misspelt_key_or_value_hides_no_other_mistake_of_its_section(tmp_path, addition, found):
    told = problems(write(tmp_path, VALID + addition))
    assert [(problem.code, problem.where.rpartition(".")[2]) for problem in told] == found


def test_an_unknown_option_of_a_backend_hides_no_problem_of_the_others(tmp_path):
    text = VALID.replace('"nf4"', '"nf4"\nblock_size = 48\nzzz = 1')
    assert [(p.code, p.where) for p in problems(write(tmp_path, text))] == [
        ("QT016", "quantization.block_size"),
        ("QT012", "quantization.zzz"),
    ]
    misspelt = VALID.replace('weight_dtype = "nf4"', 'weight_dtpe = "int8"\nblock_size = 64')
    assert [(p.code, p.where) for p in problems(write(tmp_path, misspelt))] == [
        ("QT012", "quantization.weight_dtpe"),
        ("QT016", "quantization.block_size"),
    ]


def test_a_section_with_a_mistake_is_not_searched_for_contradictions(tmp_path):
    (problem,) = problems(write(tmp_path, VALID.replace('path = "train.jsonl"', "path = 3")))
    assert (problem.code, problem.where) == ("QT013", "data.train[0].path")


@pytest.mark.parametrize(
    ("old", "new", "where", "message"),
    [
        ("1e-3", "1" + "0" * 400, "training.learning_rate", "too large"),
        ("max_steps = 10", "seed = 18446744073709551616", "training.seed", "must fit into 64 bits"),
        ("r = 8", "r = " + "9" * 5000, "recipe", "too many digits"),
        ("train.jsonl", "a\\u0000.jsonl", "data.train[0].path", "must not hold the character NUL"),
        ('"nf4"', '"""a\n\\u001b[31m"""', "quantization.weight_dtype", 'found "a\\n\\u001b[31m"'),
        ('"nf4"', f'"{"x" * 500}"', "quantization.weight_dtype", 'xxx..." (a string)'),
    ],
)
def test_extreme_values_are_problems_on_one_short_line(tmp_path, old, new, where, message):
    (problem,) = problems(write(tmp_path, VALID.replace(old, new)))
    assert problem.where == where and message in problem.message
    assert len(problem.message) < 250 and "\n" not in problem.message and "\x1b" not in problem.message


def test_what_is_found_later_can_still_point_into_the_recipe(tmp_path):
    path = write(tmp_path, VALID)
    loaded = load_recipe(path, options_of=options_of, overrides=["adapter.r=4"])
    problem = loaded.problem("QT030", "data.train[0].path", "there is no file", "write one")
    assert (problem.line, problem.column, problem.source_line) == (13, 1, 'path = "train.jsonl"')
    assert (problem.code, problem.hint, problem.origin) == ("QT030", "write one", str(path))
    assert loaded.problem("QT030", "adapter.r", "too small").origin == "--set adapter.r=4"


def test_loading_a_recipe_imports_no_torch_and_nothing_above_the_recipe_language():
    code = "import sys, quantune.recipe.preflight, quantune.recipe.resolve; print(*sys.modules, sep='\\n')"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert {"torch", "transformers", "tomlkit"}.isdisjoint(modules)
    ours = {name for name in modules if name.startswith("quantune.")} - {"quantune.errors", "quantune.recipe"}
    assert all(name.startswith("quantune.recipe.") for name in ours)


def test_unbounded_gradient_norms_are_allowed(tmp_path):
    text = VALID.replace("max_steps = 10", "max_grad_norm = inf")
    assert load(write(tmp_path, text)).training.max_grad_norm == float("inf")


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("adapter", "alpha"),
        ("adapter", "dropout"),
        ("training", "learning_rate"),
        ("training", "min_lr_ratio"),
        ("training", "weight_decay"),
        ("training", "max_grad_norm"),
    ],
)
def test_every_number_field_takes_a_whole_number_and_holds_a_float(tmp_path, section, key):
    value = 0 if key == "dropout" else 1
    number = getattr(getattr(load(write(tmp_path, VALID), [f"{section}.{key}={value}"]), section), key)
    assert number == value and isinstance(number, float)


def test_invalid_toml_names_the_line(tmp_path):
    (problem,) = problems(write(tmp_path, VALID.replace("r = 8", "r == 8")))
    assert (problem.code, problem.line) == ("QT002", 9) and problem.source_line == "r == 8"


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("training.max_steps=3", lambda r: r.training.max_steps, 3),
        ("adapter.targets=all-linear", lambda r: r.adapter.targets, "all-linear"),
        ('adapter.targets=["k_proj"]', lambda r: r.adapter.targets, ("k_proj",)),
        ("data.train[0].limit=5", lambda r: r.data.train[0].limit, 5),
        ("data.train.0.limit=5", lambda r: r.data.train[0].limit, 5),
        ("training.learning_rate=1", lambda r: r.training.learning_rate, 1.0),
        ('training.optimizer="adamw_8bit"', lambda r: r.training.optimizer, "adamw_8bit"),
        ("training.optimizer=adamw_8bit", lambda r: r.training.optimizer, "adamw_8bit"),
        ("quantization.weight_dtype=int8", lambda r: r.quantization.options.weight_dtype, "int8"),
        (" training.max_steps =3", lambda r: r.training.max_steps, 3),
        ('data.eval=[{path = "x.csv", format = "chat"}]', lambda r: r.data.eval[0].path, "x.csv"),
        ("evaluation.at_end=false", lambda r: r.evaluation.at_end, False),
        ("output.dir=/tmp/a b", lambda r: r.output.dir, "/tmp/a b"),
    ],
)
def test_set_overrides_a_key(tmp_path, override, get, value):
    assert get(load(write(tmp_path, VALID), [override])) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps=3.5", "expected a whole number, found 3.5"),
        ("adapter.r=0", "must be greater than 0"),
        ("adapter.alpa=3", 'unknown key "alpa"'),
        ("training.max_steps=many", 'expected a whole number, found "many"'),
        ("adapter.use_dora=1", "expected true or false, found 1"),
        ('adapter.targets=["q_proj", 7]', "expected a string, found 7"),
        ('data.train=[{path = "x.csv"}]', 'lacks the key "format"'),
        ("adaptr.r=3", 'unknown section "adaptr"'),
        ("quantization.blok_size=64", 'unknown key "blok_size" for backend "toy"'),
        ("quantization.backend=toyy", 'found "toyy"'),
        ("quantization.block_size=48", "expected one of 32, 64"),
        ('adapter.targets=["q_proj"', 'expected a TOML value, found "[\\"q_proj\\""'),
        ("adapter.targets={", "expected a TOML value"),
        ("adapter.targets='q", "expected a TOML value"),
        ("adapter", "expected section.key=value"),
        ("adapter.r", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("adapter..r=3", "expected section.key=value"),
        ("[adapter]r=3", "expected section.key=value"),
        ("data.train[0=3", "expected section.key=value"),
        ("data.train[²].limit=3", "expected section.key=value"),
        ("data.train[-1].limit=3", "expected section.key=value"),
        ("adapter.r=3\nalpha = 4", 'expected a whole number, found "3\\nalpha = 4"'),
        ("adapter.r=" + "[" * 3000, "expected a TOML value"),
        ("model=3", "expected section.key=value"),
        ("adapter.r.x=3", "is no place in this recipe"),
        ("data.train.limit=3", "is no place in this recipe"),
        ("data.eval[0].limit=3", "is no place in this recipe"),
        ("data.train[4].limit=3", "is no place in this recipe"),
    ],
)
def test_a_wrong_override_is_named_as_one(tmp_path, override, message):
    (problem,) = problems(write(tmp_path, VALID), [override])
    assert message in problem.message
    assert problem.origin == f"--set {override}" and problem.line is None


@pytest.mark.parametrize(
    ("section", "held", "override"),
    [
        ("training", "max_steps = 10", "epochs=1.5"),
        ("training", "warmup_steps = 2", "warmup_ratio=0.1"),
        ("training", "warmup_ratio = 0.1", "warmup_steps=2"),
        ("checkpoint", "per_epoch = 2", "every_steps=5"),
        ("checkpoint", "every_steps = 5", "per_epoch=2"),
    ],
)
def test_an_override_replaces_what_the_file_says_in_place_of_it(tmp_path, section, held, override):
    key, value = override.split("=")
    text = VALID if "max_steps" in held else VALID + (f"[{section}]\n" * (section != "training")) + f"{held}\n"
    made = getattr(load(write(tmp_path, text), [f"{section}.{override}"]), section)
    assert getattr(made, key) == float(value) and getattr(made, held.split()[0]) is None


def test_two_overrides_that_say_the_same_contradict_each_other(tmp_path):
    overrides = ["training.epochs=1", "training.max_steps=5"]
    for order in (overrides, overrides[::-1]):
        (problem,) = problems(write(tmp_path, VALID), order)
        assert problem.code == "QT020" and problem.origin == "--set training.epochs=1"


def test_the_last_of_two_overrides_of_one_key_counts(tmp_path):
    assert load(write(tmp_path, VALID), ["adapter.r=3", "adapter.r=4"]).adapter.r == 4


def test_problems_of_overrides_and_of_the_file_are_reported_together(tmp_path):
    path = write(tmp_path, VALID.replace("r = 8", "r = 0"))
    found = problems(path, ["training.max_steps=0", "nonsense"])
    assert {(p.origin, p.line) for p in found} == {
        ("--set nonsense", None),
        ("--set training.max_steps=0", None),
        (str(path), 9),
    }


def test_a_byte_order_mark_and_windows_line_ends_leave_the_places_as_they_are(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xef\xbb\xbf" + VALID.replace("[model]", "modle = 1\n[model]").replace("\n", "\r\n").encode())
    (problem,) = problems(path)
    assert (problem.line, problem.column, problem.source_line, problem.underline) == (1, 1, "modle = 1", (1, 5))


def test_what_is_underlined_is_the_key_or_the_value_that_is_wrong(tmp_path):
    text = VALID.replace("r = 8", "r   =   -80").replace('format = "chat"', 'formt  = "chat"')
    wrong, unknown = problems(write(tmp_path, text))
    assert wrong.where == "adapter.r" and (wrong.column, wrong.underline) == (1, (9, 3))
    assert unknown.where == "data.train[0].formt" and unknown.underline == (1, 5)


def test_what_is_missing_is_shown_at_its_table(tmp_path):
    (lacking,) = problems(write(tmp_path, VALID.replace('format = "chat"', "")))
    assert lacking.where == "data.train[0].format" and lacking.source_line == "[[data.train]]"


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("[adapter]", "[Adapter]", "Adapter"),
        ("[model]", "[modle]", "modle"),
        ("base =", "bas =", "model.bas"),
        ("[[data.train]]", "[[data.trian]]", "data.trian"),
        ("[[data.train]]", "[[dta.train]]", "dta"),
    ],
)
def test_a_misspelt_name_is_one_problem_and_not_a_missing_one_as_well(tmp_path, old, new, where):
    (problem,) = problems(write(tmp_path, VALID.replace(old, new)))
    assert problem.where == where and problem.hint.startswith("did you mean")


def test_a_finding_about_two_keys_shows_both_places_wherever_they_were_set(tmp_path):
    finding = Finding(
        code="QT020", path=("training", "max_steps"), message="", other=("adapter", "r"), other_label="and this says 8"
    )
    path = write(tmp_path, VALID)
    (problem,) = load_recipe(path, options_of=options_of).error([finding]).problems
    (other,) = problem.related
    assert (problem.line, other.line, other.source_line, other.label) == (17, 9, "r = 8", "and this says 8")
    overridden = load_recipe(path, options_of=options_of, overrides=["adapter.r=4"]).error([finding])
    assert overridden.problems[0].related == (Place(origin="--set adapter.r=4", label="and this says 8"),)
