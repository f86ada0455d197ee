"""What a run needs to go on as if it had not stopped: tensors in safetensors, the rest in JSON, no pickle.

adapter_state.safetensors   the trained parameters, by name, at their training dtype
optimizer.safetensors       the optimizer's tensors, as `<parameter name>/<key>`
state.json                  the optimizer's other values and its groups, the random number generators, progress, and
                            what must not have changed
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantune.checkpoint.fingerprint import differences
from quantune.checkpoint.rng import capture_rng, restore_rng
from quantune.errors import CheckpointError

ADAPTER, OPTIMIZER, STATE = "adapter_state.safetensors", "optimizer.safetensors", "state.json"
SHOWN = 3
"""Names or differences that a refusal lists."""


@attrs.frozen(kw_only=True)
class OptimizerState:
    """An optimizer's memory, by parameter name. Generic: whatever keys the optimizer keeps."""

    kind: str
    """The optimizer's class."""
    tensors: dict[str, Tensor]
    """By `<parameter name>/<key>`, e.g. `lora_A/exp_avg`."""
    values: dict[str, dict[str, Any]]
    """What is not a tensor, by parameter name and key, e.g. the step of bitsandbytes' optimizers."""
    groups: list[dict[str, Any]]
    """The parameter groups: JSON values, with the names of the parameters under `params`."""


@attrs.frozen(kw_only=True)
class TrainingState:
    """A run between two steps."""

    progress: dict[str, Any]
    """Step, tokens seen and the like, as the training loop gave them."""
    parameters: dict[str, Tensor]
    """What is trained, by name, at its training dtype."""
    optimizer: OptimizerState
    rng: dict[str, Any]
    """The random number generators, see `quantune.checkpoint.rng`."""
    fingerprints: dict[str, Any]
    """JSON values that must be the same when the run goes on."""


def save_state(
    folder: Path,
    *,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    fingerprints: Mapping[str, Any],
) -> None:
    """Write the state of a run between two steps, never inside gradient accumulation.

    Args:
        parameters: what is trained, by name; all that the optimizer has.
        progress: JSON values, returned by `load_state`.
        fingerprints: JSON values that must be the same when the run goes on.

    Raises:
        CheckpointError: the optimizer trains a parameter that has no name.
        TypeError: something is neither a tensor nor a JSON value.
    """
    state = _capture_optimizer(optimizer, parameters)
    save_file({name: parameter.detach().contiguous() for name, parameter in parameters.items()}, folder / ADAPTER)
    save_file(state.tensors, folder / OPTIMIZER)
    document = {
        "progress": dict(progress),
        "optimizer": {"kind": state.kind, "values": state.values, "groups": state.groups},
        "rng": capture_rng(),
        "fingerprints": dict(fingerprints),
    }
    (folder / STATE).write_text(json.dumps(document), encoding="utf-8")


def read_state(folder: Path) -> TrainingState:
    """Read a saved state, its tensors on the CPU.

    Raises:
        CheckpointError: a file of it is missing or is not what `save_state` writes.
    """
    try:
        document = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return TrainingState(
            progress=document["progress"],
            parameters=load_file(folder / ADAPTER),
            optimizer=OptimizerState(tensors=load_file(folder / OPTIMIZER), **document["optimizer"]),
            rng=document["rng"],
            fingerprints=document["fingerprints"],
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder.name} is not a state that can be read: {error!r}") from error


def load_state(
    folder: Path,
    *,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    fingerprints: Mapping[str, Any],
) -> dict[str, Any]:
    """Put a saved state back, in place, and return the progress it was saved with.

    All is compared before anything is touched. The generators come last: building things draws from them.

    Raises:
        CheckpointError: something that must be the same has changed; or names, shapes, dtypes or the optimizer differ.
    """
    state = read_state(folder)
    _refuse_changes(folder.name, state, fingerprints)
    _refuse_other_parameters(folder.name, state.parameters, parameters)
    _refuse_other_optimizer(folder.name, state.optimizer, optimizer, parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.parameters[name])
    _restore_optimizer(state.optimizer, optimizer, parameters)
    restore_rng(state.rng)
    return state.progress


