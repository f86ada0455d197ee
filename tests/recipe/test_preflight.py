"""The files a recipe names, looked at before anything is loaded."""

import pytest
from recipe_support import VALID, options_of, write

from quantune.backends.checkpoints import format_problem
from quantune.backends.registry import options_of as registry_options_of
from quantune.cli.recipes import open_recipe
from quantune.errors import RecipeError
from quantune.recipe.load import load_recipe
from quantune.recipe.preflight import check_files
from quantune.recipe.resolve import with_absolute_paths


def check(tmp_path, text, overrides=()):
    path = write(tmp_path, text)
    loaded = load_recipe(path, options_of=options_of, overrides=overrides)
    check_files(loaded, with_absolute_paths(loaded.recipe, path))


def test_files_that_are_there_are_fine(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    check(tmp_path, VALID)


def test_every_file_problem_is_reported_at_once_with_its_line(tmp_path):
    (tmp_path / "empty.csv").touch()
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "no_config").mkdir()
    text = VALID.replace('"builtin:mini"', '"./no_config"\nchat_template = "gone.jinja"')
    for name in ("empty.csv", "folder.json"):
        text += f'[[data.eval]]\npath = "{name}"\nformat = "chat"\n'
    with pytest.raises(RecipeError) as caught:
        check(tmp_path, text)
    found = [(problem.line, problem.message) for problem in caught.value.problems]
    expected = [
        (2, "found no config.json"),
        (3, "there is no file"),
        (14, "there is no file"),
        (21, "the file is empty"),
        (24, "found a folder"),
    ]
    for (line, message), (expected_line, part) in zip(found, expected, strict=True):
        assert line == expected_line and part in message


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("r = 8", "alpa = 8", ["adapter.alpa", "data.train[0].path"]),
        ("r = 8", "r = 0", ["adapter.r", "data.train[0].path"]),
        ("max_steps = 10", "max_steps = 10\nepochs = 1", ["data.train[0].path", "training.epochs"]),
        ('format = "chat"', 'format = "chatt"', ["data.train[0].path", "data.train[0].format"]),
        ('format = "chat"', "format = 3", ["data.train[0].format"]),
        ("path =", "pth =", ["data.train[0].pth"]),
        ("train.jsonl", "train.txt", ["data.train[0].path"]),
        ('[model]\nbase = "builtin:mini"\n', "", ["model", "data.train[0].path"]),
    ],
)
def test_missing_files_are_reported_with_what_else_is_wrong(tmp_path, old, new, where):
    path = write(tmp_path, VALID.replace('backend = "toy"', 'backend = "bnb"').replace(old, new))
    with pytest.raises(RecipeError) as caught:
        open_recipe(path)
    assert [problem.where for problem in caught.value.problems] == where


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        (["config.json"], "found no weights", None),
        (["config.json", "pytorch_model.bin"], "found only pickled weights", "save_pretrained"),
    ],
)
def test_a_base_without_safetensors_is_refused(tmp_path, files, message, hint):
    (tmp_path / "train.jsonl").write_text("{}")
    (tmp_path / "model").mkdir()
    for name in files:
        (tmp_path / "model" / name).write_text("{}")
    with pytest.raises(RecipeError) as caught:
        check(tmp_path, VALID.replace("builtin:mini", "model"))
    (problem,) = caught.value.problems
    assert message in problem.message and (hint is None or hint in problem.hint)


@pytest.mark.parametrize(
    ("base", "message"), [("builtin:maxi", "no built-in model"), ("../nowhere", "there is no folder")]
)
def test_a_base_that_does_not_exist_is_refused(tmp_path, base, message):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(RecipeError, match=message):
        check(tmp_path, VALID.replace("builtin:mini", base))


def test_a_hub_id_and_a_hub_dataset_are_not_looked_for_on_disk(tmp_path):
    check(tmp_path, VALID.replace("builtin:mini", "org/model").replace('path = "train.jsonl"', 'dataset = "org/data"'))


