"""The samples of a run, and what became of the rows they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol

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
    """Rows read."""
    kept: int = 0
    """Samples there are."""
    dropped_overlong: int = 0
    """Dropped because of `max_length`."""
    truncated: int = 0
    """Cut to `max_length`; kept unless no target was left."""
    split: int = 0
    """Split into several samples of at most `max_length`."""
    zero_target: int = 0
    """Dropped because no token is a target."""
    tokens: int = 0
    """Tokens of the samples."""
    target_tokens: int = 0
    """Those of them that are targets."""
    held_out: int = 0
    """Samples held out for the evaluation; they count neither as kept nor in the tokens."""
    packed_rows: int = 0
    """Rows that the samples were packed into, 0 without packing."""
    fill: float = 0.0
    """The share of the packed rows' `max_length` that holds tokens."""


class DataObserver(Protocol):
    """The part of a run's observer that data is reported to."""

    def warning(self, text: str) -> None:
        """Something the person should know."""


@attrs.frozen(kw_only=True, eq=False)
class Dataset:
    """Tokenized samples."""

    samples: tuple[Sample, ...]
    """At least one, in the order of the sources; each has at least one target."""
    counts: Counts
    """What became of the rows."""

    def fingerprint(self) -> str:
        """sha256 over every sample's tokens and targets."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(len(sample.input_ids).to_bytes(8, "little"))
            digest.update(sample.input_ids.tobytes())
            digest.update(sample.is_target.tobytes())
            if sample.positions is not None:
                digest.update(sample.positions.tobytes())
        return digest.hexdigest()


def build(
    sources: Sequence[SourceConfig],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocabulary_size: int | None = None,
    observer: DataObserver | None = None,
) -> Dataset:
    """Read, render and tokenize every source; one pass, in order.

    Args:
        vocabulary_size: rows of the embedding; a token beyond them is an error.
        observer: is warned of a source that contributes nothing.

    Raises:
        DataError: a row is broken, a token has no embedding, or nothing is left to train on.
    """
    counts = Counts()
    samples: list[Sample] = []
    unused = []
    for source in sources:
        before = counts.rows, len(samples)
        for row in read_rows(source):
            counts.rows += 1
            sample = tokenize(
                read_example(row, source),
                tokenizer,
                where=row.where,
                loss_on=source.loss_on,
                train_on_eos=source.train_on_eos,
            )
            for fitted in _fit(attrs.evolve(sample, row=counts.rows), config, source.format, counts):
                _check_vocabulary(fitted, tokenizer, vocabulary_size)
                samples.append(fitted)
        if len(samples) == before[1]:
            unused.append(f"{describe(source)}: none of its {counts.rows - before[0]} rows can be used")
    count_samples(samples, counts)
    if not samples:
        raise DataError(_nothing_left(counts, config, sources))
    if observer is not None:
        for warning in unused:
            observer.warning(warning)
    return Dataset(samples=tuple(samples), counts=counts)


def count_samples(samples: Sequence[Sample], counts: Counts) -> None:
    """Write the number of samples, and of their tokens, into `counts`."""
    counts.kept = len(samples)
    counts.tokens = sum(len(sample.input_ids) for sample in samples)
    counts.target_tokens = sum(int(sample.is_target.sum()) for sample in samples)


def _fit(sample: Sample, config: DataConfig, format_: str, counts: Counts) -> Iterator[Sample]:
    """What is kept of a sample, within `max_length`: itself, its beginning, its pieces or nothing."""
    length = len(sample.input_ids)
    pieces = [sample]
    if length > config.max_length:
        if config.overlong == "error":
            others = ', "truncate" or "split"' if format_ == "completion" else ' or "truncate"'
            raise DataError(
                f"{sample.where}: {length} tokens, more than max_length = {config.max_length}; "
                f'raise it, or set [data] overlong = "drop"{others}'
            )
        if config.overlong == "truncate":
            counts.truncated += 1
            pieces = [_cut(sample, 0, config.max_length)]
        elif config.overlong == "split" and format_ == "completion":
            counts.split += 1
            ends = _piece_ends(length, config.max_length)
            pieces = [_cut(sample, begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
        else:
            counts.dropped_overlong += 1
            pieces = []
    for piece in pieces:
        if piece.is_target.any():
            yield piece
        else:
            counts.zero_target += 1


def _piece_ends(length: int, most: int) -> list[int]:
    """Where the pieces of a text of `length` tokens end: each as long as can be, the last one not a single token, from
    which nothing could be learned."""
    ends = [*range(most, length, most), length]
    if most > 2 and length - ends[-2] == 1:
        ends[-2] -= 1
    return ends


def _cut(sample: Sample, begin: int, end: int) -> Sample:
    is_target = sample.is_target[begin:end].copy()
    is_target[:1] = False  # nothing comes before it to predict it from
    return attrs.evolve(
        sample,
        input_ids=sample.input_ids[begin:end],
        is_target=is_target,
        prompt_length=max(0, min(sample.prompt_length, end) - begin),
    )


def _roles(source: SourceConfig) -> Sequence[str]:
    if isinstance(source.loss_on, str):
        return ("assistant",)
    return source.loss_on


def _check_vocabulary(sample: Sample, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int | None) -> None:
    if vocabulary_size is None or int(sample.input_ids.max()) < vocabulary_size:
        return
    token_id = int(sample.input_ids.max())
    raise DataError(
        f"{sample.where}: the token {tokenizer.convert_ids_to_tokens(token_id)!r} has the id {token_id}, beyond the "
        f"model's embedding of {vocabulary_size} rows; the tokenizer does not belong to "
        "this base: name the right one in [model] tokenizer"
    )


def _nothing_left(counts: Counts, config: DataConfig, sources: Sequence[SourceConfig]) -> str:
    why = []
    if counts.dropped_overlong:
        why.append(f"{counts.dropped_overlong} are longer than max_length = {config.max_length}")
    if counts.zero_target:
        cut = f" ({counts.truncated} were cut to max_length = {config.max_length})" if counts.truncated else ""
        why.append(f"{counts.zero_target} have no target token{cut}")
    advice = []
    if counts.dropped_overlong or counts.truncated:
        advice.append("raise [data] max_length")
    if counts.zero_target > counts.truncated:
        roles = dict.fromkeys(role for source in sources for role in _roles(source))
        advice.append(f'check that the rows hold {" or ".join(roles)} messages, or set loss_on = "all"')
    reason = " and ".join(why) or "there are none"
    return f"none of the {counts.rows} rows can be used: {reason}. What helps: {'; '.join(advice) or 'add a source'}"
