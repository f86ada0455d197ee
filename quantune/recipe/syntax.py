"""What is wrong with a text that is not TOML: the parser's error, the piece of text that it is about, and a way out.

The parser's messages are matched; one that is not known is passed on as it is.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import tomli

from quantune.errors import Place, Problem
from quantune.recipe import positions

_TOKEN = re.compile(r"[^\s,\]}#]*")
_TEXT = re.compile(r"""\s*=\s*("[^"]*"|'[^']*')""")
_NUMBER = re.compile(r"[+-]?(\.\d+|\d+\.)")


def toml_problem(error: tomli.TOMLDecodeError, text: str, path: Path) -> Problem:
    """The problem with `text`, which the file `path` holds and which made tomli raise `error`."""
    lines = positions.lines_of(text)
    rest = lines[error.lineno - 1][error.colno - 1 :] if error.lineno <= len(lines) else ""
    line, column, length = error.lineno, error.colno, 1
    message, hint = f"{error.msg[0].lower()}{error.msg[1:]}", None
    related: tuple[Place, ...] = ()
    if error.msg.startswith(("Cannot overwrite", "Cannot declare")):
        repeated = positions.last_repeated(error.doc[: error.pos])
        if repeated is not None:
            name, first, again = repeated
            line, column, length = again.line, again.column, again.length
            message, hint = f"{json.dumps(name, ensure_ascii=False)} is set twice", "keep one of the two"
            kind = _TEXT.match(lines[first.line - 1][first.column - 1 + first.length :])
            if name == "adapter" and kind is not None:
                hint = f"write type = {kind[1]} under [adapter], and leave out adapter = {kind[1]}"
            related = (_place(first, lines),)
    elif error.msg == "Invalid value":
        token = _TOKEN.match(rest)
        found = token[0] if token else ""
        length = max(len(found), 1)
        message, hint = _value(found)
    elif error.msg.startswith(("Unescaped '\\'", "Invalid hex value")):
        hint = "in single quotes a backslash is a backslash: 'C:\\models'"
    elif error.msg.startswith("Illegal character '\\n'"):
        message, hint = "the string does not end on its line", "close it with the quote that it begins with"
    elif error.msg.startswith("Expected '=' after a key"):
        message = f"expected = after the key, found {json.dumps(rest[:1], ensure_ascii=False) if rest else 'nothing'}"
        hint = 'a key and its value are written as key = value, as in r = 16 or backend = "bnb"'
    elif error.msg.startswith("Expected newline"):
        length = len(rest.rstrip()) or 1
        message, hint = f"expected the end of the line, found {json.dumps(rest.strip(), ensure_ascii=False)}", None
    if path.suffix.lower() in (".yaml", ".yml"):
        hint = f"a recipe is TOML; quantune migrate {path} writes one from the YAML of another tool"
    return Problem(
        code="QT002",
        where="recipe",
        message=f"not valid TOML: {message}",
        hint=hint,
        origin=str(path),
        line=line,
        column=column,
        source_line=lines[line - 1] if line <= len(lines) else None,
        underline=(column, length),
        related=related,
    )


def _value(found: str) -> tuple[str, str | None]:
    """What was expected for a value, and what to write for the one that was found."""
    message = f"expected a value, found {found}" if found else "expected a value, found nothing"
    if found.lower() in ("true", "false"):
        return message, f"write {found.lower()}"
    if found.lower() in ("none", "null", "nil", "~"):
        return message, "TOML has no null: leave the key out"
    if _NUMBER.match(found):
        return message, "a number has digits on both sides of its point"
    return message, f"text stands in quotes: {json.dumps(found, ensure_ascii=False)}" if found else None


def _place(span: positions.Span, lines: list[str]) -> Place:
    return Place(
        line=span.line,
        column=span.column,
        source_line=lines[span.line - 1],
        underline=(span.column, span.length),
        label="set here first",
    )
