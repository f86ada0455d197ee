"""What the keys of a source and of `[data]` say together, and chat templates by name."""

import re
from pathlib import Path

import pytest
from recipe_support import VALID, load, options_of, problems, write

from quantune.errors import RecipeError
from quantune.recipe.chat_templates import NAMES
from quantune.recipe.load import load_recipe
from quantune.recipe.preflight import check_files
from quantune.recipe.resolve import to_toml, with_absolute_paths


def source(keys, format="chat", place='path = "x.csv"'):
    return f'[[data.train]]\n{place}\nformat = "{format}"\n{keys}\n'


HUB = 'dataset = "a/b"'


@pytest.mark.parametrize(
    ("text", "key", "code", "message"),
    [
        (source('data_files = ["a.csv"]'), "data_files", "QT021", "belongs to a dataset of the hub"),
        (source('split = "train[:20"'), "split", "QT014", "expected a split such as train[:20%]"),
        (source('split = "train[:20]+train[30:]"'), "split", "QT014", "expected a split such as train[:20%]"),
        (source('split = "train[:20"', place=HUB), "split", "QT014", "expected a split such as train[:20%]"),
        (source('split = "train[:20%]+"', place=HUB), "split", "QT014", "expected a split such as train[:20%]"),
        (source('split = "train[:200%]"', place=HUB), "split", "QT014", "expected at most 100%"),
        (source('split = "test[:20]"'), "split", "QT021", "a file has one split, which is called train"),
        (source('message_keys = {role = "from"}', "instruct"), "message_keys", "QT021", 'for format = "instruct"'),
        (source('roles = {user = ["human"]}', "completion"), "roles", "QT021", 'no meaning for format = "completion"'),
        (source("drop_system_message = true", "alpaca"), "drop_system_message", "QT021", 'for format = "alpaca"'),
        (source('train_on_eos = "all"', "instruct"), "train_on_eos", "QT021", 'no meaning for format = "instruct"'),
        (source('prompt_column = "q"', "alpaca"), "prompt_column", "QT021", 'no meaning for format = "alpaca"'),
        (source('input_column = "c"', "alpaca"), "input_column", "QT021", 'no meaning for format = "alpaca"'),
        (source('template_no_input = "{a}"'), "template_no_input", "QT021", 'no meaning for format = "chat"'),
        (
            source('template = "{a}"\ntemplate_no_input = "a"\ninput_column = "b"', "instruct"),
            "template_no_input",
            "QT014",
            "at least one column in braces",
        ),
        (
            source('prompt_column = "q"\ntemplate = "{a}"', "instruct"),
            "prompt_column",
            "QT021",
            "template, which names its columns itself",
        ),
        (source('template = "{a}"\ninput_column = "b"', "instruct"), "input_column", "QT022", "no template_no_input"),
        (
            source('template = "{a}"\ntemplate_no_input = "{a}"', "instruct"),
            "template_no_input",
            "QT022",
            "there is no input_column",
        ),
        (
            source('template_no_input = "{a}"\ninput_column = "b"', "instruct"),
            "input_column",
            "QT022",
            "there is no template",
        ),
        (source('roles = {bot = ["gpt"]}'), "roles", "QT014", 'system, user, assistant, tool, found "bot"'),
        (
            source('roles = {user = ["x"], tool = ["x"]}'),
            "roles",
            "QT020",
            '"x" is the name of two roles, user and tool',
        ),
        (source('roles = {user = ["assistant"]}'), "roles", "QT020", '"assistant" is the name of two roles'),
        (source('message_keys = {role = "a", content = "a"}'), "message_keys", "QT020", 'read from "a"'),
        (source('message_keys = {content = "role"}'), "message_keys", "QT020", 'read from "role"'),
        (source('message_keys = {role = "content"}'), "message_keys", "QT020", 'read from "content"'),
        (source('loss_on = ["system"]\ndrop_system_message = true'), "loss_on", "QT020", "leaves it out"),
        (source('loss_on = "all"\ntrain_on_eos = "none"'), "train_on_eos", "QT021", "trains on every token"),
        (source("loss_on = []"), "loss_on", "QT014", "expected at least one role"),
        (source('loss_on = ["asistant"]'), "loss_on", "QT014", 'found "asistant"'),
        (source('loss_on = ["all"]'), "loss_on", "QT014", 'found "all"'),
        (source('loss_on = ["tool"]', "instruct"), "loss_on", "QT014", 'among user, assistant, found "tool"'),
        (source('loss_on = ["user"]', "completion"), "loss_on", "QT021", "completion has no roles"),
    ],
)
def test_keys_of_a_source_that_do_not_go_together_are_named(tmp_path, text, key, code, message):
    (problem,) = problems(write(tmp_path, VALID + text))
    assert (problem.where, problem.code) == (f"data.train[1].{key}", code)
    assert message in problem.message


