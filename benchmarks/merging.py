"""What each way of merging keeps of what was trained, for every built-in format, on the quickstart recipe.

    python benchmarks/merging.py --runs runs/merging

Two adapters are trained for each format: a large update (60 steps at 3e-3, about 10 % of the weights) and a small one
(20 steps at 3e-4, about half a percent). Runs that are in the folder already are not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import attrs
import torch

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart.toml"
PACKED_QUICKSTART = '[quantization]\nbackend = "bnb"\nweight_dtype = "nf4"\n'
UPDATES = {"large": (60, 3e-3), "small": (20, 3e-4)}
"""Steps and learning rate."""
COLUMNS = ("dequantized", "original", "packed", "packed, aware")


class Warnings:
    """An observer of merges that keeps warnings."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def phase(self, text: str) -> None: ...

    def begin(self, nbytes: int) -> None: ...

    def wrote(self, nbytes: int) -> None: ...

    def warning(self, text: str) -> None:
        self.texts.append(text)


def main() -> None:
    """Train, merge, measure and print."""
    from quantune.comparison import formats

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="keep the runs in this folder")
    parser.add_argument("--only", action="append", help="these formats, e.g. bnb:nf4")
    parser.add_argument("--updates", choices=UPDATES, action="append", help="these updates")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.runs or Path(temporary)
        for update in arguments.updates or UPDATES:
            print(f"\n{update} update: {UPDATES[update][0]} steps at {UPDATES[update][1]:g}\n")
            print(f"| format | base | trained | {' | '.join(COLUMNS)} |\n|---|---|---|{'---|' * len(COLUMNS)}")
            for format in formats.select(arguments.only):
                run = train(format.name, update, folder)
                rows.append({"format": format.name, "update": update, **measure(run)})
                print(line(rows[-1]), flush=True)
    if arguments.json:
        setting = {"torch": torch.__version__, "threads": torch.get_num_threads(), "updates": UPDATES}
        arguments.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def train(format: str, update: str, folder: Path) -> Path:
    """The run of the quickstart recipe with another format and a shorter training."""
    run = folder / f"{format.replace(':', '-')}-{update}"
    if (run / "adapter").is_dir():
        return run
    backend, _, weight_dtype = format.partition(":")
    quantization = f'[quantization]\nbackend = "{backend}"\n' + (
        f'weight_dtype = "{weight_dtype}"\n' if weight_dtype else ""
    )
    text = QUICKSTART.read_text(encoding="utf-8")
    assert PACKED_QUICKSTART in text
    text = text.replace(PACKED_QUICKSTART, quantization).replace("quickstart/", f"{QUICKSTART.parent}/quickstart/")
    recipe = folder / f"{run.name}.toml"
    folder.mkdir(parents=True, exist_ok=True)
    recipe.write_text(text, encoding="utf-8")
    steps, rate = UPDATES[update]
    settings = {
        "output.dir": json.dumps(str(run)),
        "training.max_steps": steps,
        "training.learning_rate": rate,
        "training.warmup_steps": 5,
        "training.precision": '"fp32"',
        "evaluation.exact_match": "false",
        "evaluation.at_start": "false",
    }
    command = [sys.executable, "-m", "quantune", "run", str(recipe), "--overwrite"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return run


def measure(run: Path) -> dict[str, object]:
    """The figures of every way to merge a run."""
    from quantune.cli.console import quiet_libraries

    quiet_libraries()
    from quantune.cli.recipes import open_recipe
    from quantune.merge.request import MergeRequest, Setting
    from quantune.merge.trained import find_adapter
    from quantune.merge.ways import compare_ways

    recipe = open_recipe(run / "recipe.toml", data=False)
    request = MergeRequest(
        adapters=(find_adapter(run),),
        weights=(1.0,),
        setting=Setting.of(recipe),
        recipe=recipe,
        out=run / "merged",
        verify=False,
    )
    seen = Warnings()
    found = compare_ways(request, torch.device("cpu"), seen)
    return {"rows": [attrs.asdict(row) for row in found.rows], "tokens": found.tokens, "warnings": seen.texts}


def line(row: dict) -> str:
    """A row of the table: losses of base and base + adapter, then what each way keeps, and its KL."""
    base, trained, *ways = row["rows"]
    by_way = {way["way"]: way for way in ways}
    cells = [f"{100 * by_way[way]['kept']:.1f} %, {by_way[way]['kl']:.1e}" if way in by_way else "-" for way in COLUMNS]
    return f"| {row['format']} | {base['loss']:.3f} | {trained['loss']:.3f} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