def test_a_whole_model_folder_is_fine(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text("{}")
    check(tmp_path, VALID.replace("builtin:mini", "./model"))


def test_a_tokenizer_folder_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    text = VALID.replace('base = "builtin:mini"', 'base = "builtin:mini"\ntokenizer = "./gone"')
    with pytest.raises(RecipeError) as caught:
        check(tmp_path, text)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where, problem.line) == ("QT030", "model.tokenizer", 3)
    assert problem.message == f"there is no folder {tmp_path / 'gone'}"


def test_a_home_folder_of_nobody_is_a_folder_that_is_not_there(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(RecipeError, match="there is no folder"):
        check(tmp_path, VALID.replace("builtin:mini", "~no-such-user/model"))


def test_a_missing_file_that_an_override_names_is_a_problem_of_the_override(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(RecipeError) as caught:
        check(tmp_path, VALID, ["data.train[0].path=gone.jsonl"])
    (problem,) = caught.value.problems
    assert (problem.origin, problem.line) == ("--set data.train[0].path=gone.jsonl", None)


def test_a_data_file_of_nothing_but_whitespace_is_empty(tmp_path):
    (tmp_path / "train.jsonl").write_text(" \n" * 50_000)
    with pytest.raises(RecipeError, match="the file is empty"):
        check(tmp_path, VALID)


def test_a_name_that_the_file_system_refuses_is_a_problem_and_no_crash(tmp_path):
    text = VALID.replace("builtin:mini", "./" + "m" * 300).replace("train.jsonl", "t" * 300 + ".jsonl")
    with pytest.raises(RecipeError) as caught:
        check(tmp_path, text)
    assert [(p.where, "can't be read" in p.message) for p in caught.value.problems] == [
        ("model.base", True),
        ("data.train[0].path", True),
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "there is no folder"),
        ([], "found no adapter_config.json"),
        (["adapter_config.json"], "found no adapter_model.safetensors"),
        (["adapter_config.json", "adapter_model.bin"], "found only a pickled adapter"),
    ],
)
def test_an_adapter_to_start_from_is_looked_at_beside_the_recipe(tmp_path, files, message):
    (tmp_path / "train.jsonl").write_text("{}")
    if files is not None:
        (tmp_path / "before").mkdir()
    for name in files or ():
        (tmp_path / "before" / name).write_text("{}")
    with pytest.raises(RecipeError) as caught:
        check(tmp_path, VALID.replace("r = 8", 'r = 8\nstart_from = "before"'))
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("QT030", "adapter.start_from") and message in problem.message
    assert str(tmp_path / "before") in problem.message
    path = tmp_path / "recipe.toml"
    loaded = load_recipe(path, options_of=options_of)
    check_files(loaded, with_absolute_paths(loaded.recipe, path), start=False)  # a resumed run does without it


def quantized_base(folder, config):
    (folder / "train.jsonl").write_text("{}")
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_text("")
    (folder / "model" / "config.json").write_text(config)


def check_format(tmp_path, text):
    path = write(tmp_path, text)
    loaded = load_recipe(path, options_of=registry_options_of)
    check_files(loaded, with_absolute_paths(loaded.recipe, path), format_problem=format_problem)


AWQ = '{"quantization_config": {"quant_method": "awq"}}'
FP8 = '{"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}'
BNB = VALID.replace('"toy"', '"bnb"').replace("builtin:mini", "./model")
NO_TABLE = BNB.replace('[quantization]\nbackend = "bnb"\nweight_dtype = "nf4"\n', "")


