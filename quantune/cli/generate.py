"""`quantune generate`: ask a trained adapter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from quantune.cli.console import out, quiet_libraries, warning
from quantune.cli.recipes import open_recipe
from quantune.errors import InputError


def generate(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or of its adapter.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt; give several for several answers.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in an answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 answers greedily.")] = 0.0,
    no_adapter: Annotated[bool, typer.Option("--no-adapter", help="Ask the base alone.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow the run's recipe to run code that comes with its base.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print prompts and answers as JSON.")] = False,
) -> None:
    """Answer prompts (or the lines of standard input) with the base, quantized as in training, and its adapter."""
    if not (run / "recipe.toml").is_file():
        merged = (run / "merge.json").is_file()
        hint = "; a merged model needs no quantune: load it with transformers" if merged else ""
        raise InputError(f"expected the folder of a run or of its adapter, found no recipe.toml in {run}{hint}")
    adapter = run if (run / "adapter_config.json").is_file() else run / "adapter"
    if not no_adapter and not adapter.is_dir():
        raise InputError(
            f"the run in {run} is not finished and has no adapter yet; go on with quantune run RECIPE --resume"
        )
    recipe = open_recipe(run / "recipe.toml", data=False)
    prompts = list(prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()])
    if not prompts:
        raise InputError("expected a prompt: give --prompt, or lines on standard input")
    quiet_libraries()
    from quantune.checkpoint.run_folder import PACKED, RunFolder
    from quantune.training.answer import answer

    answers = answer(
        recipe,
        None if no_adapter else adapter,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        allow_remote_code=trust_remote_code,
        packed=RunFolder(run).fingerprints().get(PACKED),
        warn=warning,
    )
    if as_json:
        rows = [{"prompt": asked, "answer": text} for asked, text in zip(prompts, answers, strict=True)]
        out.print_json(json.dumps(rows))
        return
    for text in answers:
        out.print(text, markup=False)