@pytest.mark.parametrize(
    "text",
    [
        source('split = "train[:20%]+test[5:]"\ndata_files = ["a.csv"]', place=HUB),
        source('split = "train[-10%:]"'),
        source('split = "train[:1_000] + train[10%:20%](pct1_dropremainder)"', place=HUB),
        source('message_keys = {role = "content", content = "role"}'),
        source('message_keys = {role = "from"}\nroles = {user = ["human", "user"], assistant = ["gpt"]}'),
        source('loss_on = ["assistant", "tool"]\ntrain_on_eos = "last"\ndrop_system_message = true'),
        source('loss_on = ["user", "assistant"]', "alpaca"),
        source('loss_on = "all"', "completion"),
        source('template = "{a}{b}"\ntemplate_no_input = "{a}"\ninput_column = "b"', "instruct"),
    ],
)
def test_keys_that_go_together_pass_and_survive_resolving(tmp_path, text):
    path = write(tmp_path, VALID + text)
    recipe = with_absolute_paths(load(path), path)
    assert load(write(tmp_path, to_toml(recipe))) == recipe


def data(keys, more=""):
    return VALID.replace("[[data.train]]", f"[data]\n{keys}\n[[data.train]]", 1) + more


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        (
            data("eval_size = 5", '[[data.eval]]\npath = "e.csv"\nformat = "chat"'),
            "data.eval_size",
            "both say what is evaluated on",
        ),
        (data('overlong = "split"'), "data.overlong", "splits completion text, and no source has any"),
        (
            data("eval_size = 5", "[evaluation]\nexact_match = true").replace('"chat"', '"completion"'),
            "evaluation.exact_match",
            "completion data has neither",
        ),
        (data("eval_size = 0"), "data.eval_size", "must be greater than 0"),
        (data("eval_size = 1.0"), "data.eval_size", "a fraction between 0 and 1"),
    ],
)
def test_keys_of_data_that_do_not_go_together_are_named(tmp_path, text, where, message):
    (problem,) = problems(write(tmp_path, text))
    assert problem.where == where and message in problem.message


def test_holding_out_is_something_to_evaluate_on(tmp_path):
    evaluation = "[evaluation]\nevery_steps = 2\nexact_match = true\n"
    assert load(write(tmp_path, data("eval_size = 0.1", evaluation))).data.eval_size == 0.1


def with_template(name):
    return VALID.replace('base = "builtin:mini"', f'base = "builtin:mini"\nchat_template = "{name}"')


def preflight(tmp_path, text):
    loaded = load_recipe(write(tmp_path, text), options_of=options_of, overrides=())
    recipe = with_absolute_paths(loaded.recipe, tmp_path / "recipe.toml")
    check_files(loaded, recipe, data=False)
    return recipe


def test_a_template_that_comes_with_quantune_is_known_by_name(tmp_path):
    assert {"alpaca", "chatml", "gemma", "llama3", "mistral", "phi3", "zephyr"} <= set(NAMES)
    assert preflight(tmp_path, with_template("llama3")).model.chat_template == "llama3"


def test_a_name_comes_before_a_file_and_a_path_is_a_file(tmp_path):
    (tmp_path / "llama3").write_text("own")
    assert preflight(tmp_path, with_template("llama3")).model.chat_template == "llama3"
    assert preflight(tmp_path, with_template("./llama3")).model.chat_template == str(tmp_path / "llama3")


@pytest.mark.parametrize(
    ("name", "hint"), [("lama3", 'did you mean "llama3"?'), ("own.jinja", "that come with quantune are alpaca, ")]
)
def test_a_template_that_is_neither_is_an_error_with_a_suggestion(tmp_path, name, hint):
    with pytest.raises(RecipeError) as caught:
        preflight(tmp_path, with_template(name))
    (problem,) = caught.value.problems
    assert (problem.code, problem.line) == ("QT030", 3)
    assert "there is no file" in problem.message and hint in problem.hint


PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_every_example_of_the_page_on_data_is_a_recipe(tmp_path, example):
    parts = {
        "[model]": '[model]\nbase = "builtin:mini"\n',
        "[adapter]": "[adapter]\n",
        "[data]": "",
        "[[data.train]]": '[[data.train]]\npath = "x.csv"\nformat = "chat"\n',
    }
    load(write(tmp_path, example + "".join(text for header, text in parts.items() if header not in example)))


def test_the_page_on_data_names_every_template():
    section = PAGE.split("## Chat templates")[1].split("```")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(NAMES)
