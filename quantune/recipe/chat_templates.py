"""The chat templates that come with quantune, by name."""

from __future__ import annotations

import difflib
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "data" / "templates"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.jinja")))
"""What `[model] chat_template` takes beside a file."""


def template_path(template: str) -> Path:
    """The file of a template that is given by name or as a path; a name comes first (`./name` is a file)."""
    return FOLDER / f"{template}.jinja" if template in NAMES else Path(template)


def suggestion(template: str) -> str:
    """What to write in place of a template that is neither a file nor a name."""
    close = difflib.get_close_matches(Path(template).stem, NAMES, n=1)
    return f'did you mean "{close[0]}"?' if close else f"the templates that come with quantune are {', '.join(NAMES)}"
