"""From an example to tokens, and to which of them are targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import numpy as np
from transformers import PreTrainedTokenizerBase

from quantune.data.chat import Message, Span, Turn, encode_chat, render
from quantune.data.formats import Conversation, PlainText
from quantune.recipe.schema import ROLES


@attrs.frozen(kw_only=True, eq=False)
class Sample:
    """One tokenized example."""

    input_ids: np.ndarray
    """Shape (length,), int32."""
    is_target: np.ndarray
    """Shape (length,), bool: the tokens that the loss is about."""
    where: str
    """The row it came from."""
    prompt_length: int
    """How many leading tokens make the prompt of the last answer, 0 where there is none."""
    reference: str | None = None
    """The last answer's text, None where there is none to compare with."""
    row: int = 0
    """The number of that row among all that were read; the pieces of one text share it."""
    positions: np.ndarray | None = None
    """Shape (length,), int32: where each token stands in its own sample, for several samples packed into one row."""


def tokenize(
    example: Conversation | PlainText,
    tokenizer: PreTrainedTokenizerBase,
    *,
    where: str,
    loss_on: str | tuple[str, ...] = "assistant",
    train_on_eos: str = "turn",
) -> Sample:
    """Tokenize one example; `loss_on` and `train_on_eos` are those of its source.

    Raises:
        DataError: the tokenizer has no chat template, or the template does not show where the turns are.
    """
    trained = ROLES if loss_on == "all" else (loss_on,) if isinstance(loss_on, str) else loss_on
    if isinstance(example, PlainText):
        return _plain(example, tokenizer, where, trained)
    return _conversation(example.messages, tokenizer, where, None if loss_on == "all" else trained, train_on_eos)


def _plain(example: PlainText, tokenizer: PreTrainedTokenizerBase, where: str, trained: Sequence[str]) -> Sample:
    end = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    if not example.prompt:
        ids = _without_end(tokenizer(example.response, verbose=False).input_ids, end) + end
        return _sample(ids, np.ones(len(ids), dtype=bool), where, 0, None)
    prompt = _without_end(tokenizer(example.prompt, verbose=False).input_ids, end)
    response = [*tokenizer(example.response, add_special_tokens=False, verbose=False).input_ids, *end]
    is_target = np.full(len(prompt) + len(response), "assistant" in trained)
    is_target[: len(prompt)] = "user" in trained
    return _sample(prompt + response, is_target, where, len(prompt), example.response)


def _without_end(ids: Sequence[int], end: list[int]) -> list[int]:
    """The tokens without the end token that some tokenizers put after every text."""
    return list(ids[:-1] if len(ids) > 1 and [ids[-1]] == end else ids)


def _conversation(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    trained: Sequence[str] | None,
    train_on_eos: str,
) -> Sample:
    """A conversation; all of it is a target where no roles are `trained`."""
    roles = set(trained or ())
    if roles and train_on_eos in ("all", "last"):
        roles |= {message["role"] for message in (messages if train_on_eos == "all" else messages[-1:])}
    chat = encode_chat(tokenizer, messages, where, roles=roles)
    is_target = np.full(len(chat.input_ids), trained is None)
    for span in _target_spans(chat.turns, trained or (), train_on_eos):
        is_target |= chat.tokens_of(span)
    prompt_length, reference = 0, None
    if chat.prompt is not None:
        prompt_length = chat.tokens_before(chat.prompt[1])
        reference = next(message["content"] for message in reversed(messages) if message["role"] == "assistant")
    return _sample(chat.input_ids, is_target, where, prompt_length, reference)


def _target_spans(turns: Sequence[Turn], trained: Sequence[str], train_on_eos: str) -> Iterator[Span]:
    """What is learned: what the trained roles say, and the end tokens that `train_on_eos` names."""
    last = max((index for index, turn in enumerate(turns) if turn.end is not None), default=None)
    for index, turn in enumerate(turns):
        is_trained = turn.role in trained
        with_end = {"turn": is_trained, "all": True, "last": index == last, "none": False}[train_on_eos]
        if is_trained:
            yield turn.whole if with_end else turn.said
        elif with_end and turn.end is not None:
            yield turn.end


def _sample(ids: Sequence[int], is_target: np.ndarray, where: str, prompt_length: int, reference: str | None) -> Sample:
    is_target[:1] = False  # nothing comes before the first token to predict it from
    return Sample(
        input_ids=np.asarray(ids, dtype=np.int32),
        is_target=is_target,
        where=where,
        prompt_length=prompt_length,
        reference=reference,
    )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Conversation | PlainText) -> list[int]:
    """The tokens that ask for an answer to `prompt`."""
    if isinstance(prompt, PlainText):
        end = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
        return _without_end(tokenizer(prompt.prompt).input_ids, end)
    text = render(tokenizer, prompt.messages, "the prompt", add_generation_prompt=True)
    encoded: Any = tokenizer(text, add_special_tokens=False)
    return list(encoded.input_ids)
