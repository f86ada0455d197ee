"""What a checkpoint has beside its weights: configuration, tokenizer, generation configuration, chat template."""

from __future__ import annotations

import copy
import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from quantune.model.base import Base
from quantune.recipe.schema import ModelConfig, SpecialTokensConfig
from quantune.streaming.source import WEIGHTS

LEFT = (*WEIGHTS, "config.json", "README.md", ".*", "*.lock", "merge.json", "quantize.json")
"""Files of a base that are not copied: weights, what is written anew, and what tells of the base alone."""
UNLIKE = ("quantization_config", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures")
"""Keys of a configuration that transformers sets by itself."""
TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "*.model",
)
ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")
ROPE_BEFORE = ("rope_scaling", "rope_theta")
"""What older configurations call parts of `rope_parameters`."""


def companion_bytes(folder: Path) -> int:
    """About how much disk the files beside the weights of the base in `folder` take."""
    files = [path for path in folder.iterdir() if path.is_file()]
    return sum(path.stat().st_size for path in files if not any(fnmatch.fnmatch(path.name, one) for one in LEFT))


def write_companions(
    out: Path,
    base: Base,
    folder: Path,
    setting: ModelConfig,
    model: PreTrainedModel,
    *,
    dtype: torch.dtype,
    untied: bool = False,
    quantization_config: dict[str, Any] | None = None,
) -> None:
    """Write everything but the weights; `config.json` last, without which the folder is no model.

    Args:
        folder: that of the base.
        setting: what the recipe says of the base.
        model: the base on the meta device, with what the recipe changes of it.
        dtype: what the weights are computed in.
        untied: embedding and output head became two weights.
        quantization_config: what `config.json` says of packed weights.
    """
    other = _other_tokenizer(setting)
    own_code = hasattr(model.config, "auto_map")
    left = (*LEFT, *(TOKENIZER if other else ()), *(() if own_code else ("*.py",)))
    for path in sorted(folder.iterdir()):
        if path.is_file() and not any(fnmatch.fnmatch(path.name, pattern) for pattern in left):
            shutil.copyfile(path, out / path.name)
    if other:
        base.tokenizer.save_pretrained(out)
        _write_roles(out / "generation_config.json", base)
    document = _config(folder, model)
    if other:
        document.update(_roles(base))
    document.pop("torch_dtype", None)
    document["dtype"] = str(dtype).removeprefix("torch.")
    if untied:
        document["tie_word_embeddings"] = False
    document.pop("quantization_config", None)
    if quantization_config is not None:
        document["quantization_config"] = quantization_config
    (out / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _config(folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    """The base's `config.json`, with what the recipe changes of it."""
    own = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    before = type(model.config).from_dict(copy.deepcopy(own)).to_dict()
    now = model.config.to_dict()
    changed = {key: now[key] for key in now if key not in UNLIKE and now[key] != before.get(key)}
    if "rope_parameters" in changed:
        own = {key: value for key, value in own.items() if key not in ROPE_BEFORE}
    return {**own, **changed}


def _other_tokenizer(setting: ModelConfig) -> bool:
    """Whether the recipe gives the base another tokenizer, tokens or chat template."""
    plain = setting.tokenizer is None and setting.chat_template is None and not setting.added_tokens
    return not plain or setting.special_tokens != SpecialTokensConfig()


def _roles(base: Base) -> dict[str, int]:
    return {role: getattr(base.tokenizer, role) for role in ROLES if getattr(base.tokenizer, role) is not None}


def _write_roles(path: Path, base: Base) -> None:
    """Let generating begin and stop at the tokens that the tokenizer says."""
    if path.is_file():
        document = {**json.loads(path.read_text(encoding="utf-8")), **_roles(base)}
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
