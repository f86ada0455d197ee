"""Answering prompts with a base as it was trained on, and its adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from quantune.data.formats import read_prompt
from quantune.data.tokenization import prompt_ids
from quantune.model.adapter import build_initialization, load_adapter
from quantune.model.base import open_base, skeleton
from quantune.model.device import DTYPES, choose_device, choose_precision
from quantune.model.load import load_model
from quantune.recipe.schema import Recipe
from quantune.training.evaluate import generate


def answer(
    recipe: Recipe,
    adapter: Path | None,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    allow_remote_code: bool = False,
) -> list[str]:
    """An answer to each prompt, one after the other, asked in the form of the first training source.

    Raises:
        InputError: the base or the adapter can't be used.
    """
    device = choose_device("auto")
    base = open_base(recipe.model, allow_remote_code=allow_remote_code)
    trained_here = recipe.training.device == device.type
    dtype = DTYPES[choose_precision(recipe.training.precision if trained_here else "auto", device)]
    split = None
    if adapter is not None:
        split = build_initialization(skeleton(base), recipe.adapter, seed=recipe.training.seed)
    model = load_model(base, recipe.quantization, compute_dtype=dtype, device=device, initialization=split)
    answering = model if adapter is None else load_adapter(model, adapter)
    answering.eval()
    torch.manual_seed(recipe.training.seed)
    answers = []
    for prompt in prompts:
        input_ids = torch.tensor([prompt_ids(base.tokenizer, read_prompt(prompt, recipe.data.train[0]))], device=device)
        answers += generate(
            answering,
            input_ids,
            torch.ones_like(input_ids),
            base.tokenizer,
            max_new_tokens=max_new_tokens,
            pad_id=base.pad_id,
            temperature=temperature,
        )
    return answers
