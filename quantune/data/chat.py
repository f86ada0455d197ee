"""Conversations through a tokenizer's chat template: text, tokens, and where in the text each role speaks.

A template that marks what the assistant says with `{% generation %}` is believed. For any other the conversation is
rendered turn by turn: an answer is what the template appends to the prompt that asks for it. A template that renders an
earlier turn differently once later turns follow can't be read that way, and is refused rather than masked wrongly.

What the other roles say is what changes when something else is said in its place, and all that changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
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


@attrs.frozen(kw_only=True)
class Turn:
    """Where in the text a message stands, without its header."""

    role: str
    """One of ROLES."""
    said: Span
    """What it says, without the end token."""
    end: Span | None
    """The end token; None where the template puts none."""

    @property
    def whole(self) -> Span:
        """From what it says to the end token."""
        return self.said[0], self.said[1] if self.end is None else self.end[1]


@attrs.frozen(kw_only=True, eq=False)
class EncodedChat:
    """A conversation as text and tokens."""

    text: str
    input_ids: Sequence[int]
    offsets: np.ndarray
    """Shape (length, 2), int64: begin and end of each token in `text`."""
    turns: list[Turn]
    """The turns of the roles that were asked for, in order."""
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
        if begin == end:
            return np.zeros(len(self.offsets), dtype=bool)
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
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str, *, roles: Collection[str]
) -> EncodedChat:
    """Render and tokenize a conversation, once, and find the turns of `roles` in it.

    Without roles no template is refused for what it does to earlier turns.

    Raises:
        DataError: there is no chat template, it refuses the messages, or it does not show where the turns are.
    """
    template = chat_template(tokenizer, where)
    if not tokenizer.is_fast:
        raise DataError(
            f"{where}: chat needs a tokenizer that knows where its tokens stand in the text (a tokenizer.json); "
            f"{type(tokenizer).__name__} does not. Name another [model] tokenizer"
        )
    text = render(tokenizer, messages, where)
    last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    marked = "assistant" in roles and last is not None and _GENERATION.search(template) is not None
    encoded = _tokenize(tokenizer, messages, text, marked)
    offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    answers: list[Span] = []
    if marked:
        answers = _runs(np.asarray(encoded["assistant_masks"], dtype=bool), offsets)
    elif "assistant" in roles:
        answers = _appended(tokenizer, messages, text, where)
    marker = end_marker(tokenizer, template) if roles else ""
    turns = [_answer(span, text, marker) for span in answers]
    for index, message in enumerate(messages):
        if message["role"] in roles and message["role"] != "assistant":
            turns.append(_turn(message["role"], _replaceable(tokenizer, messages, index, text, where), text, marker))
    return EncodedChat(
        text=text,
        input_ids=encoded["input_ids"],
        offsets=offsets,
        turns=sorted(turns, key=lambda turn: turn.said),
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


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template ends an answer with; None where that is no token of its own, or there is no
    template."""
    return tokenizer.get_added_vocab().get(_end_text(tokenizer))


def endless(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A sentence on a chat template whose answers end with nothing that stops generation; None if they do.

    Such a template is written for another tokenizer, and its marker is ordinary text here.
    """
    marker = _end_text(tokenizer)
    ids = tokenizer(marker, add_special_tokens=False, verbose=False).input_ids
    if not ids or tokenizer.eos_token_id in ids or end_token_id(tokenizer) is not None:
        return None
    found = f"{len(ids)} tokens" if len(ids) > 1 else "an ordinary token"
    return (
        f"the chat template ends an answer with {marker}, which is {found} of this tokenizer: answers will run on. "
        f"Make it the end token, [model.special_tokens] eos_token = {json.dumps(marker)}, or use another chat_template"
    )


def _end_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template puts after an answer, empty where there is no template."""
    try:
        return end_marker(tokenizer, str(tokenizer.get_chat_template())).strip()
    except ValueError:
        return ""


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


def _answer(span: Span, text: str, marker: str) -> Turn:
    """The answer in `span`, which may reach up to its end marker, behind it, or not so far: an answer whose end is
    masked teaches a model never to stop."""
    begin, end = span
    said = text[begin:end].rstrip()
    if marker and said.endswith(marker):
        end = begin + len(said) - len(marker)
    return _turn("assistant", (begin, end), text, marker)


def _turn(role: str, said: Span, text: str, marker: str) -> Turn:
    """The turn that says `said`, with the end marker that follows it; white space before the end token is said too."""
    begin, stop = said
    if not marker or not text.startswith(marker, stop):
        return Turn(role=role, said=said, end=None)
    token = stop + len(marker) - len(marker.lstrip())
    return Turn(role=role, said=(begin, token), end=(token, stop + len(marker)))


def _replaceable(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], index: int, text: str, where: str
) -> Span:
    """The stretch of text that changes when message `index` says something else, if all else stays as it is."""
    probe = _PROBE
    while probe in text:
        probe += _PROBE
    replaced = [*messages]
    replaced[index] = {**messages[index], "content": probe}
    try:
        before, found, after = render(tokenizer, replaced, where).partition(probe)
    except DataError:  # e.g. a template that reads the content
        before, found, after = text, "", ""
    begin, end = len(before), len(text) - len(after)
    once = bool(found) and probe not in after and text.startswith(before) and text.endswith(after)
    if not once or text[begin:end].strip() != messages[index]["content"].strip():
        raise DataError(
            f"{where}: can't tell which tokens message {index} ({messages[index]['role']}) says: the chat template "
            'shows it in more than one place, changes it, or leaves it out. Use loss_on = "assistant" with '
            'train_on_eos = "turn", or another [model] chat_template'
        )
    return begin, end


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
