"""What a merged model is tried on: the run's own data where it is at hand, else the built-in text."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quantune.comparison.text import WINDOW, Windows, built_in_text, cut
from quantune.data.dataset import build
from quantune.data.prepare import prepare
from quantune.data.tokenization import Sample
from quantune.errors import DataError
from quantune.recipe.schema import Recipe

MAX_TOKENS = 2048
"""Tokens of a whole trial: on the built-in model a few seconds."""
FEW_TOKENS = 512
"""Tokens of a sample of it, for models on which a trial takes minutes."""
ENOUGH_TOKENS = 256
"""Tokens below which distances are chance, and the built-in text is taken beside the run's data."""


@attrs.frozen(kw_only=True, eq=False)
class Prompts:
    """Tokenized rows, and which of their tokens the loss is about."""

    source: str
    """Where they are from, e.g. `the run's evaluation data`."""
    held_out: bool
    """Whether nothing was trained on them, as far as the recipe says."""
    own: bool = True
    """Whether they are the run's own data, of which alone an adapter's improvement can be said."""
    windows: Windows
    targets_N: Tensor
    """Shape (predicted tokens,), bool: the tokens that the loss is about. All rows one after the other, the first token
    of each left out."""

    @property
    def tokens_N(self) -> Tensor:
        """The predicted tokens themselves, int64."""
        return torch.tensor([token for row in self.windows.rows for token in row[1:]])


def prompts_of(
    recipe: Recipe | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocabulary_size: int | None = None,
    positions: int | None = None,
    trained_on: bool = False,
    max_tokens: int = MAX_TOKENS,
) -> Prompts:
    """Prompts from the evaluation data of a recipe, else from its training data, else from the built-in text.

    The last is taken too where the data is not to be had any more; `source` says so.

    Args:
        vocabulary_size: rows of the embedding.
        positions: most tokens that the model takes.
        trained_on: take the training data, so that the evaluation data stays unseen.
    """
    why = ""
    if recipe is not None:
        try:
            samples, name, held_out = _samples(recipe, tokenizer, vocabulary_size, trained_on)
            found = _prompts(spread(samples, max_tokens), name, held_out, positions)
            return found if found.windows.predicted >= ENOUGH_TOKENS else _filled_up(found, tokenizer, positions)
        except DataError as error:
            why = f" (not the run's data: {error})"
    window = min(WINDOW, positions or WINDOW)
    windows = cut(built_in_text(), tokenizer, max_tokens=max_tokens, window=window)
    targets_N = torch.ones(windows.predicted, dtype=torch.bool)
    return Prompts(source=f"the built-in text{why}", held_out=True, own=False, windows=windows, targets_N=targets_N)


def spread(samples: Sequence[Sample], max_tokens: int) -> Sequence[Sample]:
    """Samples of about `max_tokens` tokens in all, at least one, at even distances: sources follow one another."""
    mean = sum(len(sample.input_ids) for sample in samples) / len(samples)
    count = min(len(samples), max(1, int(max_tokens / mean)))
    return [samples[index * len(samples) // count] for index in range(count)]


def _filled_up(few: Prompts, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> Prompts:
    """`few` prompts and some of the built-in text, which the loss is not about."""
    text = prompts_of(None, tokenizer, positions=positions, max_tokens=2 * ENOUGH_TOKENS).windows
    windows = Windows(rows=few.windows.rows + text.rows, text_tokens=few.windows.text_tokens + text.text_tokens)
    targets_N = torch.cat([few.targets_N, torch.zeros(text.predicted, dtype=torch.bool)])
    return attrs.evolve(few, source=f"{few.source} and the built-in text", windows=windows, targets_N=targets_N)


def _samples(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int | None, trained_on: bool
) -> tuple[Sequence[Sample], str, bool]:
    if recipe.data.eval and not trained_on:  # the training data may be large and is not needed
        data = build(recipe.data.eval, recipe.data, tokenizer, vocabulary_size=vocabulary_size)
        return data.samples, "the run's evaluation data", True
    config = attrs.evolve(recipe.data, packing=False)
    read = prepare(config, tokenizer, seed=recipe.training.seed, vocabulary_size=vocabulary_size)
    if read.eval is not None and not trained_on:
        return read.eval.samples, "what the run held out", True
    return read.train.samples, "the run's training data", False


def _prompts(samples: Sequence[Sample], source: str, held_out: bool, positions: int | None) -> Prompts:
    rows = tuple(tuple(sample.input_ids[:positions].tolist()) for sample in samples)
    counts = [counts for sample in samples for counts in sample.is_target[1:positions].tolist()]
    windows = Windows(rows=rows, text_tokens=sum(len(row) for row in rows))
    targets_N = torch.tensor(counts, dtype=torch.bool)
    return Prompts(source=source, held_out=held_out, windows=windows, targets_N=targets_N)
