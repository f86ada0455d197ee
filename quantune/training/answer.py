"""Answering prompts with a base as it was trained on, and its adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import torch
from torch import nn

from quantune.data.formats import read_prompt
from quantune.data.tokenization import prompt_ids
from quantune.model import qat
from quantune.model.adapter import build_initialization, load_adapter
from quantune.model.base import Base, open_base, skeleton
from quantune.model.device import DTYPES, choose_device, choose_precision
from quantune.model.load import load_model, packed_fingerprint
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
    trained_in = recipe.training.precision
    answering = load_trained(
        attrs.evolve(recipe, quantization=base.quantization),
        base,
        adapter,
        dtype=dtype,
        pack_dtype=dtype if trained_in == "auto" else DTYPES[trained_in],
        device=device,
        packed=packed,
        warn=warn,
    )
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


def load_trained(
    recipe: Recipe,
    base: Base,
    adapter: Path | None,
    *,
    dtype: torch.dtype,
    pack_dtype: torch.dtype,
    device: torch.device,
    packed: str | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> nn.Module:
    """The base as `recipe` trains on it, and on it an adapter, which rounds where `[training.qat]` says so.

    Weights are packed and rounded from `pack_dtype`, the dtype that the run computed in. `packed` and `warn` are as in
    `answer`.

    Raises:
        InputError: the base or the adapter can't be used.
    """
    if adapter is None:
        return load_model(base, recipe.quantization, compute_dtype=dtype, device=device, pack_dtype=pack_dtype)
    meta = skeleton(base)
    plan = qat.plan_rounding(meta, recipe.training.qat, recipe.quantization, recipe.adapter, base.stored)
    model = load_model(
        base,
        recipe.quantization if plan is None else plan.stored,
        compute_dtype=dtype,
        device=device,
        initialization=build_initialization(meta, recipe.adapter, seed=recipe.training.seed),
        pack_dtype=pack_dtype,
    )
    if packed is not None and packed_fingerprint(model) != packed:
        warn("the base packs to other bytes on this machine than it was trained on; answers may differ slightly")
    loaded = load_adapter(model, adapter, rounds=plan is not None)
    if plan is not None:
        qat.round_layers(loaded, plan, dtype=pack_dtype)
    return loaded
