"""An adapter, and what is known of the base that it was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from quantune.checkpoint.commit import MANIFEST, file_hash, verify
from quantune.checkpoint.run_folder import RunFolder
from quantune.errors import InputError, ModelError
from quantune.model.adapter import ORIGIN, RECIPE, require_adapter

BASE_FILES = "the files of the base"
"""Among the fingerprints of a run: sha256 of the base's files, by name."""


@attrs.frozen(kw_only=True)
class TrainedAdapter:
    """An adapter's folder."""

    folder: Path
    recipe: Path | None
    """The resolved recipe of the run that trained it; None for an adapter of another tool."""
    fingerprints: Mapping[str, Any]
    """Of what it was trained on; empty where nobody says."""
    run: Path | None
    """The folder of the run, where it is one that was named."""

    def base_named(self) -> str | None:
        """The base that the adapter's own configuration names.

        Raises:
            ModelError: it can't be read.
        """
        file = self.folder / "adapter_config.json"
        try:
            name = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(f"{file} can't be read: {error}") from error
        return str(name) if name else None

    def digest(self) -> str:
        """Of its weights and configuration."""
        return " ".join(file_hash(self.folder / name) for name in ("adapter_model.safetensors", "adapter_config.json"))


def find_adapter(path: Path) -> TrainedAdapter:
    """The adapter that a run left, or that is in a folder of its own.

    Raises:
        InputError: there is none, the run is not finished, or a file is not as it was written.
    """
    if not path.is_dir():
        raise InputError(
            f"expected the folder of a run or of an adapter, found {'a file' if path.exists() else 'nothing'}: {path}"
        )
    folder, run = path, None
    if not _holds_adapter(path) and ((path / RECIPE).is_file() or RunFolder(path).state() is not None):
        folder, run = path / "adapter", path
        if RunFolder(path).state() != "finished" or not folder.is_dir():
            raise InputError(
                f"the run in {path} is not finished and has no adapter yet; go on with quantune run RECIPE --resume"
            )
    require_adapter(folder)
    if (folder / MANIFEST).is_file():
        verify(folder, ("adapter_model.safetensors", "adapter_config.json"))  # the rest may be edited, e.g. its recipe
    recipe = next((one for one in (folder / RECIPE, *([run / RECIPE] if run else ())) if one.is_file()), None)
    if run is None and recipe is None and (folder.parent / RECIPE).is_file() and RunFolder(folder.parent).state():
        recipe = folder.parent / RECIPE
    return TrainedAdapter(folder=folder, recipe=recipe, fingerprints=_fingerprints(folder, run), run=run)


def require_same_files(adapter: TrainedAdapter, files: Mapping[str, str]) -> None:
    """Require that the base's files are those that the adapter was trained on; both by name, sha256.

    Raises:
        ModelError: they are not.
    """
    then = adapter.fingerprints.get(BASE_FILES)
    if not isinstance(then, Mapping):
        return
    other = sorted(name for name in {*then, *files} if name in files and then.get(name) != files[name])
    if other:
        raise ModelError(
            f"the adapter in {adapter.folder} was trained on another base: {', '.join(other[:3])} of this one "
            f"{'is' if len(other) == 1 else 'are'} not what it was trained on (sha256). Name the right base with "
            "--base; --force merges all the same"
        )


def _holds_adapter(path: Path) -> bool:
    return (path / "adapter_config.json").is_file()


def _fingerprints(folder: Path, run: Path | None) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))["fingerprints"]
        return found if isinstance(found, Mapping) else {}
    except (OSError, ValueError, KeyError, TypeError):
        beside = run or (folder.parent if RunFolder(folder.parent).state() else None)
        return {} if beside is None else RunFolder(beside).fingerprints()
