"""The text a comparison is made on, and its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from quantune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN = "built-in"
MIN_TOKENS = 16
MAX_TOKENS = 8192
"""Tokens compared by default, of longer texts the first ones."""
WINDOW = 512
"""Tokens a prediction is made from at most, as in the training of the built-in model."""


@attrs.frozen(kw_only=True)
class Text:
    """A text with its name."""

    name: str
    content: str


@attrs.frozen(kw_only=True)
class Windows:
    """A text cut into sequences that are predicted one by one."""

    rows: tuple[tuple[int, ...], ...]
    """Token ids; each row begins with the tokenizer's begin token where it has one."""
    text_tokens: int
    """Tokens of the whole text, that one left out."""

    @property
    def predicted(self) -> int:
        """How many tokens are predicted: all but the first of each row."""
        return sum(len(row) - 1 for row in self.rows)


def built_in_text() -> Text:
    """English, a little code and JSON, that come with the package."""
    return Text(name=BUILT_IN, content=(Path(__file__).parent / "text.txt").read_text(encoding="utf-8"))


def read_text(path: Path) -> Text:
    """The text in a UTF-8 file.

    Raises:
        InputError: there is no such file, it can't be read, it is not UTF-8, or it is blank.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"--text: expected a text file in UTF-8, found other bytes at {error.start} in {path}"
        ) from error
    except OSError as error:
        raise InputError(f"--text: expected a text file, {path} can't be read: {error.strerror}") from error
    if not content.strip():
        raise InputError(f"--text: expected a text, {path} is blank")
    return Text(name=str(path), content=content)


def cut(text: Text, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, window: int) -> Windows:
    """Tokenize the first `max_tokens` tokens of `text` and cut them into rows of at most `window` tokens.

    Raises:
        InputError: the text has fewer than 16 tokens.
    """
    ids = list(tokenizer(text.content, verbose=False).input_ids)
    begin = ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
    ids = ids[len(begin) :]
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()  # some tokenizers end every text
    if len(ids) < MIN_TOKENS:
        raise InputError(
            f"the text {text.name} has {len(ids)} tokens; expected at least {MIN_TOKENS}, better a few hundred: "
            "perplexity and KL are means over them"
        )
    used, size = ids[:max_tokens], window - len(begin)
    rows = [(*begin, *used[start : start + size]) for start in range(0, len(used), size)]
    return Windows(rows=tuple(row for row in rows if len(row) > 1), text_tokens=len(ids))
