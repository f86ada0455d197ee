"""Conversations through a tokenizer's chat template: text, tokens, and where in the text the assistant speaks.

A template that marks what the assistant says with `{% generation %}` is believed. For any other the conversation is
rendered turn by turn: an answer is what the template appends to the prompt that asks for it. A template that renders an
earlier turn differently once later turns follow can't be read that way, and is refused rather than masked wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import attrs
import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from quantune.errors import DataError

Message = dict[str, Any]
Span = tuple[int, int]
"""Begin and end, counted in characters of the rendered text."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "quantune"


@attrs.frozen(kw_only=True, eq=False)
class EncodedChat:
    """A conversation as text and tokens."""

    text: str
    input_ids: Sequence[int]
    offsets: np.ndarray
    """Shape (length, 2), int64: begin and end of each token in `text`."""
    answers: list[Span]
    """What the assistant says, in order, end tokens included; empty where nobody asked for it."""
    prompt: Span | None
    """From the beginning to where the last answer begins; None where that is not known."""

    def tokens_before(self, end: int) -> int:
        """How many tokens end at `end` or before it."""
        return int((self.offsets[:, 1] <= end).sum())

    def tokens_of(self, span: Span) -> np.ndarray:
        """Shape (length,), bool: the tokens of a span.

        Some vocabularies merge the last space before an answer with its first word. Such a token is the answer's, as
        it is with transformers' own assistant mask; one that reaches further out of the span is not.
        """
        begin, end = span
        starts, stops = self.offsets[:, 0], self.offsets[:, 1]
        chosen = (starts < end) & (stops > begin)
        for index in np.flatnonzero(chosen & ((starts < begin) | (stops > end))):
            outside = self.text[starts[index] : begin] + self.text[end : max(end, stops[index])]
            chosen[index] = not outside.strip()
        return chosen


def chat_template(tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """The tokenizer's chat template.

    Raises:
        DataError: it has none, or several and no default.
    """
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise DataError(
            f"{where}: the tokenizer has no chat template; name one in [model] chat_template, "
            'or use format = "instruct" with a template'
        ) from None


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str, *, add_generation_prompt: bool = False
) -> str:
    """The messages as text, by the tokenizer's chat template.

    Raises:
        DataError: the template refuses them.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"{where}: the chat template refuses the messages: {error}") from error
    return str(text)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str, *, find_answers: bool
) -> EncodedChat:
    """Render and tokenize a conversation, once, and find the assistant's part of it.

    Args:
        find_answers: fill `answers`; without it no template is refused for what it does to earlier turns.

    Raises:
        DataError: there is no chat template, it refuses the messages, or it does not show where the answers are.
    """
    template = chat_template(tokenizer, where)
    if not tokenizer.is_fast:
        raise DataError(
            f"{where}: chat needs a tokenizer that knows where its tokens stand in the text (a tokenizer.json); "
            f"{type(tokenizer).__name__} does not. Name another [model] tokenizer"
        )
    text = render(tokenizer, messages, where)
    last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    marked = find_answers and last is not None and _GENERATION.search(template) is not None
    encoded = _tokenize(tokenizer, messages, text, marked)
    offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    answers: list[Span] = []
    if marked:
        answers = _runs(np.asarray(encoded["assistant_masks"], dtype=bool), offsets)
    elif find_answers:
        answers = _appended(tokenizer, messages, text, where)
    if answers:
        marker = end_marker(tokenizer, template)
        answers = [_with_end(span, text, marker) for span in answers]
    return EncodedChat(
        text=text,
        input_ids=encoded["input_ids"],
        offsets=offsets,
        answers=answers,
        prompt=None if last is None else _prompt_of_last(tokenizer, messages[:last], text, where, answers),
    )


@lru_cache(maxsize=8)
def end_marker(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """What the template puts after an answer to end it, e.g. `<|im_end|>`; the end token if that can't be seen."""
    messages = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
    try:
        _, found, tail = render(tokenizer, messages, "probe").rpartition(_PROBE)
    except DataError:  # e.g. a template that insists on a system message
        found, tail = "", ""
    return (tail.rstrip() if found else "") or str(tokenizer.eos_token or "")


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str, marked: bool
) -> dict[str, Any]:
    options: dict[str, Any] = {"return_offsets_mapping": True, "verbose": False}
    if not marked:
        return dict(tokenizer(text, add_special_tokens=False, **options))
    return dict(
        tokenizer.apply_chat_template(  # type: ignore[arg-type]  # a BatchEncoding, as return_dict says
            list(messages), return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs=options
        )
    )


def _runs(mask: np.ndarray, offsets: np.ndarray) -> list[Span]:
    """The stretches of text whose tokens are marked; `mask` has shape (length,), bool."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return [(int(offsets[start, 0]), int(offsets[stop - 1, 1])) for start, stop in edges.reshape(-1, 2)]


def _appended(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str, where: str) -> list[Span]:
    """The stretches of text that each assistant message adds to the prompt that asks for it."""
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise DataError(_unclear(where, "the conversation begins with the assistant"))
        prompt = render(tokenizer, messages[:index], where, add_generation_prompt=True)
        through = text if index == len(messages) - 1 else render(tokenizer, messages[: index + 1], where)
        through = through.rstrip()
        if not text.startswith(through) or not (through.startswith(prompt) or through == prompt.rstrip()):
            raise DataError(_unclear(where, "the chat template renders a turn differently when others follow"))
        spans.append((len(prompt), max(len(prompt), len(through))))
    return spans


def _unclear(where: str, why: str) -> str:
    return (
        f"{where}: can't tell which tokens the assistant says: {why}. Put {{% generation %}} and {{% endgeneration %}} "
        "around what the assistant says in a copy of the chat template and name it in [model] chat_template, or use "
        'loss_on = "all"'
    )


def _with_end(span: Span, text: str, marker: str) -> Span:
    """The span up to its end marker: an answer whose end is masked teaches a model never to stop."""
    begin, end = span
    said = text[begin:end].rstrip()
    if marker and said.endswith(marker):
        return begin, begin + len(said)
    if marker and text.startswith(marker, end):
        return begin, end + len(marker)
    return span


def _prompt_of_last(
    tokenizer: PreTrainedTokenizerBase, before: Sequence[Message], text: str, where: str, answers: list[Span]
) -> Span | None:
    """The prompt that asks for the last answer; where the template gives none, all before the answer."""
    try:
        prompt = render(tokenizer, before, where, add_generation_prompt=True) if before else None
    except DataError:  # some templates refuse a conversation that ends here
        prompt = None
    if prompt and text.startswith(prompt):
        return 0, len(prompt)
    return (0, answers[-1][0]) if answers else None
