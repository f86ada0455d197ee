"""Running a comparison in tests, and remembering what it said on the way."""

from __future__ import annotations

import torch

from quantune.comparison import formats
from quantune.comparison.compare import compare
from quantune.comparison.text import Text

CPU = torch.device("cpu")
TEXT = Text(name="test", content="The river is long and the lamp is old, and nobody has counted the ducks. " * 4)


class Recorder:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.total = 0
        self.phases: list[tuple[str, str]] = []
        self.rows: list[str] = []

    def start(self, rows):
        self.total = rows

    def phase(self, format, text):
        self.phases.append((format, text))

    def row(self, row):
        self.rows.append(row.format)


def run(base, *only, text=TEXT, observer=None, max_tokens=8192):
    """Compare the named formats on `base`."""
    observer = observer or Recorder()
    chosen = [one if isinstance(one, formats.Format) else formats.select([one])[0] for one in only]
    return compare(base, chosen, text=text, device=CPU, precision="fp32", observer=observer, max_tokens=max_tokens)
