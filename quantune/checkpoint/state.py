"""What a run needs to go on as if it had not stopped: tensors in safetensors, the rest in JSON, no pickle.

adapter_state.safetensors   the trained parameters, by name, at their training dtype
optimizer.safetensors       the optimizer's tensors, as `<parameter name>/<key>`
state.json                  the optimizer's other values and its groups, the random number generators of each rank,
                            progress, and what makes the run the run it is

Nothing of this but the generators depends on how many ranks there are: tensors are whole. Capturing gathers them, on
all ranks together; writing is the business of one, and may take its time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from quantune.checkpoint.rng import capture_rng, restore_rng, seed_rng
from quantune.distributed.shares import gathered
from quantune.distributed.world import World
from quantune.errors import CheckpointError

ADAPTER, OPTIMIZER, STATE = "adapter_state.safetensors", "optimizer.safetensors", "state.json"
SHOWN = 3
"""Names that a refusal lists."""
ALONE = World()


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
    rng: list[dict[str, Any]]
    """The random number generators of each rank, see `quantune.checkpoint.rng`."""
    identity: dict[str, Any]
    """What makes the run the run it is: JSON values, see `quantune.checkpoint.identity`."""


def capture(
    *,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    identity: Mapping[str, Any],
    world: World = ALONE,
) -> TrainingState | None:
    """The state of a run between two steps, never inside gradient accumulation, on the CPU and apart from the run: what
    trains on changes nothing of it. All ranks call this; rank 0 gets the state with everything whole, the others None.

    Args:
        parameters: what is trained, by name, whole or sharded; all that the optimizer has.
        progress: JSON values.
        identity: JSON values: what makes the run the run it is.

    Raises:
        CheckpointError: the optimizer trains a parameter that has no name, or a rank failed; all of them raise it.
    """
    whole = _Whole(keep=world.main)
    generators: dict[str, Any] = {}
    state = None
    try:
        _groups(optimizer, parameters)
        generators = capture_rng()
    except Exception as error:  # whatever it is: the others are about to wait for this rank
        whole.error = error
    _agree(world, whole.error)
    taken = {name: whole(parameter) for name, parameter in parameters.items()}
    kept = _capture_optimizer(optimizer, parameters, whole)
    _agree(world, whole.error)
    rng = world.gather(generators)
    if world.main:
        state = TrainingState(
            progress=dict(progress), parameters=taken, optimizer=kept, rng=rng, identity=dict(identity)
        )
    return state


def write_state(folder: Path, state: TrainingState) -> None:
    """Write a captured state; touches nothing of the run, so that a thread may do it while the run goes on.

    Raises:
        TypeError: something is neither a tensor nor a JSON value.
    """
    save_file(state.parameters, folder / ADAPTER)
    save_file(state.optimizer.tensors, folder / OPTIMIZER)
    document = {
        "progress": state.progress,
        "optimizer": {
            "kind": state.optimizer.kind,
            "values": state.optimizer.values,
            "groups": state.optimizer.groups,
        },
        "rng": state.rng,
        "identity": state.identity,
    }
    (folder / STATE).write_text(json.dumps(document), encoding="utf-8")


def read_identity(folder: Path) -> dict[str, Any]:
    """What the run that saved this state was made of.

    Raises:
        CheckpointError: the file is missing or is not what `write_state` writes.
    """
    try:
        return dict(_read_document(folder)["identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder.name} is not a state that can be read: {error!r}") from error


def read_state(folder: Path) -> TrainingState:
    """Read a saved state, its tensors on the CPU.

    Raises:
        CheckpointError: a file of it is missing or is not what `write_state` writes.
    """
    try:
        document = _read_document(folder)
        return TrainingState(
            progress=document["progress"],
            parameters=load_file(folder / ADAPTER),
            optimizer=OptimizerState(tensors=load_file(folder / OPTIMIZER), **document["optimizer"]),
            rng=list(document["rng"]),
            identity=document["identity"],
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder.name} is not a state that can be read: {error!r}") from error


def restore(
    folder: Path,
    *,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    seed: int = 0,
    world: World = ALONE,
) -> dict[str, Any]:
    """Put a saved state back, in place, and return the progress it was saved with. Every rank calls this and takes its
    own share; nothing but failures is communicated.

    All is compared before anything is touched. The generators come last: building things draws from them. Where the
    state is that of another number of ranks, they begin anew, from `seed`, the step and the rank.

    Raises:
        CheckpointError: names, shapes, dtypes or the optimizer differ, or a rank can't read the state; all raise it.
    """
    state, error = None, None
    try:
        state = read_state(folder)
        _refuse_other_parameters(folder.name, state.parameters, parameters)
        _refuse_other_optimizer(folder.name, state.optimizer, optimizer, parameters)
    except CheckpointError as refused:
        error = refused
    _agree(world, error)
    assert state is not None
    with torch.no_grad():
        for name, parameter in parameters.items():
            _local(parameter).copy_(_local(_share(state.parameters[name], parameter)))
    _restore_optimizer(state.optimizer, optimizer, parameters)
    if len(state.rng) == world.size:
        restore_rng(state.rng[world.rank])
    else:
        seed_rng(seed, int(state.progress["step"]), world.rank)
    return state.progress


@attrs.define
class _Whole:
    """Gathers tensors one after the other. What fails is kept until all ranks have taken part in all of them."""

    keep: bool
    """Whether this rank keeps what is gathered."""
    error: Exception | None = None
    """The first failure on this rank."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """The whole of a tensor that may be sharded, on the CPU and apart from it; something empty where it is not
        kept."""
        found = gathered(tensor.detach())
        if self.keep and self.error is None:
            try:
                return found.to("cpu", copy=True, memory_format=torch.contiguous_format)
            except RuntimeError as error:  # out of memory
                self.error = error
        return torch.empty(0)


def _agree(world: World, error: Exception | None) -> None:
    """Raise on all ranks what failed on one of them."""
    reasons = world.gather(None if error is None else str(error) or repr(error))
    rank, reason = next(((rank, reason) for rank, reason in enumerate(reasons) if reason is not None), (0, None))
    if reason is None:
        return
    if world.size == 1 and isinstance(error, CheckpointError):
        raise error
    where = f"rank {rank}: " if world.size > 1 else ""
    raise CheckpointError(f"{where}{reason}") from error


def _read_document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _share(whole: Tensor, like: Tensor) -> Tensor:
    """A copy of `whole`, or of this rank's share of it where `like` is sharded; nothing is communicated."""
    if not isinstance(like, DTensor):
        return whole.clone()  # what was read may be a mapped file
    share: Any = torch.empty_like(like, dtype=whole.dtype)  # where the share of `like` is, which may be offloaded
    share.to_local().copy_(_local(distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)))
    return share


def _capture_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], whole: Callable[[Tensor], Tensor]
) -> OptimizerState:
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    groups = _groups(optimizer, parameters)
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = whole(value)  # code books that parameters share become one for each
            else:
                values.setdefault(name, {})[key] = value
    return OptimizerState(kind=type(optimizer).__name__, tensors=tensors, values=values, groups=groups)


def _restore_optimizer(
    state: OptimizerState, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> None:
    entries: dict[str, dict[str, Any]] = {name: dict(values) for name, values in state.values.items()}
    for path, tensor in state.tensors.items():
        name, key = path.rsplit("/", 1)
        parameter = parameters[name]
        as_parameter = tensor.shape == parameter.shape  # not so the number of steps
        entries.setdefault(name, {})[key] = _share(tensor, parameter) if as_parameter else tensor.clone()
    current_groups = _groups(optimizer, parameters)
    order = [name for group in current_groups for name in group["params"]]
    index_of = {name: index for index, name in enumerate(order)}
    groups = []
    for saved, built in zip(state.groups, current_groups, strict=True):
        # options are the recipe's, which may have changed; what the optimizer itself noted beside them comes back
        groups.append({**saved, **built, "params": [index_of[name] for name in built["params"]]})
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
