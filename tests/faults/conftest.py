"""A small run to do harm to, and what it comes to when nothing happens to it."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
from running import quantune_run

from quantune.checkpoint.audit import audit
from quantune.checkpoint.commit import TEMPORARY
from quantune.checkpoint.history import History
from quantune.checkpoint.store import CheckpointStore

RECIPE = """
[model]
base = "builtin:mini"
config = {num_hidden_layers = 1}

[quantization]
backend = "bnb"

[adapter]
r = 4
dropout = 0.1

[[data.train]]
path = "train.jsonl"
format = "completion"

[[data.eval]]
path = "eval.jsonl"
format = "completion"

[training]
max_steps = 12
batch_size = 2
learning_rate = 1e-3
precision = "fp32"

[evaluation]
every_steps = 5
batch_size = 1

[checkpoint]
every_steps = 2

[output]
dir = "run"
"""

SAME = (
    "event",
    "step",
    "epoch",
    "loss",
    "loss_max",
    "grad_norm",
    "learning_rate",
    "tokens",
    "target_tokens",
    "samples",
)


@attrs.frozen
class Work:
    """A folder with a recipe, its data and its run."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "run.toml"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def is_as(self, whole: Work) -> bool:
        """Whether it ended with the same bytes as `whole`, and step for step, each done once with its samples."""
        verdict = audit(History(self.run / "history.jsonl").rows())
        assert verdict.problems == () and verdict.steps == verdict.total
        return self.adapter() == whole.adapter() and self.rows() == whole.rows()

    def adapter(self) -> bytes:
        """The result."""
        return (self.run / "adapter" / "adapter_model.safetensors").read_bytes()

    def rows(self) -> list[dict]:
        """The steps and evaluations: what of them does not depend on the clock and the machine."""
        lines = map(json.loads, (self.run / "metrics.jsonl").read_text().splitlines())
        return [{key: line[key] for key in SAME if key in line} for line in lines]

    def step(self) -> int:
        """Steps that are recorded."""
        log = self.run / "metrics.jsonl"
        return log.read_text().count('"event": "step"') if log.exists() else 0

    def checkpoints(self) -> list[int]:
        """Steps with a checkpoint."""
        return CheckpointStore(self.run / "checkpoints").steps()

    def leftovers(self) -> list[Path]:
        """Temporary files and folders."""
        return list(self.run.rglob(f"*{TEMPORARY}*"))


def make_work(folder: Path) -> Work:
    """A run in `folder`, which has not begun."""
    folder.mkdir(exist_ok=True)
    for name, count in (("train", 24), ("eval", 3)):
        rows = [{"text": f"The number after {n} is {n + 1}." + " And so on." * (n % 4)} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.toml").write_text(RECIPE.replace('"run"', f'"{folder / "run"}"'))
    return Work(folder)


@pytest.fixture
def work(tmp_path):
    """A run that has not begun."""
    return make_work(tmp_path)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The same run, to which nothing happened."""
    work = make_work(tmp_path_factory.mktemp("whole"))
    done = quantune_run(work.recipe)
    assert done.code == 0, done.said
    return work
