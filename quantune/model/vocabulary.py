"""Tokens that a recipe adds to a vocabulary, and the rows of the embeddings that they take.

The tokenizer gets them when the base is opened. The embedding and the output head, which are never packed, grow once
the base is loaded, in one way for training, resuming and generating; new rows are the mean of the old ones.
"""

from __future__ import annotations

import json
from typing import Any

import attrs
import torch
from tokenizers import AddedToken, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantune.errors import ModelError
from quantune.recipe.schema import ModelConfig, SpecialTokensConfig

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
ROWS_AT_A_TIME = 4096


@attrs.frozen(kw_only=True)
class Additions:
    """What a recipe adds to a vocabulary."""

    tokens: tuple[str, ...] = ()
    """Tokens that the vocabulary lacked and that a model reads or writes, by rising id. One that only pads is not among
    them: no target and no attention reaches it."""
    rows: int = 0
    """Rows that an embedding needs for every added token; 0 where none was added."""
    multiple: int = 1
    """The rows are a multiple of this."""

    def rows_of(self, present: int) -> int:
        """Rows of an embedding that had `present`; it never shrinks."""
        return -(-max(present, self.rows) // self.multiple) * self.multiple


def add_tokens(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> Additions:
    """Give the tokenizer the tokens of a recipe, in place.

    Raises:
        ModelError: an added token is an ordinary one already, or the tokenizer frames texts with a token of its own in
            a way that can't be changed.
    """
    special, multiple = config.special_tokens, config.pad_vocabulary_to_multiple_of or 1
    if special == SpecialTokensConfig() and not config.added_tokens:
        return Additions(multiple=multiple)
    roles = {role: getattr(special, role) for role in ROLES if getattr(special, role) is not None}
    before = set(tokenizer.get_vocab())
    for token in config.added_tokens:
        if token in before and token not in tokenizer.get_added_vocab():
            raise ModelError(
                f"[model] added_tokens: {json.dumps(token)} is an ordinary token of the vocabulary already; added, it "
                "would be cut out of every word that holds it. Leave it out, or if that is what you want name it in "
                "[model.special_tokens] additional_special_tokens"
            )
    replaced = {getattr(tokenizer, role): token for role, token in roles.items() if role in ("bos_token", "eos_token")}
    tokenizer.add_special_tokens(
        {**roles, "extra_special_tokens": list(special.additional_special_tokens)}, replace_extra_special_tokens=False
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in config.added_tokens])
    _frame_with(tokenizer, {old: new for old, new in replaced.items() if old not in (None, new)})
    new = {token: index for token, index in tokenizer.get_vocab().items() if token not in before}
    return Additions(
        tokens=tuple(sorted(new.keys() - _only_padding(special, config.added_tokens), key=new.__getitem__)),
        rows=max(new.values(), default=-1) + 1,
        multiple=multiple,
    )


@torch.no_grad()
def grow_embeddings(model: PreTrainedModel, additions: Additions) -> None:
    """Give the embedding and the output head, tied or not, a row for every token; in place.

    Raises:
        ModelError: the architecture's embeddings can't grow.
    """
    if additions == Additions():
        return
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    present, head_rows = embedding.weight.shape[0], 0 if head is None else head.weight.shape[0]
    rows = additions.rows_of(present)
    if rows == present:
        return
    try:
        model.resize_token_embeddings(rows, mean_resizing=False)  # the other choice draws rows at random
    except (TypeError, NotImplementedError) as error:
        raise ModelError(
            f"the embeddings of {type(model).__name__} can't grow from {present} to {rows} rows: {error}. Leave out "
            "[model] added_tokens, special_tokens that the vocabulary lacks, and pad_vocabulary_to_multiple_of"
        ) from error
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    fill_with_mean(embedding.weight, present)
    if head is not None and head.weight is not embedding.weight:
        fill_with_mean(head.weight, head_rows)
    if getattr(head, "bias", None) is not None:
        fill_with_mean(head.bias, head_rows)


def fill_with_mean(weight: Tensor, old: int) -> None:
    """Set the rows from `old` on to the mean of those before them, summed in fp64 so that threads don't change it."""
    total = weight.new_zeros(weight.shape[1:], dtype=torch.float64)
    for start in range(0, old, ROWS_AT_A_TIME):
        total += weight[start : min(old, start + ROWS_AT_A_TIME)].sum(dim=0, dtype=torch.float64)
    weight[old:] = (total / old).to(weight.dtype)


def _only_padding(special: SpecialTokensConfig, added: tuple[str, ...]) -> set[str | None]:
    others = (special.bos_token, special.eos_token, special.unk_token, *special.additional_special_tokens, *added)
    return {special.pad_token} - {*others}


def _frame_with(tokenizer: PreTrainedTokenizerBase, renamed: dict[str, str]) -> None:
    """Put new tokens around texts where the old ones stood: a `tokenizer.json` names them apart from their roles."""
    if not renamed or not tokenizer.is_fast:
        return
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]  # fast tokenizers have it
    described = json.loads(backend.to_str())["post_processor"]
    if isinstance(backend.post_processor, processors.Sequence):
        for index, part in enumerate(described["processors"]):
            if part["type"] == "TemplateProcessing":
                backend.post_processor[index] = _template(part, renamed, tokenizer)
    elif described is not None and described["type"] == "TemplateProcessing":
        backend.post_processor = _template(described, renamed, tokenizer)
    framed = tokenizer.convert_ids_to_tokens(tokenizer("", verbose=False).input_ids)
    left = [old for old in renamed if old in framed and old not in renamed.values()]
    if left:
        raise ModelError(
            f"[model.special_tokens] replaces {left[0]}, and this tokenizer's post-processor still puts it around "
            "texts; leave the token as it is, or change tokenizer.json and name its folder in [model] tokenizer"
        )


def _template(
    described: dict[str, Any], renamed: dict[str, str], tokenizer: PreTrainedTokenizerBase
) -> processors.TemplateProcessing:
    """The template of a `tokenizer.json` with tokens renamed."""

    def pieces(part: list[dict[str, Any]]) -> list[str]:
        made = []
        for piece in part:
            ((kind, value),) = piece.items()
            name = f"${value['id']}" if kind == "Sequence" else renamed.get(value["id"], value["id"])
            made.append(f"{name}:{value['type_id']}")
        return made

    ids = {name: entry["ids"] for name, entry in described["special_tokens"].items() if name not in renamed}
    for new in renamed.values():
        ids[new] = [tokenizer.convert_tokens_to_ids(new)]
    return processors.TemplateProcessing(
        single=pieces(described["single"]),
        pair=pieces(described["pair"]),
        special_tokens=[{"id": name, "ids": found, "tokens": [name]} for name, found in ids.items()],
    )