def _capture_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> OptimizerState:
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    groups = _groups(optimizer, parameters)
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                # cloned: 8-bit optimizers share code books between parameters, which safetensors refuses
                tensors[f"{name}/{key}"] = value.detach().clone(memory_format=torch.contiguous_format)
            else:
                values.setdefault(name, {})[key] = value
    return OptimizerState(kind=type(optimizer).__name__, tensors=tensors, values=values, groups=groups)


def _restore_optimizer(
    state: OptimizerState, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> None:
    entries: dict[str, dict[str, Any]] = {name: dict(values) for name, values in state.values.items()}
    for path, tensor in state.tensors.items():
        name, key = path.rsplit("/", 1)
        entries.setdefault(name, {})[key] = tensor.clone()  # what was read may be a mapped file
    current_groups = _groups(optimizer, parameters)
    order = [name for group in current_groups for name in group["params"]]
    index_of = {name: index for index, name in enumerate(order)}
    groups = []
    for saved, built in zip(state.groups, current_groups, strict=True):
        group = {**saved, "params": [index_of[name] for name in built["params"]]}
        for option, value in built.items():  # JSON has no tuples
            if isinstance(value, tuple) and isinstance(group.get(option), list):
                group[option] = tuple(group[option])
        groups.append(group)
    optimizer.load_state_dict({"state": {index_of[name]: entries[name] for name in entries}, "param_groups": groups})
    for name, saved_entries in entries.items():
        current = optimizer.state[parameters[name]]
        for key, value in saved_entries.items():
            # torch casts an optimizer's floats to the parameter's dtype; a moment kept in another one would lose bits
            if isinstance(value, Tensor) and current[key].dtype != value.dtype:
                current[key] = value.to(current[key].device)


def _groups(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """The optimizer's parameter groups with names for parameters."""
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    groups = []
    for group in optimizer.param_groups:
        if not all(id(parameter) in name_of for parameter in group["params"]):
            raise CheckpointError("the optimizer trains a parameter that is not among the parameters to save")
        groups.append({**group, "params": [name_of[id(parameter)] for parameter in group["params"]]})
    return groups


def _refuse_changes(checkpoint: str, state: TrainingState, fingerprints: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(dict(fingerprints)))  # as it would be read back: lists for tuples
    before = state.fingerprints
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        details = differences(*({key: side[key] for key in changed if key in side} for side in (before, now)))
        raise CheckpointError(
            f"{checkpoint} can't be resumed, the run would not be the same: {', '.join(changed)} changed since it was "
            f"written ({_some(details)}). Put it back, or start again with --overwrite"
        )


def _refuse_other_parameters(
    checkpoint: str, saved: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> None:
    odd = sorted(saved.keys() ^ parameters.keys())
    if odd:
        where = "in the checkpoint" if odd[0] in saved else "in the model"
        raise CheckpointError(
            f"{checkpoint} trains other parameters than this recipe, e.g. {odd[0]}, which is only {where} "
            f"({len(odd)} in all)"
        )
    for name, parameter in parameters.items():
        if saved[name].shape != parameter.shape or saved[name].dtype != parameter.dtype:
            raise CheckpointError(
                f"{checkpoint}: expected {name} as {parameter.dtype} {tuple(parameter.shape)}, "
                f"found {saved[name].dtype} {tuple(saved[name].shape)}"
            )


def _refuse_other_optimizer(
    checkpoint: str, saved: OptimizerState, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> None:
    kind = type(optimizer).__name__
    if saved.kind != kind:
        raise CheckpointError(f"{checkpoint}: expected the state of {kind}, found that of {saved.kind}")
    found = [sorted(group["params"]) for group in saved.groups]
    expected = [sorted(group["params"]) for group in _groups(optimizer, parameters)]
    if found != expected:
        raise CheckpointError(
            f"{checkpoint}: expected the optimizer's groups to hold {_groups_text(expected)}, "
            f"found {_groups_text(found)}"
        )
    strangers = sorted({path.rsplit("/", 1)[0] for path in saved.tensors} - parameters.keys())
    strangers += sorted(saved.values.keys() - parameters.keys())
    if strangers:
        raise CheckpointError(f"{checkpoint}: {OPTIMIZER} holds the state of an unknown parameter, {strangers[0]}")


def _some(items: list[str]) -> str:
    more = len(items) - SHOWN
    return "; ".join(items[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _groups_text(groups: list[list[str]]) -> str:
    return " and ".join(f"({_some(group)})" for group in groups)
