"""A checkpoint's tensors, read one at a time.

Files are read with `pread`, not mapped: a mapped file's pages count as memory of the process for as long as it is open.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from quantune.backends.layout import TensorSpec
from quantune.errors import ModelError
from quantune.model.base import Base

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "BOOL": torch.bool,
}
"""What safetensors calls the dtypes."""
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.index.json")
"""Files that hold weights, in whatever format, or say where they are."""


@attrs.frozen(kw_only=True)
class Shard:
    """One file of a checkpoint."""

    path: Path
    keys: tuple[str, ...]
    """The tensors in it, in the order in which they lie there."""


@attrs.frozen(kw_only=True, eq=False)
class Source:
    """The tensors of a checkpoint, by the names that it gives them."""

    shards: tuple[Shard, ...]
    specs: Mapping[str, TensorSpec]
    files: Mapping[str, Any]
    """Open files by tensor."""

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(spec.nbytes for spec in self.specs.values())

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            ModelError: the file can't be read.
        """
        try:
            return self.files[key].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{key} can't be read: {error}; fetch the checkpoint again") from error


def base_folder(base: Base) -> Path:
    """The folder that the base's files are in; those of a hub id are fetched if they are not there yet.

    Raises:
        ModelError: they can't be fetched.
    """
    if base.folder is not None:
        return base.folder
    try:
        return Path(
            snapshot_download(base.source, revision=base.revision, ignore_patterns=[*WEIGHTS[1:-1], "original/*"])
        )
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        raise ModelError(f"the files of {base.name} can't be fetched: {error}") from error


@contextlib.contextmanager
def open_source(folder: Path) -> Iterator[Source]:
    """The safetensors files of a checkpoint.

    Raises:
        ModelError: there are none, one is missing or damaged.
    """
    names = weight_files(folder)
    with contextlib.ExitStack() as stack:
        shards, specs, files = [], {}, {}
        for name in names:
            path = folder / name
            try:
                file = stack.enter_context(safe_open(path, framework="pt", backend="pread"))
                keys = tuple(file.offset_keys())
                for key in keys:
                    part = file.get_slice(key)
                    specs[key] = TensorSpec(_dtype(part.get_dtype(), key), tuple(part.get_shape()))
                    files[key] = file
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path} can't be read: {error}; fetch the checkpoint again") from error
            shards.append(Shard(path=path, keys=keys))
        yield Source(shards=tuple(shards), specs=specs, files=files)


def main_dtype(source: Source) -> torch.dtype:
    """The floating-point dtype that most of a checkpoint's weights are in, bf16 where all are packed."""
    sizes: dict[torch.dtype, int] = {}
    for spec in source.specs.values():
        if spec.dtype in (torch.float32, torch.float16, torch.bfloat16):
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes // spec.dtype.itemsize
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.bfloat16


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files of a checkpoint, in order.

    Raises:
        ModelError: there are none, or the index is damaged.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        try:
            return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} can't be read: {error}; fetch the checkpoint again") from error
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [SAFE_WEIGHTS_NAME]
    raise ModelError(f"expected {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME} in {folder}, found neither")


def _dtype(name: str, key: str) -> torch.dtype:
    if name not in DTYPES:
        raise ModelError(f"{key} is stored as {name}, which quantune does not know")
    return DTYPES[name]
