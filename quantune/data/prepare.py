"""The data of a run: what it trains on and what it evaluates on."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from transformers import PreTrainedTokenizerBase

from quantune.data.chat import endless
from quantune.data.dataset import DataObserver, Dataset, build
from quantune.data.holdout import hold_out
from quantune.data.packing import pack
from quantune.recipe.schema import DataConfig, SourceConfig


@attrs.frozen(kw_only=True, eq=False)
class RunData:
    """Tokenized data."""

    train: Dataset
    """With packing, each sample is a row of several."""
    eval: Dataset | None
    """Never packed; None where there is nothing to evaluate on."""


def prepare(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    vocabulary_size: int | None = None,
    observer: DataObserver | None = None,
) -> RunData:
    """Read, tokenize, hold out and pack what `config` says.

    Raises:
        DataError: see `quantune.data.dataset.build` and `hold_out`.
    """

    def read(sources: Sequence[SourceConfig]) -> Dataset:
        return build(sources, config, tokenizer, vocabulary_size=vocabulary_size, observer=observer)

    train = read(config.train)
    warning = endless(tokenizer) if any(map(_ends_answers, config.train)) else None
    if warning is not None and observer is not None:
        observer.warning(warning)
    held_out = read(config.eval) if config.eval else None
    if config.eval_size is not None:
        train, held_out = hold_out(train, config.eval_size, seed)
    if config.packing:
        train = pack(train, config.max_length, keep_order=not config.shuffle)
    return RunData(train=train, eval=held_out)


def _ends_answers(source: SourceConfig) -> bool:
    """Whether a source teaches the end of answers as the chat template writes it."""
    rendered = source.format == "chat" or (source.format == "instruct" and source.template is None)
    return rendered and source.train_on_eos != "none"
