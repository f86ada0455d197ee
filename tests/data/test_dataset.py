"""From rows to samples: what each format needs, and what becomes of every row."""

import json
import re

import pytest
from data_files import chat, dataset, source, write

from quantune.data.dataset import build
from quantune.data.formats import read_prompt
from quantune.data.tokenization import prompt_ids
from quantune.errors import DataError
from quantune.recipe.schema import DataConfig, SourceConfig


@pytest.mark.parametrize(
    ("row", "more", "message"),
    [
        ({"messags": []}, {}, 'd.jsonl:1: expected a column "messages", the columns are "messags"'),
        ({"messages": []}, {}, "found an empty list"),
        ({"messages": [{"role": "user"}]}, {}, 'message 0 to be an object with "role" and "content"'),
        ({"messages": [{"role": "bot", "content": "x"}]}, {}, "one of system, user, assistant, tool, found 'bot'"),
        ({"messages": [{"role": "user", "content": 3}]}, {}, "content of message 0 to be text, found a number"),
        ({"prompt": "x"}, {"format": "instruct"}, 'expected a column "response"'),
        ({"prompt": "x", "response": 3}, {"format": "instruct"}, 'text in column "response", found a number'),
        ({"response": "x"}, {"format": "instruct", "template": "{question}"}, 'expected a column "question"'),
        ({"messages": "hi"}, {}, "expected a list of messages, found text"),
        (
            {"messages": [{"role": "user", "content": "\ud83d"}]},
            {},
            "d.jsonl:1: expected text, found half of a character",
        ),
        ({"response": "x"}, {"format": "instruct", "template": "{} is"}, "d.jsonl:1: the template can't be filled in"),
        ({"txt": "x"}, {"format": "completion"}, 'expected a column "text"'),
    ],
)
def test_a_row_that_does_not_hold_what_its_format_needs_says_so(tmp_path, tokenizer, row, more, message):
    with pytest.raises(DataError, match=re.escape(message)):
        dataset(tmp_path, tokenizer, [row], **more)


def test_text_parts_of_a_message_are_joined(tmp_path, tokenizer):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": parts}]}
    assert dataset(tmp_path, tokenizer, [row]).samples[0].reference == "ab"


def test_what_else_a_message_holds_reaches_the_template(tmp_path, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.name }}: {{ m.content }}<end>{% endfor %}"
    row = {"messages": [{"role": "user", "content": "q", "name": "Ann", "tool_calls": None}]}
    made = dataset(tmp_path, tokenizer, [row], loss_on="all")
    assert tokenizer.decode(made.samples[0].input_ids) == "Ann: q<end>"


def test_a_template_takes_numbers_and_writes_nothing_for_null(tmp_path, tokenizer):
    row = {"a": 3, "b": None, "response": "r"}
    made = dataset(tmp_path, tokenizer, [row], format="instruct", template="{a}{b}{{}}=")
    assert tokenizer.decode(made.samples[0].input_ids) == "3{}=r<end>"


def test_instruct_without_a_template_is_a_chat_and_with_one_is_text(tmp_path, tokenizer):
    row = {"prompt": "q", "response": "r", "extra": "e"}
    as_chat = dataset(tmp_path, tokenizer, [row], format="instruct").samples[0]
    assert tokenizer.decode(as_chat.input_ids) == "<bos><user>\nq<end>\n<assistant>\nr<end>\n"
    as_text = dataset(tmp_path, tokenizer, [row], format="instruct", template="{extra}: {prompt}=").samples[0]
    assert tokenizer.decode(as_text.input_ids) == "e: q=r<end>"


ROWS = [chat("q", "a"), chat("q", "a" * 50), {"messages": [{"role": "user", "content": "nobody answers"}]}]


def test_dropped_samples_are_counted(tmp_path, tokenizer):
    made = dataset(tmp_path, tokenizer, ROWS, {"max_length": 30})
    counts = made.counts
    assert (counts.rows, counts.kept, counts.dropped_overlong, counts.zero_target) == (3, 1, 1, 1)
    assert counts.tokens == len(made.samples[0].input_ids) and counts.target_tokens == 2


def test_truncated_samples_keep_their_start_and_are_counted(tmp_path, tokenizer):
    made = dataset(tmp_path, tokenizer, ROWS, {"max_length": 30, "overlong": "truncate"})
    assert [len(sample.input_ids) for sample in made.samples] == [11, 30]
    assert made.counts.truncated == 1


