"""What of a recipe may change while a run is interrupted.

A key is of one of three classes:

harmless   the trained bytes can't differ, or what could differ is compared by its content (data by its tokens)
allowed    the run goes on and is not the one that was begun; wants `--allow-change KEY`
never      the run could not go on, or would train something else

Recipes are compared as they were resolved. What a person wrote is kept beside it: a value that only this machine or
world size resolved differently is no change of the recipe, and is warned of.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

import attrs

from quantune.errors import InputError, ResumeError

Effect = Literal["harmless", "allowed", "never"]

_SOURCE_KEYS = (
    *("path", "dataset", "data_files", "name", "split", "revision", "format", "messages_column", "message_keys"),
    *("roles", "drop_system_message", "prompt_column", "response_column", "text_column", "template", "input_column"),
    *("template_no_input", "loss_on", "train_on_eos", "limit"),
)
"""Of a source; the tokens that it comes to are compared."""

EFFECTS: dict[str, Effect] = {
    "model.base": "never",
    "model.revision": "never",
    "model.tokenizer": "never",
    "model.chat_template": "never",
    "model.special_tokens.bos_token": "never",
    "model.special_tokens.eos_token": "never",
    "model.special_tokens.pad_token": "never",
    "model.special_tokens.unk_token": "never",
    "model.special_tokens.additional_special_tokens": "never",
    "model.added_tokens": "never",
    "model.pad_vocabulary_to_multiple_of": "never",
    "model.config": "never",
    "model.attn_implementation": "allowed",  # rounds otherwise
    "model.trust_remote_code": "allowed",  # another implementation of the same model
    "quantization.backend": "never",
    "quantization.skip": "never",
    "quantization.experts": "never",
    "quantization.options": "never",
    "adapter.type": "never",
    "adapter.r": "never",
    "adapter.alpha": "never",  # the update that was learned would be scaled at once
    "adapter.dropout": "allowed",
    "adapter.targets": "never",
    "adapter.target_parameters": "never",
    "adapter.start_from": "never",
    "adapter.use_rslora": "never",
    "adapter.use_dora": "never",
    "adapter.init": "never",
    "adapter.loftq_iterations": "never",
    "adapter.bias": "never",
    "adapter.modules_to_save": "never",
    **{f"data.train.{key}": "harmless" for key in _SOURCE_KEYS},
    **{f"data.eval.{key}": "harmless" for key in _SOURCE_KEYS},
    "data.eval_size": "never",
    "data.max_length": "allowed",  # with the same tokens, batches that are padded to it round otherwise
    "data.overlong": "harmless",
    "data.packing": "never",
    "data.pad_to_max_length": "allowed",
    "data.shuffle": "never",
    "training.max_steps": "allowed",
    "training.epochs": "allowed",
    "training.batch_size": "never",
    "training.micro_batch_size": "allowed",  # rounds otherwise, and draws other dropout
    "training.learning_rate": "allowed",
    "training.schedule": "allowed",
    "training.min_lr_ratio": "allowed",
    "training.warmup_steps": "allowed",
    "training.warmup_ratio": "allowed",
    "training.optimizer": "never",
    "training.beta1": "allowed",
    "training.beta2": "allowed",
    "training.eps": "allowed",
    "training.weight_decay": "allowed",
    "training.loraplus_lr_ratio": "never",  # other groups of parameters
    "training.max_grad_norm": "allowed",
    "training.activation_checkpointing": "allowed",
    "training.compile": "allowed",
    "training.precision": "allowed",
    "training.tf32": "allowed",
    "training.device": "allowed",
    "training.seed": "never",
    "training.qat.lora_base": "never",
    "training.qat.activation_dtype": "never",
    "training.qat.fake_quant_after_steps": "allowed",
    "evaluation.every_steps": "harmless",
    "evaluation.per_epoch": "harmless",
    "evaluation.at_start": "harmless",
    "evaluation.at_end": "harmless",
    "evaluation.batch_size": "harmless",
    "evaluation.exact_match": "harmless",
    "evaluation.max_new_tokens": "harmless",
    "evaluation.max_samples": "harmless",
    "checkpoint.every_steps": "harmless",
    "checkpoint.per_epoch": "harmless",
    "checkpoint.keep": "harmless",
    "logging.every_steps": "harmless",
    "distributed.processes": "harmless",  # the world size is compared apart: by itself, it never needs a flag
    "distributed.max_restarts": "harmless",
    "distributed.timeout": "harmless",
    "distributed.cpu_offload": "allowed",  # the optimizer computes on another device
    "distributed.threads": "allowed",  # sums are split otherwise
    "output.dir": "harmless",
}
"""Every key of the recipe. The options of a backend are one entry."""

_FILES = ("model.base", "model.tokenizer", "model.chat_template", "adapter.start_from")
"""Keys that may name a file or folder, whose content is compared: it may lie elsewhere than it did."""

_BECOMES = {
    "training.epochs": "training.max_steps",
    "training.warmup_ratio": "training.warmup_steps",
    "evaluation.per_epoch": "evaluation.every_steps",
    "checkpoint.per_epoch": "checkpoint.every_steps",
}
"""Keys that a resolved recipe says by another one."""


@attrs.frozen(kw_only=True)
class Change:
    """A key that is not what it was."""

    key: str
    """Its path, e.g. `data.train[0].limit`."""
    before: Any
    """Its value; None where it was not set."""
    now: Any
    """Its value; None where it is not set."""
    effect: Effect
    """Its class."""

    @property
    def flag(self) -> str:
        """The key as `--allow-change` takes it."""
        return _without_indices(self.key)

    def __str__(self) -> str:
        return f"{self.key} was {_shown(self.before)}, is {_shown(self.now)}"


@attrs.frozen(kw_only=True)
class Comparison:
    """How a recipe differs from the one a run was begun with."""

    changes: tuple[Change, ...]
    """What was changed, in the order of the recipe."""
    resolved_otherwise: tuple[Change, ...]
    """What nobody changed and came out differently here: another machine or world size."""


def compare(
    written_before: Mapping[str, Any],
    resolved_before: Mapping[str, Any],
    written_now: Mapping[str, Any],
    resolved_now: Mapping[str, Any],
) -> Comparison:
    """Compare two recipes, each as it was written and as it was resolved, as `quantune.recipe.resolve.to_dict` gives
    them.
    """
    written = dict(_leaves(written_before)), dict(_leaves(written_now))
    resolved = dict(_leaves(resolved_before)), dict(_leaves(resolved_now))
    changes, resolved_otherwise = [], []
    for key in dict.fromkeys(key for leaves in (*resolved, *written) for key in leaves):
        becomes = _BECOMES.get(key)
        rewritten = written[0].get(key) != written[1].get(key)
        if becomes is not None:
            told = written[0].get(becomes) != written[1].get(becomes)  # by the change of that key
            differs = rewritten and not told and resolved[0].get(becomes) != resolved[1].get(becomes)
            before, now = written[0].get(key), written[1].get(key)
        else:
            before, now = resolved[0].get(key), resolved[1].get(key)
            differs = before != now
        if not differs:
            continue
        change = Change(key=key, before=before, now=now, effect=_effect(key, before, now))
        if rewritten or change.effect == "never":
            changes.append(change)
        elif change.effect == "allowed":
            resolved_otherwise.append(change)
    sources = [key for key, source in _BECOMES.items() if any(change.key == key for change in changes)]
    explained = {_BECOMES[key] for key in sources}
    if any(change.key in ("training.max_steps", "training.epochs") for change in changes):
        explained.add("training.warmup_steps")  # a share of all steps
    return Comparison(
        changes=tuple(changes),
        resolved_otherwise=tuple(change for change in resolved_otherwise if change.key not in explained),
    )


def require_allowed(
    changes: Collection[Change], allow: Collection[str], *, earlier: Collection[str], what: str
) -> None:
    """Require that every change is harmless or allowed, and that every key in `allow` names one.

    Args:
        changes: see `compare`.
        allow: keys given as `--allow-change`.
        earlier: keys that this run was allowed to change before; a launcher repeats its command.
        what: what the run goes on from.

    Raises:
        ResumeError: listing every change, its class, and how to go on.
        InputError: a key of `allow` can't be changed or did not change.
    """
    require_allowable(allow)
    refused = [change for change in changes if not _passes(change, allow)]
    if refused:
        raise ResumeError(_refusal(changes, what))
    idle = [key for key in allow if key not in earlier and all(change.flag != key for change in changes)]
    if idle:
        raise InputError(f"--allow-change {idle[0]}: expected a key that changed, and it is what it was; leave it out")


def require_allowable(allow: Collection[str]) -> None:
    """Require that `allow` holds keys of a recipe that can change.

    Raises:
        InputError: one is unknown, or can't change in a run.
    """
    for key in allow:
        effect = EFFECTS.get(key)
        if effect is None:
            near = difflib.get_close_matches(key, EFFECTS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise InputError(f"--allow-change {key}: expected a key of the recipe as section.key, found none{hint}")
        if effect == "never":
            raise InputError(
                f"--allow-change {key}: a run can't go on with another {key}. Put it back, or start again with "
                "--overwrite"
            )


def _passes(change: Change, allow: Collection[str]) -> bool:
    return change.effect == "harmless" or (change.effect == "allowed" and change.flag in allow)


def _refusal(changes: Collection[Change], what: str) -> str:
    ways = {
        "harmless": "harmless",
        "allowed": "the run goes on, and is not the one that was begun: --allow-change {key}",
        "never": "a run can't go on with another one: put it back",
    }
    lines = [f"  {change}  ({ways[change.effect].format(key=change.flag)})" for change in changes]
    back = [change.key for change in changes if change.effect == "never"]
    flags = [f"--allow-change {key}" for key in dict.fromkeys(c.flag for c in changes if c.effect == "allowed")]
    put_back = f"put {', '.join(back)} back" if back else ""
    resume = " ".join(["--resume", *flags])
    way = f"{put_back} and give {resume}" if back and flags else put_back or f"give {resume}"
    return "\n".join(
        [f"{what} can't be resumed with the recipe as it is now:", *lines, f"{way}, or start again with --overwrite"]
    )


def _effect(key: str, before: Any, now: Any) -> Effect:
    name = _without_indices(key)
    if name in _FILES and all(isinstance(value, str) and os.path.isabs(value) for value in (before, now)):
        return "harmless"
    if name.startswith("quantization."):
        return EFFECTS.get(name, EFFECTS["quantization.options"])
    return EFFECTS.get(name, "never")


def _leaves(document: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that has a class, with its value."""
    for name, value in document.items():
        key = f"{where}.{name}" if where else name
        if _without_indices(key) in EFFECTS:
            yield key, _plain(value)
        elif isinstance(value, Mapping):
            yield from _leaves(value, key)
        elif isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
            for index, item in enumerate(value):
                yield from _leaves(item, f"{key}[{index}]")
        elif value not in ([], ()):
            yield key, _plain(value)


def _plain(value: Any) -> Any:
    """As JSON has it: one of the recipes was read back."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _without_indices(key: str) -> str:
    return re.sub(r"\[\d+\]", "", key)


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    text = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
