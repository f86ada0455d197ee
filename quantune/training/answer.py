"""Answering prompts with a base as it was trained on, and its adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import torch
from torch import nn

from quantune.data.formats import read_prompt
from quantune.data.tokenization import prompt_ids
from quantune.model.base import open_base, skeleton
from quantune.model.device import DTYPES, choose_device, choose_precision
from quantune.model.load import packed_fingerprint
from quantune.model.qat import plan_rounding
from quantune.model.trained import load_trained_adapter, load_trained_base
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
    packed: str | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """An answer to each prompt, one after the other, asked in the form of the first training source.

    `packed` is the fingerprint of the packed weights that were trained on; `warn` is told if these are others.

    Raises:
        InputError: the base or the adapter can't be used.
    """
    device = choose_device("auto")
    trained_here = recipe.training.device == device.type
    config = recipe.model if trained_here else attrs.evolve(recipe.model, attn_implementation="auto")  # a GPU's, say
    base = open_base(config, recipe.quantization, allow_remote_code=allow_remote_code)
    dtype = DTYPES[choose_precision(recipe.training.precision if trained_here else "auto", device)]
    precision, rounding = recipe.training.precision, None
    if adapter is not None:
        rounding = plan_rounding(
            skeleton(base), recipe.training.qat, base.quantization, recipe.adapter, stored=base.stored
        )
    model = load_trained_base(
        base,
        None if adapter is None else recipe.adapter,
        seed=recipe.training.seed,
        precision=precision,
        compute_dtype=dtype,
        device=device,
        rounding=rounding,
    )
    if packed is not None and adapter is not None and packed_fingerprint(model) != packed:
        warn("the base packs to other bytes on this machine than it was trained on; answers may differ slightly")
    answering: nn.Module = model
    if adapter is not None:
        answering = load_trained_adapter(model, adapter, precision=precision, rounding=rounding)
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
