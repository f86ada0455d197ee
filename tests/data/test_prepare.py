"""What a run trains on and evaluates on: held out, split and packed."""

import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from data_files import chat, source, write

from quantune.data.collate import IGNORED, collate
from quantune.data.packing import best_fit, in_order
from quantune.data.prepare import prepare
from quantune.errors import DataError
from quantune.recipe.schema import DataConfig


@pytest.fixture
def make(tmp_path, tokenizer):
    """Prepares rows, e.g. `make(rows, format="chat", seed=1, packing=True)`."""

    def made(rows, *, format="completion", seed=1, **config):
        path = write(tmp_path / "d.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return prepare(DataConfig(train=(source(path, format),), **config), tokenizer, seed=seed)

    return made


def texts(count, length=10):
    return [{"text": f"{n:02} " + "x" * (n % length)} for n in range(count)]


def places(dataset):
    return [sample.where for sample in dataset.samples]


@pytest.mark.parametrize(("size", "count"), [(3, 3), (0.1, 2), (0.11, 3), (0.5, 10), (0.001, 1), (19, 19)])
def test_so_many_samples_are_held_out_and_no_sample_is_on_both_sides(make, size, count):
    data = make(texts(20), eval_size=size)
    assert len(data.eval.samples) == data.train.counts.held_out == count
    assert sorted(places(data.train) + places(data.eval)) == sorted(places(make(texts(20)).train))
    assert places(data.train) == sorted(places(data.train), key=lambda place: int(place.split(":")[1]))
    assert data.train.counts.tokens == sum(len(sample.input_ids) for sample in data.train.samples)
    assert data.eval.counts.kept == data.eval.counts.rows == count


def test_what_is_held_out_depends_on_the_seed_alone(make):
    first = make(texts(20), eval_size=4)
    assert places(make(texts(20), eval_size=4).eval) == places(first.eval)
    assert places(make(texts(20), eval_size=4, max_length=64, packing=True).eval) == places(first.eval)
    assert places(make(texts(20), eval_size=4, seed=2).eval) != places(first.eval)


def test_the_draw_is_the_same_in_every_version(make):
    assert places(make(texts(20), eval_size=4, seed=42).eval) == ["d.jsonl:4", "d.jsonl:10", "d.jsonl:17", "d.jsonl:19"]


@pytest.mark.parametrize(("size", "rows"), [(20, 20), (50, 20), (0.9, 1)])
def test_holding_everything_out_is_an_error(make, size, rows):
    with pytest.raises(
        DataError, match=rf"eval_size = {size} holds out .* of the {rows} training samples, and none is"
    ):
        make(texts(rows), eval_size=size)


def test_pieces_of_a_text_are_never_on_both_sides(make):
    data = make(texts(8, length=8) + [{"text": "long " * 40}] * 4, eval_size=6, max_length=16, overlong="split")
    assert not {*places(data.train)} & {*places(data.eval)}
    assert len({*places(data.eval)}) == 6 < len(data.eval.samples)


def test_rows_of_files_with_the_same_name_are_held_out_apart(tmp_path, tokenizer):
    sources = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        sources.append(source(write(tmp_path / name / "d.jsonl", json.dumps({"text": name}) + "\n")))
    data = prepare(DataConfig(train=tuple(sources), eval_size=1), tokenizer, seed=1)
    assert len(data.train.samples) == len(data.eval.samples) == 1


@pytest.mark.parametrize(
    ("replaced", "keys", "said"),
    [
        (("<end>", "<|im_end|>"), {}, r"ends an answer with <\|im_end\|>, which is \d+ tokens.*eos_token = \"<"),
        (("<end>", "~"), {}, "ends an answer with ~, which is an ordinary token"),
        (("<end>", "<|im_end|>"), {"train_on_eos": "none"}, None),
        (("<end>", "<|im_end|>"), {"format": "instruct", "template": "{prompt}"}, None),
        (("<end>", "<pad>"), {}, None),  # generation stops there too
        (("", ""), {}, None),
    ],
)
def test_a_template_whose_end_is_no_token_is_a_warning(tmp_path, tokenizer, replaced, keys, said):
    tokenizer.chat_template = tokenizer.chat_template.replace(*replaced)
    row = {**chat("q", "a"), "prompt": "q", "response": "a"}
    found = source(write(tmp_path / "d.jsonl", json.dumps(row)), **{"format": "chat", **keys})
    heard = []
    observer = SimpleNamespace(warning=heard.append)
    prepare(DataConfig(train=(found,)), tokenizer, seed=1, observer=observer)
    assert [bool(re.search(said or "", text)) for text in heard] == [True] * (said is not None)


@pytest.mark.parametrize("length", range(2, 40))
@pytest.mark.parametrize("most", [3, 8])
def test_a_split_text_loses_no_token_and_ends_once(make, tokenizer, length, most):
    """`length` counts the end token."""
    data = make(
        [{"text": "é" * ((length - 1) // 2) + "x" * ((length - 1) % 2)}], max_length=most, overlong="split"
    ).train
    tokens = np.concatenate([sample.input_ids for sample in data.samples])
    assert len(tokens) == length and data.counts.split == (length > most)
    assert (tokens == tokenizer.eos_token_id).tolist() == [False] * (length - 1) + [True]
    sizes = [len(sample.input_ids) for sample in data.samples]
    assert max(sizes) <= most and min(sizes) >= 2 and len(sizes) == -(-length // most)
    assert all(sample.is_target[1:].all() and not sample.is_target[0] for sample in data.samples)


def test_only_completion_is_split(make):
    data = make([chat("q", "a"), chat("q", "a" * 50)], format="chat", max_length=30, overlong="split")
    assert (data.train.counts.kept, data.train.counts.dropped_overlong, data.train.counts.split) == (1, 1, 0)


def lengths_at_random(count, seed):
    return np.random.default_rng(seed).integers(1, 65, count).tolist()


@pytest.mark.parametrize("group", [best_fit, in_order])
@pytest.mark.parametrize(
    "lengths", [[1], [64], [64, 64], [1] * 200, lengths_at_random(500, 1), lengths_at_random(7, 2)]
)
def test_every_sample_is_in_one_row_and_every_row_fits(group, lengths):
    groups = group(lengths, 64)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in one) <= 64 for one in groups)
    assert group(lengths, 64) == groups
    if group is in_order:
        assert list(itertools.chain(*groups)) == list(range(len(lengths)))


def test_best_fit_fills_rows_nearly_to_the_end():
    lengths = lengths_at_random(2000, 3)
    fill = [sum(lengths) / (64 * len(group(lengths, 64))) for group in (best_fit, in_order)]
    assert fill[0] > 0.99 > 0.85 > fill[1]
    assert best_fit([5, 3, 4, 2, 6], 8) == [[4, 3], [0, 1], [2]]


def test_many_samples_are_packed_fast():
    lengths = np.random.default_rng(4).integers(16, 4096, 200_000).tolist()
    assert len(best_fit(lengths, 4096)) < 1.01 * sum(lengths) / 4096  # two seconds, where trying every row takes hours


def test_a_packed_row_restarts_its_positions_and_keeps_its_labels_apart(make):
    plain, packed = make(texts(9)).train, make(texts(9), packing=True, max_length=40).train
    assert packed.counts.packed_rows == len(packed.samples) < 9 and packed.counts.kept == 9
    assert packed.counts.tokens == plain.counts.tokens == sum(len(row.input_ids) for row in packed.samples)
    assert packed.counts.fill == packed.counts.tokens / (40 * len(packed.samples))
    batch = collate(packed.samples, pad_id=0, length=48)
    assert batch.position_ids.shape == batch.input_ids.shape == (len(packed.samples), 48)
    begins = batch.position_ids == 0
    assert begins[:, 0].all() and (batch.labels[begins] == IGNORED).all()
    steps = batch.position_ids.diff(dim=1)
    assert ((steps == 1) | (batch.position_ids[:, 1:] == 0)).all()
    padding = batch.attention_mask == 0
    assert begins.sum() == 9 + (padding.any(dim=1)).sum()
    assert batch.target_tokens == plain.counts.target_tokens
    found = sorted(
        tuple(part)
        for row in packed.samples
        for part in np.split(row.input_ids, np.flatnonzero(row.positions == 0)[1:])
    )
    assert found == sorted(tuple(sample.input_ids) for sample in plain.samples)
    assert packed.fingerprint() != plain.fingerprint()
    assert collate(plain.samples, pad_id=0).position_ids is None


def test_without_shuffling_rows_are_filled_in_the_order_of_the_files(make):
    rows = make(texts(9), packing=True, max_length=40, shuffle=False).train
    assert [row.where.split(" + ")[0] for row in rows.samples] == ["d.jsonl:1", "d.jsonl:7"]
    shuffled = make(texts(9), packing=True, max_length=40).train
    assert shuffled.fingerprint() != rows.fingerprint()
    assert make(texts(9), packing=True, max_length=40).train.fingerprint() == shuffled.fingerprint()


def test_a_row_names_its_first_samples(make):
    (row,) = make([{"text": "a"}] * 6, packing=True).train.samples
    assert row.where == "d.jsonl:1 + d.jsonl:2 + d.jsonl:3 + d.jsonl:4 and 2 more in its row"