@pytest.mark.parametrize(
    ("config", "text", "code", "where", "line", "related"),
    [
        (AWQ, BNB, "QT122", "quantization.backend", 5, [2]),
        (FP8, BNB, "QT122", "quantization.backend", 5, [2]),
        (AWQ, NO_TABLE, "QT123", "model.base", 2, []),
        (FP8, 'load_in_4bit = "true"\n' + NO_TABLE, "QT122", "load_in_4bit", 1, [3]),
        (FP8, NO_TABLE.replace("r = 8", 'r = 8\ninit = "pissa"'), "QT125", "adapter.init", 7, [2]),
        ("[]", NO_TABLE, "QT030", "model.base", 2, []),
        ("{", NO_TABLE, "QT030", "model.base", 2, []),
    ],
)
def test_a_base_that_is_already_quantized_is_held_against_the_recipe(
    tmp_path, config, text, code, where, line, related
):
    quantized_base(tmp_path, config)
    with pytest.raises(RecipeError) as caught:
        check_format(tmp_path, text)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where, problem.line) == (code, where, line)
    assert [place.line for place in problem.related] == related


@pytest.mark.parametrize(
    ("text", "way_out"),
    [
        (BNB, "drop [quantization]"),
        (NO_TABLE.replace("[model]", "[model]\nload_in_4bit = true"), "drop [model] load_in_4bit"),
        ("load_in_4bit = true\n" + BNB, "drop [quantization] and load_in_4bit"),
        (
            NO_TABLE.replace("r = 8", 'type = "qlora"').replace("[model]", "[model]\nload_in_4bit = true"),
            'drop [model] load_in_4bit and write [adapter] type = "lora"',
        ),
    ],
)
def test_the_way_out_names_the_keys_that_are_there(tmp_path, text, way_out):
    quantized_base(tmp_path, FP8)
    with pytest.raises(RecipeError) as caught:
        check_format(tmp_path, text)
    (problem,) = caught.value.problems
    assert problem.hint == f'{way_out} to take it over as it is (backend = "fp8"), or choose the unquantized base'


TYPO = "max_steps = 10", "max_stepps = 10"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (BNB, [("QT122", "quantization.backend"), ("QT012", "training.max_stepps")]),
        (BNB.replace("[adapter]", "[adaptr]"), [("QT122", "quantization.backend"), ("QT012", "training.max_stepps")]),
        (BNB.replace('"nf4"', '"nf5"'), [("QT013", "quantization.weight_dtype"), ("QT012", "training.max_stepps")]),
        (
            'load_in_4bit = "maybe"\n' + NO_TABLE,
            [("QT013", "load_in_4bit"), ("QT012", "training.max_stepps")],
        ),
        (NO_TABLE, [("QT123", "model.base"), ("QT012", "training.max_stepps")]),
    ],
)
def test_a_base_that_is_already_quantized_is_reported_with_what_else_is_wrong(tmp_path, text, found):
    quantized_base(tmp_path, AWQ)
    with pytest.raises(RecipeError) as caught:
        open_recipe(write(tmp_path, text.replace(*TYPO)))
    assert [(p.code, p.where) for p in caught.value.problems if p.code != "QT011"] == found


@pytest.mark.parametrize("config", [FP8, '{"quantization_config": null}', "{}"])
def test_a_base_whose_format_is_taken_over_or_that_has_none_is_fine_without_a_table(tmp_path, config):
    quantized_base(tmp_path, config)
    check_format(tmp_path, NO_TABLE)


def test_the_quantization_of_a_text_model_within_another_is_found(tmp_path):
    quantized_base(tmp_path, f'{{"text_config": {AWQ}}}')
    with pytest.raises(RecipeError, match=r"already quantized \(awq\)"):
        check_format(tmp_path, NO_TABLE)


def test_a_folder_has_no_revision(tmp_path):
    quantized_base(tmp_path, "{}")
    with pytest.raises(RecipeError) as caught:
        check_format(tmp_path, BNB.replace('"./model"', '"./model"\nrevision = "main"'))
    (problem,) = caught.value.problems
    assert (problem.code, problem.where, problem.line) == ("QT021", "model.revision", 3)
