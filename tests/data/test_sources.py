"""Rows of files, each with its place; a broken one is named."""

import json
import re
import sys

import pytest
from data_files import source, write

from quantune.data.sources import read_rows
from quantune.errors import DataError
from quantune.recipe.schema import SourceConfig


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
    assert values(write(tmp_path / "x.csv", b"\xef\xbb\xbftext\na\n")) == [{"text": "a"}]


@pytest.mark.parametrize(("name", "data"), [("x.jsonl", '{"text": "a"}\nbroken\n'), ("x.csv", b"text\na\n\xff,\n")])
def test_rows_after_the_limit_are_not_even_read(tmp_path, name, data):
    assert values(write(tmp_path / name, data), limit=1) == [{"text": "a"}]


def test_a_csv_field_may_hold_any_text(tmp_path):
    text = 'two\nlines, a "quote", \u2028 and \x0c' + "long" * 50_000
    quoted = '"' + text.replace('"', '""') + '"'
    path = write(tmp_path / "x.csv", f",text\n\n0,{quoted}\n1,\u2028 unquoted\n")
    rows = list(read_rows(source(path)))
    assert [row.values for row in rows] == [{"": "0", "text": text}, {"": "1", "text": "\u2028 unquoted"}]
    assert [row.where for row in rows] == ["x.csv:3", "x.csv:5"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.jsonl", '{"text": "a"}\n{"text": \n', "x.jsonl:2: expected one JSON object on the line, Expecting value"),
        ("x.jsonl", '{"n": ' + "1" * 5000 + "}", "x.jsonl:1: expected one JSON object on the line, Exceeds the limit"),
        ("x.jsonl", '{"text": "a"}\n[1]\n', "x.jsonl:2: expected a JSON object, found a list"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "x.jsonl:2: expected UTF-8 text, found the byte 0xff"),
        ("x.json", b'[\n"\xe9"]', "x.json:2: expected UTF-8 text, found the byte 0xe9"),
        ("x.json", '[{"text": "a"},\n {]', "x.json:2: not valid JSON"),
        ("x.json", "[" * 200_000, "x.json: not valid JSON, maximum recursion depth"),
        ("x.json", '{"a": 1}\n{"a": 2}', "one object a line is named .jsonl"),
        ("x.json", '{"a": 1}', "x.json: expected a list of objects, found an object"),
        ("x.json", "[{}, 3]", "x.json[1]: expected an object, found a number"),
        ("x.csv", "a,b\n1,2\n3\n", "x.csv:3: expected 2 columns, found 1"),
        ("x.csv", "a,b\n1,2,3\n", "x.csv:2: expected 2 columns, found 3"),
        ("x.csv", "a,b,a\n1,2,3\n", 'x.csv:1: expected a name of its own for every column, found "a" twice'),
        ("x.csv", 'a\n"b\n', "x.csv:2: not valid CSV, unexpected end of data"),
        ("x.parquet", "no parquet", "x.parquet: can't be read"),
        ("x.txt", "text", "x.txt: expected a file ending in .jsonl, .json, .csv or .parquet"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path, name, data, message):
    with pytest.raises(DataError, match=re.escape(message)):
        values(write(tmp_path / name, data))


@pytest.mark.parametrize(("name", "data"), [("x.jsonl", " \n"), ("x.json", ""), ("x.json", "[]"), ("x.csv", "text\n")])
def test_a_file_without_rows_is_an_error(tmp_path, name, data):
    with pytest.raises(DataError, match=re.escape(f"{name}: expected at least one row, found none")):
        values(write(tmp_path / name, data))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"x.jsonl: there is no such file"):
        values(tmp_path / "x.jsonl")


def test_a_hub_dataset_that_cannot_be_had_is_an_error():
    with pytest.raises(DataError, match="nobody/nothing: can't be read"):
        list(read_rows(SourceConfig(dataset="nobody/nothing", format="chat")))


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=re.escape("pip install 'quantune[datasets]'")):
        list(read_rows(SourceConfig(dataset="a/b", format="chat")))


def test_a_source_of_nothing_is_an_error():
    with pytest.raises(DataError, match="needs a path or a dataset"):
        list(read_rows(SourceConfig(format="chat")))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_slice_of_a_file_keeps_the_places_of_its_rows(tmp_path, kind):
    import datasets

    rows = [{"text": f"row {n}"} for n in range(10)]
    path = tmp_path / f"x.{kind}"
    text = {
        "jsonl": "\n".join(map(json.dumps, rows)),
        "json": json.dumps(rows),
        "csv": "text\nrow " + "\nrow ".join("0123456789"),
    }
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        write(path, text[kind])
    whole = list(read_rows(source(path)))
    for split, expected in [("train[:20%]", whole[:2]), ("train[-3:]", whole[-3:]), ("train[2:4]", whole[2:4])]:
        assert list(read_rows(source(path, split=split))) == expected
    assert list(read_rows(source(path, split="train[50%:]", limit=2))) == whole[5:7]


def test_rows_after_a_slice_are_not_even_read(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"text": "a"}\n{"text": "b"}\nbroken\n')
    assert values(path, split="train[1:2]") == [{"text": "b"}]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train[5:]", 'x.jsonl: expected at least one row in split = "train[5:]", found none'),
        ("test", "x.jsonl: expected split = \"train\" or a slice of it, found 'test'"),
        ("train[", "x.jsonl: expected a split such as train[:20%]"),
    ],
)
def test_a_slice_that_holds_nothing_or_is_none_is_an_error(tmp_path, split, message):
    with pytest.raises(DataError, match=re.escape(message)):
        values(write(tmp_path / "x.jsonl", '{"text": "a"}\n'), split=split)


def test_files_and_slices_of_a_dataset_are_chosen_as_the_datasets_library_does(tmp_path):
    (tmp_path / "hub").mkdir()
    for name in ("a", "b", "c"):
        write(tmp_path / "hub" / f"{name}.jsonl", "".join(json.dumps({"text": f"{name}{n}"}) + "\n" for n in range(4)))
    found = SourceConfig(
        dataset=str(tmp_path / "hub"),
        format="completion",
        data_files=("a.jsonl", "c.jsonl"),
        split="train[:25%]+train[-1:]",
    )
    assert [row.values["text"] for row in read_rows(found)] == ["a0", "a1", "c3"]
