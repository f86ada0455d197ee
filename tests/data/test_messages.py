"""Messages under other names, and Alpaca's and instruct's prompts with and without an input."""

import re

import pytest
from data_files import dataset

from quantune.data.formats import ALPACA, ALPACA_NO_INPUT, read_prompt
from quantune.data.tokenization import prompt_ids
from quantune.errors import DataError
from quantune.recipe.schema import SourceConfig

SHAREGPT = {
    "message_keys": {"role": "from", "content": "value"},
    "roles": {"user": ("human",), "assistant": ("gpt", "bot")},
}


def text(tmp_path, tokenizer, row, **more):
    (sample,) = dataset(tmp_path, tokenizer, [row], **more).samples
    return tokenizer.decode(sample.input_ids)


def test_messages_under_other_names_are_the_same_conversation(tmp_path, tokenizer):
    ours = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    theirs = {"messages": [{"from": "human", "value": "q"}, {"from": "bot", "value": "a"}]}
    assert text(tmp_path, tokenizer, theirs, **SHAREGPT) == text(tmp_path, tokenizer, ours)
    own_names = {"messages": [{"from": "user", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert text(tmp_path, tokenizer, own_names, **SHAREGPT) == text(tmp_path, tokenizer, ours)


def test_other_keys_can_be_renamed_for_the_template_and_the_rest_reaches_it(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.name }} {{ m.mood }}: {{ m.content }}{% endfor %}"
    )
    row = {"messages": [{"role": "user", "content": "q", "who": "Ann", "mood": "curious"}]}
    found = text(tmp_path, tokenizer, row, message_keys={"name": "who"}, loss_on="all")
    assert found == "user Ann curious: q"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"from": "human"}, 'message 0 to be an object with "from" and "value", found "from"'),
        ({"role": "user", "content": "q"}, 'with "from" and "value", found "role", "content"'),
        (
            {"from": "narrator", "value": "q"},
            "one of system, user (human), assistant (gpt) (bot), tool, found 'narrator'; say which one it is, "
            'e.g. roles = {assistant = ["narrator"]}',
        ),
        ({"from": "Human", "value": "q"}, 'e.g. roles = {user = ["Human"]}'),
        ({"from": None, "value": "q"}, "found None"),
        ({"from": "human", "value": None}, "content of message 0 to be text, found null"),
    ],
)
def test_a_message_that_lacks_the_names_says_what_there_is(tmp_path, tokenizer, message, expected):
    with pytest.raises(DataError, match=re.escape(expected)):
        dataset(tmp_path, tokenizer, [{"messages": [message]}], **SHAREGPT)


def test_a_system_message_can_be_dropped(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    system = {"role": "system", "content": "s"}
    dropped = text(tmp_path, tokenizer, {"messages": [system, *chat]}, drop_system_message=True)
    assert dropped == text(tmp_path, tokenizer, {"messages": chat})
    assert "s<end>" in text(tmp_path, tokenizer, {"messages": [system, *chat]})
    later = {"messages": [*chat, system, *chat]}  # no beginning: somebody meant it to be there
    assert text(tmp_path, tokenizer, later, drop_system_message=True) == text(tmp_path, tokenizer, later)
    with pytest.raises(DataError, match="d.jsonl:1: expected messages beside the system message"):
        dataset(tmp_path, tokenizer, [{"messages": [system]}], drop_system_message=True)


PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nadd\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\nadd\n\n### Input:\n1 {2}\n\n### Response:\n"
)


@pytest.mark.parametrize(
    ("more", "prompt"),
    [({}, PROMPT), ({"input": ""}, PROMPT), ({"input": None}, PROMPT), ({"input": "1 {2}"}, PROMPT_WITH_INPUT)],
)
def test_alpaca_has_two_prompts_and_learns_the_answer_and_its_end(tmp_path, tokenizer, more, prompt):
    row = {"instruction": "add", "output": "3", **more}
    (sample,) = dataset(tmp_path, tokenizer, [row], format="alpaca").samples
    assert tokenizer.decode(sample.input_ids) == f"{prompt}3<end>"
    assert tokenizer.decode(sample.input_ids[sample.is_target]) == "3<end>"
    assert sample.prompt_length == len(sample.input_ids) - 2 and sample.reference == "3"


@pytest.mark.parametrize("row", [{"output": "3"}, {"instruction": "add", "response": "3"}])
def test_alpaca_names_the_column_that_is_missing(tmp_path, tokenizer, row):
    missing = "output" if "response" in row else "instruction"
    with pytest.raises(DataError, match=f'd.jsonl:1: expected a column "{missing}"'):
        dataset(tmp_path, tokenizer, [row], format="alpaca")


WITH_INPUT = {"format": "instruct", "input_column": "ctx", "template": "{ctx}|{q}=", "template_no_input": "{q}="}


@pytest.mark.parametrize(
    ("more", "expected"), [({"ctx": "c"}, "c|a=r<end>"), ({"ctx": ""}, "a=r<end>"), ({}, "a=r<end>")]
)
def test_instruct_takes_the_other_template_where_there_is_no_input(tmp_path, tokenizer, more, expected):
    assert text(tmp_path, tokenizer, {"q": "a", "response": "r", **more}, **WITH_INPUT) == expected


@pytest.mark.parametrize(
    ("source", "asked", "expected"),
    [
        ({"format": "alpaca"}, "add", ALPACA_NO_INPUT.format(instruction="add")),
        ({"format": "alpaca"}, '{"instruction": "add"}', ALPACA_NO_INPUT.format(instruction="add")),
        ({"format": "alpaca"}, '{"instruction": "add", "input": "1"}', ALPACA.format(instruction="add", input="1")),
        ({"format": "alpaca"}, '{"a": 1}', ALPACA_NO_INPUT.format(instruction='{"a": 1}')),
        (WITH_INPUT, "a", "a="),
        (WITH_INPUT, '{"q": "a", "ctx": "c"}', "c|a="),
    ],
)
def test_a_prompt_takes_the_form_that_its_input_asks_for(tokenizer, source, asked, expected):
    prompt = read_prompt(asked, SourceConfig(path="x.jsonl", **source))
    assert tokenizer.decode(prompt_ids(tokenizer, prompt)) == expected
