"""A safetensors file, written tensor by tensor.

The library writes a file from all its tensors at once; here one is handed over, written and let go. The format
(huggingface.co/docs/safetensors): the header's length, 8 bytes; the header, JSON, which may end in spaces; the tensors
without gaps, each where the header says. Room for the header is left at the front, and filled in at the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import attrs
import torch
from torch import Tensor

from quantune.errors import CheckpointError
from quantune.streaming.source import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8
"""Bytes. What reads a file takes tensors as views of it, which must begin at multiples of their items' size."""
ENTRY = 160
"""Most bytes that an entry of the header takes beside the tensor's name: dtype, up to 6 dimensions, two offsets."""


@attrs.define(eq=False, slots=False)
class ShardWriter:
    """Writes the tensors of one file, in any order."""

    path: Path
    names: frozenset[str]
    """What the file is to hold."""
    metadata: Mapping[str, str] = attrs.field(factory=lambda: {"format": "pt"})
    _header: dict[str, dict[str, object]] = attrs.field(factory=dict, init=False)
    _tail: list[tuple[str, Tensor]] = attrs.field(factory=list, init=False)
    """Tensors after which others could not begin where they must: written last, the widest items first."""
    _end: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        entries = sum(len(json.dumps(name)) + ENTRY for name in self.names)
        self._room = _aligned(entries + len(json.dumps(dict(self.metadata))) + ENTRY)
        self._file = self.path.open("wb")
        self._file.seek(8 + self._room)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one of `names`.

        Raises:
            OSError: it can't be written.
        """
        if name not in self.names or name in self._header or any(name == other for other, _ in self._tail):
            raise CheckpointError(f"{self.path.name}: expected each of its tensors once, found {name}")
        if tensor.nbytes % ALIGNMENT:
            self._tail.append((name, tensor))
        else:
            self._write(name, tensor)

    def close(self) -> None:
        """Write what is left, and flush the file to the disk.

        Raises:
            CheckpointError: a tensor is missing.
            OSError: it can't be written.
        """
        try:
            for name, tensor in sorted(self._tail, key=lambda entry: -entry[1].itemsize):
                self._write(name, tensor)
            missing = self.names - self._header.keys()
            if missing:
                raise CheckpointError(f"{self.path.name} lacks {len(missing)} tensors, e.g. {min(missing)}")
            header = json.dumps({"__metadata__": dict(self.metadata), **self._header}, separators=(",", ":"))
            encoded = header.encode().ljust(self._room)
            if len(encoded) > self._room:
                raise CheckpointError(f"{self.path.name}: its header takes {len(encoded)} bytes, of {self._room}")
            self._file.seek(0)
            self._file.write(len(encoded).to_bytes(8, "little") + encoded)
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def abandon(self) -> None:
        """Close the file as it is; it is no safetensors file."""
        self._file.close()

    def _write(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous()
        self._file.write(data.view(-1).view(torch.uint8).numpy().data)
        self._header[name] = {
            "dtype": NAMES[data.dtype],
            "shape": list(data.shape),
            "data_offsets": [self._end, self._end + data.nbytes],
        }
        self._end += data.nbytes


def data_bytes(path: Path) -> int:
    """Size of the tensors in a safetensors file."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


def write_index(path: Path, files: Mapping[str, Iterable[str]], nbytes: int) -> None:
    """Write which file holds which tensor; `nbytes` is the size of all of them."""
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
