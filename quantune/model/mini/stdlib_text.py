"""Prose and code documents out of the running interpreter's own standard library (PSF licence)."""

import ast
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "idle_test", "__pycache__", "encodings",
                   "lib2to3", "pydoc_data", "turtledemo", "_sysconfigdata", "unicode"}  # fmt: skip
PROSE_LENGTH = (80, 4000)
CODE_LENGTH = (120, 1600)


def stdlib_sources() -> list[Path]:
    """List the standard library's Python files in a fixed order, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def is_plain(text: str) -> bool:
    """Tell whether the text is nearly all ASCII and not a table of data."""
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return text.isascii() and letters > 0.6 * len(text)


def tidy(text: str) -> str:
    """Drop trailing blanks, rules, doctest noise and long runs of empty lines."""
    lines = [line.rstrip() for line in text.expandtabs().splitlines()]
    kept = [line for line in lines if not re.fullmatch(r"\s*[=*~^\"'#-]{4,}\s*", line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def topics() -> Iterator[str]:
    """Yield the language reference that `help()` shows, in pieces of a few paragraphs."""
    from pydoc_data.topics import topics as reference

    for name in sorted(reference):
        piece: list[str] = []
        for paragraph in tidy(reference[name]).split("\n\n"):
            piece.append(paragraph)
            if sum(map(len, piece)) > 1500:
                yield "\n\n".join(piece)
                piece = []
        yield "\n\n".join(piece)


def docstrings_and_code(path: Path) -> tuple[list[str], list[str]]:
    """Return the docstrings of one file and the source of its functions and small classes."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        return [], []  # the standard library keeps a few deliberately broken files
    prose, code = [], []
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            prose.append(tidy(inspect.cleandoc(docstring)))
        if not isinstance(node, ast.Module) and node.end_lineno is not None:
            block = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            code.append(tidy(inspect.cleandoc("\n" + block)))
    return prose, code


def unique(texts: list[str], length: tuple[int, int]) -> list[str]:
    """Keep plain texts of a length within the bounds, each once, in an order set by their own hash."""
    kept = {text for text in texts if length[0] <= len(text) <= length[1] and is_plain(text)}
    return sorted(kept, key=lambda text: hashlib.sha256(text.encode()).digest())


def stdlib_documents() -> dict[str, list[str]]:
    """Return the kinds "prose" and "code", deduplicated and in a deterministic shuffled order."""
    prose, code = list(topics()), []
    for path in stdlib_sources():
        file_prose, file_code = docstrings_and_code(path)
        prose += file_prose
        code += file_code
    return {"prose": unique(prose, PROSE_LENGTH), "code": unique(code, CODE_LENGTH)}
