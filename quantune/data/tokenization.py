"""From an example to tokens, and to which of them are targets."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from quantune.data.formats import Conversation, PlainText
from quantune.errors import DataError

Span = tuple[int, int]


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
    """How many leading tokens make the prompt of the last answer."""
    reference: str | None = None
    """The last answer's text, None where there is none to compare with."""


def tokenize(
    example: Conversation | PlainText, tokenizer: PreTrainedTokenizerBase, *, where: str, loss_on: str
) -> Sample:
    """Tokenize one example.

    Raises:
        DataError: the tokenizer has no chat template, or the template does not show where the answers are.
    """
    if isinstance(example, PlainText):
        return _plain(example, tokenizer, where, loss_on)
    return _conversation(example.messages, tokenizer, where, loss_on)


def _plain(example: PlainText, tokenizer: PreTrainedTokenizerBase, where: str, loss_on: str) -> Sample:
    end = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    if not example.prompt:
        ids = [*tokenizer(example.response).input_ids]
        ids += [] if ids[-1:] == end else end
        return _sample(ids, [(1, len(ids))], where, 0, None)
    prompt = [*tokenizer(example.prompt).input_ids]
    if prompt[-1:] == end and end:
        prompt.pop()  # some tokenizers close every text
    response = [*tokenizer(example.response, add_special_tokens=False).input_ids, *end]
    ids = prompt + response
    start = 1 if loss_on == "all" else len(prompt)
    return _sample(ids, [(start, len(ids))], where, len(prompt), example.response)


def _conversation(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str, loss_on: str
) -> Sample:
    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: the tokenizer has no chat template; name one in [model] chat_template, "
            'or use format = "instruct" with a template'
        )
    text = render(tokenizer, messages, where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets: list[Span] = encoded["offset_mapping"]
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = {index: render(tokenizer, messages[:index], where, add_generation_prompt=True) for index in answers}
    spans = _answer_spans(tokenizer, messages, answers, prompts, text, where)
    if loss_on == "all":
        spans = [(1, len(text))]
    last = answers[-1] if answers else None
    prompt_length = 0
    if last is not None:
        boundary = len(prompts[last]) if text.startswith(prompts[last]) else spans[-1][0]
        prompt_length = sum(end <= boundary for _, end in offsets)
    tokens = [(_first_token(offsets, start), _last_token(offsets, stop)) for start, stop in spans]
    reference = None if last is None else messages[last]["content"]
    return _sample(encoded["input_ids"], tokens, where, prompt_length, reference)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    where: str,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The messages as text, by the tokenizer's chat template.

    Raises:
        DataError: the template refuses them.
    """
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise DataError(f"{where}: the chat template refuses the messages: {error}") from error
    assert isinstance(text, str)
    return text


def _answer_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    answers: list[int],
    prompts: dict[int, str],
    text: str,
    where: str,
) -> list[Span]:
    """Where in the rendered text each answer stands, its end token included.

    An answer is what the template appends to its prompt. A template that renders an earlier turn differently once
    later turns follow would give a wrong mask that way, so that is an error.
    """
    spans = []
    for index in answers:
        last = index == len(messages) - 1
        through = text if last else render(tokenizer, messages[: index + 1], where)
        if not text.startswith(through.rstrip()) or not through.startswith(prompts[index]):
            raise DataError(
                f"{where}: can't tell which tokens the assistant says: the chat template renders a turn differently "
                'when others follow. Name another [model] chat_template, or use loss_on = "all"'
            )
        start, stop = len(prompts[index]), len(through.rstrip())
        spans.append((start, max(start, stop)))
    return spans


def _first_token(offsets: list[Span], start: int) -> int:
    """The first token that begins at `start` or after it."""
    return next((index for index, (begin, _) in enumerate(offsets) if begin >= start), len(offsets))


def _last_token(offsets: list[Span], stop: int) -> int:
    """One past the last token that ends at `stop` or before it."""
    return next((index + 1 for index in range(len(offsets) - 1, -1, -1) if offsets[index][1] <= stop), 0)


def _sample(ids: list[int], spans: list[Span], where: str, prompt_length: int, reference: str | None) -> Sample:
    is_target = np.zeros(len(ids), dtype=bool)
    for start, stop in spans:
        is_target[start:stop] = True
    is_target[:1] = False  # nothing comes before the first token to predict it from
    return Sample(
        input_ids=np.asarray(ids, dtype=np.int32),
        is_target=is_target,
        where=where,
        prompt_length=prompt_length,
        reference=reference,
    )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The tokens of a user's prompt: through the chat template if there is one, as plain text otherwise."""
    if not tokenizer.chat_template:
        return list(tokenizer(prompt).input_ids)
    text = render(tokenizer, [{"role": "user", "content": prompt}], "the prompt", add_generation_prompt=True)
    encoded: Any = tokenizer(text, add_special_tokens=False)
    return list(encoded.input_ids)
