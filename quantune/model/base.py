"""The base model before its weights: where it is, its configuration, its tokenizer, and its skeleton."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import attrs
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from quantune.errors import ModelError
from quantune.model import mini
from quantune.model.adoption import quantization_over, take_quantization
from quantune.model.configuration import with_values
from quantune.model.vocabulary import Additions, add_tokens, grow_embeddings
from quantune.recipe.chat_templates import template_path
from quantune.recipe.conflicts import GPU_ATTENTION
from quantune.recipe.schema import ModelConfig, QuantizationConfig

BUILT_IN = {"builtin:mini": mini.PATH}


@attrs.frozen(kw_only=True)
class Base:
    """A base model whose weights are not loaded yet."""

    name: str
    """As the recipe names it."""
    source: str
    """The folder or hub id that transformers loads."""
    revision: str | None
    trust_remote_code: bool
    attn_implementation: str | None
    config: PretrainedConfig
    """Of the checkpoint as it is, but for what the recipe replaces: its embeddings have not grown yet."""
    stored: dict[str, Any] | None = None
    """What its `config.json` says of its quantization, where the checkpoint is already quantized."""
    quantization: QuantizationConfig | None = None
    """How it is to be stored: as the recipe says, or as the checkpoint is already quantized."""
    tokenizer: PreTrainedTokenizerBase
    """With the tokens that the recipe adds."""
    additions: Additions = Additions()
    """What the recipe adds to the vocabulary."""

    @property
    def folder(self) -> Path | None:
        """The local folder, None for a hub id."""
        path = Path(self.source)
        return path if path.is_dir() else None

    @property
    def pad_id(self) -> int:
        """The id that fills up batches; what it is does not matter, no target and no attention reaches it."""
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if isinstance(token_id, int):
                return token_id
        return 0

    def loading_arguments(self) -> dict[str, Any]:
        """The arguments that every `from_pretrained` of this base takes."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def open_base(
    config: ModelConfig, quantization: QuantizationConfig | None = None, *, allow_remote_code: bool = False
) -> Base:
    """Read the configuration and the tokenizer of a base model that is to be stored as `quantization` says, or without
    that as it is.

    Raises:
        ModelError: there is no such model, it can't be read, it is already quantized in another way than
            `quantization` says, it needs code to be trusted, or it does not take the recipe's tokens or configuration.
    """
    if config.trust_remote_code and not allow_remote_code:
        raise ModelError(
            "[model] trust_remote_code = true runs Python code that comes with the base; "
            "confirm it on the command line with --trust-remote-code"
        )
    source = str(BUILT_IN.get(config.base, config.base))
    arguments: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        hf_config = AutoConfig.from_pretrained(source, **arguments)
        tokenizer_arguments = arguments if config.tokenizer is None else {"trust_remote_code": config.trust_remote_code}
        tokenizer_source = source if config.tokenizer is None else BUILT_IN.get(config.tokenizer, config.tokenizer)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_source, **tokenizer_arguments)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        nowhere = "" if Path(source).exists() else "is no folder here, and as a hub id it "
        raise ModelError(
            f"the base {json.dumps(config.base)} {nowhere}can't be opened: {_first_sentence(error)}"
        ) from error
    stored = take_quantization(hf_config)
    if stored is not None:
        quantization = quantization_over(config.base, stored, quantization)
    if config.chat_template is not None:
        tokenizer.chat_template = template_path(config.chat_template).read_text(encoding="utf-8")
    additions = add_tokens(tokenizer, config)
    return Base(
        name=config.base,
        source=source,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=None if config.attn_implementation == "auto" else config.attn_implementation,
        config=with_values(hf_config, config.config),
        stored=stored,
        quantization=quantization,
        tokenizer=tokenizer,
        additions=additions,
    )


def skeleton(base: Base) -> PreTrainedModel:
    """The model on the meta device: modules, names and shapes without weights, its embeddings as they will be.

    Raises:
        ModelError: transformers has no causal language model for this configuration, or not with this attention.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(base.config),  # growing changes it
                trust_remote_code=base.trust_remote_code,
                attn_implementation=base.attn_implementation,
            )
    except (ValueError, ImportError, KeyError) as error:  # the last for the name of an activation, say
        if base.attn_implementation is not None:
            skeleton(attrs.evolve(base, attn_implementation=None))  # or it is not the attention's fault
            raise ModelError(_attention_problem(base.attn_implementation, error)) from error
        raise ModelError(f"{base.name} is not a causal language model that transformers knows: {error}") from error
    grow_embeddings(model, base.additions)
    return model


ATTENTION_PACKAGES = {"flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn-3"}


def require_attention(config: ModelConfig, device: torch.device) -> None:
    """Require that the attention a recipe asks for trains on `device`.

    Raises:
        ModelError: it needs a GPU.
    """
    if device.type == "cpu" and config.attn_implementation in GPU_ATTENTION:
        raise ModelError(
            f'[model] attn_implementation = "{config.attn_implementation}" trains on a GPU only, and this run is on a '
            'CPU; use "auto", "sdpa" or "eager"'
        )


def _attention_problem(implementation: str, error: Exception) -> str:
    package = ATTENTION_PACKAGES.get(implementation)
    install = f"install the package {package}, or " if package and isinstance(error, ImportError) else ""
    return (
        f'[model] attn_implementation = "{implementation}" can\'t be used: {_first_sentence(error)} '
        f'What helps: {install}use "auto", "sdpa" or "eager"'
    )


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
