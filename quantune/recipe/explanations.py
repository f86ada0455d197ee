"""Finding a code, and all there is to say about it as Markdown."""

from __future__ import annotations

import difflib
import re

from quantune.errors import InputError
from quantune.recipe.codes import CODES, Code


def find(code: str) -> tuple[str, Code]:
    """A code as people write it: in any case, and without its letters or leading zeros.

    Raises:
        InputError: there is none; says which may be meant.
    """
    found = re.fullmatch(r"(?:QT)?0*(\d{1,3})", code.strip(), flags=re.IGNORECASE)
    name = f"QT{int(found[1]):03}" if found else code.strip().upper()
    if name in CODES:
        return name, CODES[name]
    close = difflib.get_close_matches(name.replace("O", "0"), CODES, n=1)
    suggestion = f'did you mean "{close[0]}"?' if close else "quantune explain lists them all"
    raise InputError(f'there is no code "{code}"; {suggestion}')


def text(name: str, code: Code) -> str:
    """All there is to say about a code, as Markdown."""
    parts = [f"## {name}", code.title, code.explanation]
    if code.example is not None and code.corrected is not None:
        parts += [f"```toml\n{code.example}\n```", "Correct is:", f"```toml\n{code.corrected}\n```"]
    if code.note is not None:
        parts.append(f"For example: {code.note}")
    return "\n\n".join(parts) + "\n"


def page() -> str:
    """docs/errors.md."""
    introduction = (
        "# Problems of a recipe, by code\n\n"
        "Every problem has a stable code, which `quantune explain QT012` explains as this page does. The examples show "
        "the lines that matter; what they leave out is as in docs/recipe.md.\n\n"
        "This page is generated from `quantune/recipe/codes.py`.\n"
    )
    return "\n".join([introduction, *(text(name, code) for name, code in sorted(CODES.items()))])
