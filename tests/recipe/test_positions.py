"""Lines and columns of keys, however TOML lets them be written."""

import pytest
import tomli
from toml_documents import Document

from quantune.recipe.positions import key_span, value_span


def place(text, path):
    """Line and column of the key."""
    span = key_span(text, path)
    return span and (span.line, span.column)


TEXT = '''\
# r = 1 in a comment
[adapter]
r = 8
"quoted key" = 1
targets = [
    "q_proj",
    "v_proj",
]
note = """
r = 3
"""

[training]
optimizer.name = "adamw"
inline = { r = 1, seed = 2 }

[[data.train]]
path = "a"

[[data.train]]
path = "b"   # path
  indented = 1
'''


@pytest.mark.parametrize(
    ("path", "position"),
    [
        (("adapter",), (2, 2)),
        (("adapter", "r"), (3, 1)),
        (("adapter", "quoted key"), (4, 1)),
        (("adapter", "targets"), (5, 1)),
        (("adapter", "targets", 1), (7, 5)),
        (("adapter", "note"), (9, 1)),
        (("training", "optimizer", "name"), (14, 11)),
        (("training", "inline", "seed"), (15, 19)),
        (("data", "train", 0, "path"), (18, 1)),
        (("data", "train", 1, "path"), (21, 1)),
        (("data", "train", 1, "indented"), (22, 3)),
        (("nothing",), None),
    ],
)
def test_the_key_is_found(path, position):
    assert place(TEXT, path) == position


ARRAYS = """\
[data]
max_length = 8
train = [
  # format = "chat" in a comment
  { path = "a, b", format = "chat" },
  { path = "format = }", columns = ["x", "y"], format = "chat" },
]  # format
eval = [{ path = "a" }, { path = "b" }]

[model]
base = "base = 1"
'base.name' = "x"
note = '''
[training]
base = 2
'''
after = { path = "x", "format" = 'path = 1', deep.path = 3 }
"path" = 4
"""


@pytest.mark.parametrize(
    ("path", "position"),
    [
        (("data", "train"), (3, 1)),
        (("data", "train", 0, "format"), (5, 20)),
        (("data", "train", 1, "path"), (6, 5)),
        (("data", "train", 1, "columns"), (6, 26)),
        (("data", "train", 1, "format"), (6, 48)),
        (("data", "eval", 0, "path"), (8, 11)),
        (("data", "eval", 1, "path"), (8, 27)),
        (("data", "eval", 2, "path"), None),
        (("model", "base"), (11, 1)),
        (("model", "base.name"), (12, 1)),
        (("model", "note"), (13, 1)),
        (("training",), None),
        (("model", "after", "format"), (17, 23)),
        (("model", "after", "deep", "path"), (17, 51)),
        (("model", "path"), (18, 1)),
    ],
)
def test_a_key_in_an_inline_table_is_found_in_its_own_element(path, position):
    assert place(ARRAYS, path) == position


def test_the_same_key_in_several_tables_is_found_in_each():
    text = "[a]\nr = 1\n[b]\nlr = 2\nr = 3\n[a.b]\nr = 4\n[c]\n  r = 5\n"
    rows = [place(text, path) for path in (("a", "r"), ("b", "r"), ("a", "b", "r"), ("c", "r"))]
    assert rows == [(2, 1), (5, 1), (7, 1), (9, 3)]


def test_dotted_keys_are_found_by_their_last_part():
    text = 'a.b.c = 1\na."b".d = 2\n\n[x.y]\nz.w = 3\n'
    paths = [("a",), ("a", "b", "c"), ("a", "b", "d"), ("x",), ("x", "y"), ("x", "y", "z", "w")]
    assert [place(text, path) for path in paths] == [(1, 1), (1, 5), (2, 7), (4, 2), (4, 4), (5, 3)]


def test_headers_of_arrays_of_tables_are_found_by_index():
    text = '[[data.train]]\npath = "a"\n\n# [[data.train]]\n[["data".train]]  # second\npath = "b"\n'
    assert place(text, ("data", "train", 0)) == (1, 8)
    assert place(text, ("data", "train", 1)) == (5, 10)
    assert place(text, ("data", "train", 2)) is None


def test_windows_line_ends_and_unicode_separators_keep_the_lines():
    text = 'a = "x\u2028y"  # \u2028\r\n\r\nb = """\r\nb = 1\r\n"""\r\nc = 3'
    assert [place(text, (key,)) for key in "abc"] == [(1, 1), (3, 1), (6, 1)]


def test_inline_tables_over_several_lines_as_toml_1_1_has_them():
    text = "a = {\n  r = 1,  # r = 0\n  s = [\n    2,\n  ],\n}\nb = 3"
    assert [place(text, path) for path in (("a", "r"), ("a", "s", 0), ("b",))] == [(2, 3), (4, 5), (7, 1)]


def test_a_table_without_a_header_is_where_it_is_mentioned_first():
    text = "[a.b]\nr = 1\n[c.d]\n[a.c]\n[c]\n"
    assert [place(text, path) for path in (("a",), ("c",))] == [(1, 2), (5, 2)]


def test_lists_nested_as_deeply_as_the_parser_takes_them():
    text = f"a = {'[' * 400}{']' * 400}"
    tomli.loads(text)
    assert place(text, ("a", *[0] * 399)) == (1, 404)


def test_in_any_document_every_key_and_value_is_where_it_was_written():
    for seed in range(2000):
        document = Document(seed)
        parsed = list(paths(tomli.loads(document.text.removeprefix("\ufeff"))))
        assert {path: tuple_of(key_span(document.text, path)) for path in parsed} == document.keys, seed
        values = {path: value_span(document.text, path) for path in parsed}
        assert {path: tuple_of(span) for path, span in values.items() if span} == document.values, seed


def paths(node, prefix=()):
    members = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, member in members:
        yield (*prefix, key)
        yield from paths(member, (*prefix, key))


def tuple_of(span):
    return span and (span.line, span.column, span.length)
