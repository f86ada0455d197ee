"""What a run needs to go on as if it had not stopped: tensors in safetensors, the rest in JSON, no pickle.

adapter.safetensors     the trained parameters, by name
optimizer.safetensors   the optimizer's tensors, as `<parameter name>/<key>`, nested keys with more slashes
rng.safetensors         the states of torch's and numpy's random number generators
state.json              the optimizer's other values, python's generator, progress, and what must not have changed
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantune.errors import CheckpointError

ADAPTER, OPTIMIZER, RNG, STATE = "adapter.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"


def save_state(
    folder: Path,
    *,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    fingerprints: Mapping[str, Any],
) -> None:
    """Write the state of a run between two steps.

    Args:
        parameters: what is trained, by name, in the optimizer's order.
        progress: JSON values, returned by `load_state`.
        fingerprints: JSON values that must be the same when the run goes on.
    """
    save_file({name: parameter.detach().contiguous() for name, parameter in parameters.items()}, folder / ADAPTER)
    state = optimizer.state_dict()["state"]
    entries = _flatten({name: state.get(index, {}) for index, name in enumerate(parameters)})
    # cloned: 8-bit optimizers share code books between entries, which safetensors refuses
    tensors = {path: value.detach().clone() for path, value in entries.items() if isinstance(value, Tensor)}
    values = {path: value for path, value in entries.items() if not isinstance(value, Tensor)}
    save_file(tensors, folder / OPTIMIZER)
    generators, python = _rng_state()
    save_file(generators, folder / RNG)
    document = {
        "progress": dict(progress),
        "fingerprints": dict(fingerprints),
        "optimizer": values,
        "python_rng": python,
    }
    (folder / STATE).write_text(json.dumps(document, indent=1), encoding="utf-8")


def load_state(
    folder: Path,
    *,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    fingerprints: Mapping[str, Any],
) -> dict[str, Any]:
    """Put a saved state back, in place, and return the progress it was saved with.

    Raises:
        CheckpointError: something that must be the same has changed, or the parameters are others.
    """
    document = json.loads((folder / STATE).read_text(encoding="utf-8"))
    changed = [key for key, value in document["fingerprints"].items() if fingerprints.get(key) != value]
    if changed:
        raise CheckpointError(
            f"{folder.name} can't be resumed, the run would not be the same: {', '.join(changed)} changed since it was "
            "written. Put it back, or start again with --overwrite"
        )
    saved = load_file(folder / ADAPTER)
    if saved.keys() != parameters.keys():
        odd = sorted(saved.keys() ^ parameters.keys())[0]
        raise CheckpointError(f"{folder.name} trains other parameters than this recipe, e.g. {odd}")
    for name, parameter in parameters.items():
        if saved[name].shape != parameter.shape or saved[name].dtype != parameter.dtype:
            raise CheckpointError(
                f"{folder.name}: expected {name} as {parameter.dtype} {tuple(parameter.shape)}, "
                f"found {saved[name].dtype} {tuple(saved[name].shape)}"
            )
        with torch.no_grad():
            parameter.copy_(saved[name])
    optimizer.load_state_dict(_optimizer_state(folder, parameters, optimizer, document["optimizer"]))
    _restore_rng(load_file(folder / RNG), document["python_rng"])  # last: building things draws from the generators
    return document["progress"]


def _optimizer_state(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    values: Mapping[str, Any],
) -> dict[str, Any]:
    entries = {**values, **load_file(folder / OPTIMIZER)}
    index_of = {name: index for index, name in enumerate(parameters)}
    state: dict[int, dict[str, Any]] = {}
    for path, value in entries.items():
        name, *keys, last = path.split("/")
        node = state.setdefault(index_of[name], {})
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = value
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as one level, its keys joined by slashes."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _rng_state() -> tuple[dict[str, Tensor], Any]:
    """The generators' states: tensors, and what JSON holds of python's own generator and numpy's position."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # type: ignore[misc]
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda:{index}"] = state
    return tensors, {"python": random.getstate(), "numpy": [int(position), int(has_gauss), float(gauss)]}


def _restore_rng(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), *values["numpy"]))
    torch.set_rng_state(tensors["torch"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda:{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda:{index}"], index)
