"""Sources, formats, counts, order and batches."""

import json
import re

import numpy as np
import pytest
import torch

from quantune.data.collate import collate, collate_prompts
from quantune.data.dataset import build
from quantune.data.order import step_indices
from quantune.data.sources import read_rows
from quantune.errors import DataError
from quantune.recipe.schema import DataConfig, SourceConfig


def source(path, format="completion", **more):
    return SourceConfig(path=str(path), format=format, **more)


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def values(path, **more):
    return [row.values for row in read_rows(source(path, **more))]


def test_every_kind_of_file_gives_the_same_rows_with_their_places(tmp_path):
    import datasets

    rows = [{"text": "a"}, {"text": "b, c"}, {"text": "d"}]
    write(tmp_path / "x.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    write(tmp_path / "x.json", json.dumps(rows))
    write(tmp_path / "x.csv", 'text\na\n"b, c"\nd\n')
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    places = {"jsonl": "x.jsonl:3", "json": "x.json[1]", "csv": "x.csv:3", "parquet": "x.parquet[1]"}
    for kind, place in places.items():
        read = list(read_rows(source(tmp_path / f"x.{kind}")))
        assert [row.values for row in read] == rows
        assert read[1].where == place
        assert values(tmp_path / f"x.{kind}", limit=2) == rows[:2]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    assert values(write(tmp_path / "x.jsonl", b'\xef\xbb\xbf{"text": "a"}\n')) == [{"text": "a"}]


def test_rows_after_the_limit_are_not_even_read(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"text": "a"}\nbroken\n')
    assert values(path, limit=1) == [{"text": "a"}]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.jsonl", '{"text": "a"}\n{"text": \n', "x.jsonl:2: expected one JSON object on the line"),
        ("x.jsonl", '{"text": "a"}\n[1]\n', "x.jsonl:2: expected a JSON object, found a list"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "x.jsonl:2: expected UTF-8 text, found the byte 0xff"),
        ("x.json", '[{"text": "a"},\n {]', "x.json:2: not valid JSON"),
        ("x.json", '{"a": 1}\n{"a": 2}', "one object a line is named .jsonl"),
        ("x.json", '{"a": 1}', "x.json: expected a list of objects, found an object"),
        ("x.json", "[{}, 3]", "x.json[1]: expected an object, found a number"),
        ("x.csv", "a,b\n1,2\n3\n", "x.csv:3: expected 2 columns, found 1"),
        ("x.csv", "a,b\n1,2,3\n", "x.csv:2: expected 2 columns, found 3"),
        ("x.parquet", "no parquet", "x.parquet: can't be read"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path, name, data, message):
    with pytest.raises(DataError, match=re.escape(message)):
        values(write(tmp_path / name, data))


def dataset(tmp_path, tokenizer, rows, config=None, format="chat", **more):
    path = write(tmp_path / "d.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found = source(path, format, **more)
    return build([found], DataConfig(train=(found,), **(config or {})), tokenizer)


def chat(question, answer):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


@pytest.mark.parametrize(
    ("row", "more", "message"),
    [
        ({"messags": []}, {}, 'd.jsonl:1: expected a column "messages", the columns are "messags"'),
        ({"messages": []}, {}, "found an empty list"),
        ({"messages": [{"role": "user"}]}, {}, 'message 0 to be an object with "role" and "content"'),
        ({"messages": [{"role": "bot", "content": "x"}]}, {}, "one of system, user, assistant, tool, found 'bot'"),
        ({"messages": [{"role": "user", "content": 3}]}, {}, "content of message 0 to be text, found int"),
        ({"prompt": "x"}, {"format": "instruct"}, 'expected a column "response"'),
        ({"prompt": "x", "response": 3}, {"format": "instruct"}, 'text in column "response", found int'),
        ({"response": "x"}, {"format": "instruct", "template": "{question}"}, 'expected a column "question"'),
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
    with pytest.raises(DataError, match=r"d.jsonl:2: 60 tokens, more than max_length = 30"):
        dataset(tmp_path, tokenizer, ROWS, {"max_length": 30, "overlong": "error"})


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        (ROWS[2:], {}, "none of the 1 rows can be used: 1 have no target token"),
        (ROWS[1:2], {"max_length": 20}, "1 are longer than max_length = 20"),
        (ROWS[1:2], {"max_length": 4, "overlong": "truncate"}, "no target token (1 after truncation)"),
        ([], {}, "d.jsonl: expected at least one row, found none"),
    ],
)
def test_a_dataset_with_nothing_to_learn_is_an_error_with_the_counts(tmp_path, tokenizer, rows, config, message):
    with pytest.raises(DataError, match=re.escape(message)):
        dataset(tmp_path, tokenizer, rows, config)


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


def test_every_epoch_visits_every_sample_once_in_an_order_of_its_own():
    count, batch = 10, 5
    stream = [index for step in range(6) for index in step_indices(step, batch, count, 1, True)]
    epochs = [stream[start : start + count] for start in range(0, 30, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_is_a_pure_function_of_its_arguments():
    later = step_indices(1000, 4, 37, 5, True)
    step_indices(3, 4, 37, 6, True)
    assert step_indices(1000, 4, 37, 5, True) == later
    assert step_indices(1000, 4, 37, 6, True) != later
    assert step_indices(2, 4, 10, 0, False) == [8, 9, 0, 1]


def test_batches_are_padded_at_the_right_and_prompts_at_the_left(tmp_path, tokenizer):
    samples = dataset(tmp_path, tokenizer, [chat("q", "a"), chat("longer", "aaaa")]).samples
    batch = collate(samples, pad_id=0)
    short = len(samples[0].input_ids)
    assert batch.input_ids.shape == batch.labels.shape == (2, len(samples[1].input_ids))
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.input_ids[0, :short].tolist() == samples[0].input_ids.tolist()
    assert not batch.input_ids[0, short:].any() and (batch.labels[0, short:] == -100).all()
    assert np.array_equal(batch.labels.numpy()[0, :short] != -100, samples[0].is_target)
    assert batch.target_tokens == 7 and batch.where == ("d.jsonl:1", "d.jsonl:2")
    prompts, mask = collate_prompts(samples, pad_id=0)
    assert mask.sum(1).tolist() == [sample.prompt_length for sample in samples]
    assert prompts[0, -1] == prompts[1, -1] and mask[:, -1].all() and not mask[0, 0]
