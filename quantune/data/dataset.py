"""The samples of a run, and what became of the rows they came from."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import attrs
from transformers import PreTrainedTokenizerBase

from quantune.data.formats import read_example
from quantune.data.sources import describe, read_rows
from quantune.data.tokenization import Sample, tokenize
from quantune.errors import DataError
from quantune.recipe.schema import DataConfig, SourceConfig


@attrs.define(kw_only=True)
class Counts:
    """What became of the rows."""

    rows: int = 0
    kept: int = 0
    dropped_overlong: int = 0
    truncated: int = 0
    zero_target: int = 0
    """Dropped because no token is a target."""
    tokens: int = 0
    target_tokens: int = 0


@attrs.frozen(kw_only=True, eq=False)
class Dataset:
    """Tokenized samples."""

    samples: tuple[Sample, ...]
    counts: Counts

    def fingerprint(self) -> str:
        """sha256 over every sample's tokens and targets."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(len(sample.input_ids).to_bytes(8, "little"))
            digest.update(sample.input_ids.tobytes())
            digest.update(sample.is_target.tobytes())
        return digest.hexdigest()


def build(
    sources: Sequence[SourceConfig],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocabulary_size: int | None = None,
) -> Dataset:
    """Read, render and tokenize every source.

    Args:
        vocabulary_size: rows of the embedding; a token beyond them is an error.

    Raises:
        DataError: a row is broken, a token has no embedding, or nothing is left to train on.
    """
    counts, samples = Counts(), []
    for source in sources:
        before = counts.rows
        for row in read_rows(source):
            counts.rows += 1
            example = read_example(row, source)
            sample = tokenize(example, tokenizer, where=row.where, loss_on=source.loss_on)
            fitted = _fit(sample, config, counts)
            if fitted is not None:
                _check_vocabulary(fitted, tokenizer, vocabulary_size)
                samples.append(fitted)
        if counts.rows == before:
            raise DataError(f"{describe(source)}: expected at least one row, found none")
    counts.kept = len(samples)
    counts.tokens = sum(len(sample.input_ids) for sample in samples)
    counts.target_tokens = sum(int(sample.is_target.sum()) for sample in samples)
    if not samples:
        raise DataError(_nothing_left(counts, config))
    return Dataset(samples=tuple(samples), counts=counts)


def _fit(sample: Sample, config: DataConfig, counts: Counts) -> Sample | None:
    """The sample within `max_length`, or None when it is dropped."""
    length = len(sample.input_ids)
    if length > config.max_length:
        if config.overlong == "error":
            raise DataError(
                f"{sample.where}: {length} tokens, more than max_length = {config.max_length}; "
                'raise it, or set [data] overlong = "drop" or "truncate"'
            )
        if config.overlong == "drop":
            counts.dropped_overlong += 1
            return None
        counts.truncated += 1
        sample = attrs.evolve(
            sample,
            input_ids=sample.input_ids[: config.max_length],
            is_target=sample.is_target[: config.max_length],
            prompt_length=min(sample.prompt_length, config.max_length),
        )
    if not sample.is_target.any():
        counts.zero_target += 1
        return None
    return sample


def _check_vocabulary(sample: Sample, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int | None) -> None:
    if vocabulary_size is None or int(sample.input_ids.max()) < vocabulary_size:
        return
    token_id = int(sample.input_ids.max())
    raise DataError(
        f"{sample.where}: the token {tokenizer.convert_ids_to_tokens(token_id)!r} has the id {token_id}, beyond the "
        f"model's embedding of {vocabulary_size} rows; the tokenizer does not belong to this base"
    )


def _nothing_left(counts: Counts, config: DataConfig) -> str:
    reasons = {
        f"{counts.dropped_overlong} are longer than max_length = {config.max_length}": counts.dropped_overlong,
        f"{counts.zero_target} have no target token"
        + (f" ({counts.truncated} after truncation)" if counts.truncated else ""): counts.zero_target,
    }
    why = " and ".join(itertools.compress(reasons, reasons.values()))
    return (
        f"none of the {counts.rows} rows can be used: {why}. Raise [data] max_length, or check that the rows hold "
        "assistant messages"
    )