def test_an_overlong_sample_can_be_an_error(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"d.jsonl:2: 60 tokens, more than max_length = 30.*truncate\"$"):
        dataset(tmp_path, tokenizer, ROWS, {"max_length": 30, "overlong": "error"})
    with pytest.raises(DataError, match='"drop", "truncate" or "split"$'):
        dataset(tmp_path, tokenizer, [{"text": "a" * 50}], {"max_length": 30, "overlong": "error"}, "completion")


@pytest.mark.parametrize(
    ("rows", "config", "loss_on", "message"),
    [
        (ROWS[2:], {}, "assistant", "none of the 1 rows can be used: 1 have no target token"),
        (ROWS[2:], {}, "assistant", "check that the rows hold assistant messages, or"),
        (ROWS[:2], {}, ("system", "tool"), "check that the rows hold system or tool messages, or"),
        (ROWS[1:2], {"max_length": 20}, "assistant", "1 are longer than max_length = 20"),
        (
            ROWS[1:2],
            {"max_length": 4, "overlong": "truncate"},
            "assistant",
            "1 have no target token (1 were cut to max_length = 4)",
        ),
        ([], {}, "assistant", "d.jsonl: expected at least one row, found none"),
    ],
)
def test_a_dataset_with_nothing_to_learn_is_an_error_with_the_counts(
    tmp_path, tokenizer, rows, config, loss_on, message
):
    with pytest.raises(DataError, match=re.escape(message)):
        dataset(tmp_path, tokenizer, rows, config, loss_on=loss_on)


def test_a_token_beyond_the_embedding_is_named(tmp_path, tokenizer):
    path = write(tmp_path / "d.jsonl", json.dumps(chat("q", "z")))
    found = source(path, "chat")
    with pytest.raises(DataError, match=r"d.jsonl:1: the token .* has the id \d+, beyond the model's embedding of 50"):
        build([found], DataConfig(train=(found,)), tokenizer, vocabulary_size=50)


def test_the_fingerprint_depends_on_tokens_and_targets(tmp_path, tokenizer):
    prints = {
        dataset(tmp_path, tokenizer, rows, **more).fingerprint()
        for rows, more in [(ROWS[:1], {}), (ROWS[:2], {}), (ROWS[:1], {"loss_on": "all"})]
    }
    assert len(prints) == 3
    assert dataset(tmp_path, tokenizer, ROWS[:1]).fingerprint() in prints


def test_a_source_that_contributes_nothing_is_a_warning_while_others_do(tmp_path, tokenizer):
    class Heard(list):
        warning = list.append

    sources = []
    for name, row in [("good.jsonl", ROWS[0]), ("idle.jsonl", ROWS[2])]:
        sources.append(source(write(tmp_path / name, json.dumps(row)), "chat"))
    heard = Heard()
    made = build(sources, DataConfig(train=tuple(sources)), tokenizer, observer=heard)
    assert heard == ["idle.jsonl: none of its 1 rows can be used"]
    assert made.counts.kept == 1 and [sample.where for sample in made.samples] == ["good.jsonl:1"]


def test_no_source_is_an_error(tokenizer, tmp_path):
    config = DataConfig(train=(source(tmp_path / "unused.jsonl"),))
    with pytest.raises(DataError, match="none of the 0 rows can be used: there are none"):
        build([], config, tokenizer)


@pytest.mark.parametrize(
    ("source", "text", "expected"),
    [
        ({"format": "chat"}, "q", "<bos><user>\nq<end>\n<assistant>\n"),
        ({"format": "instruct"}, "q", "<bos><user>\nq<end>\n<assistant>\n"),
        ({"format": "instruct", "template": "Q: {prompt}\nA: "}, "q", "Q: q\nA: "),
        ({"format": "instruct", "template": "{a}+{b}="}, '{"a": 1, "b": 2}', "1+2="),
        ({"format": "completion"}, "once", "once"),
    ],
)
def test_a_prompt_is_asked_in_the_form_of_the_training_data(tokenizer, source, text, expected):
    prompt = read_prompt(text, SourceConfig(path="x.jsonl", **source))
    assert tokenizer.decode(prompt_ids(tokenizer, prompt)) == expected


def test_a_template_of_several_columns_asks_for_all_of_them():
    with pytest.raises(DataError, match="expected a JSON object with a, b"):
        read_prompt("1", SourceConfig(path="x.jsonl", format="instruct", template="{a}+{b}="))
