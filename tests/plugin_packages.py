"""Installed packages that bring backends, sound and otherwise, made on the spot."""

from __future__ import annotations

from pathlib import Path

DESCRIPTION = """\
import attrs
from quantune.backends.description import BackendDescription, Probe

@attrs.frozen(kw_only=True)
class Options:
    weight_dtype: str = "w4"
    group_size: int = 128

def load():
    raise NotImplementedError

description = BackendDescription(
    name="mine",
    summary="",
    weight_dtypes=("w4",),
    options=Options,
    probe=lambda: Probe(available=True, devices=("cpu",)),
    load=load,
)
"""
TENSOR_CODE = """\
import torch
from quantune.backends.backend import Backend
from quantune.backends.layout import TensorSpec

class HalfBackend(Backend):
    name = "mine"

    def inner_tensors(self, shape, options):
        return {"halves": TensorSpec(torch.float16, tuple(shape))}

    def pack(self, weight, options):
        return {"halves": weight.half()}

    def dequantize(self, packed, dtype, out=None):
        return packed.views()["halves"].to(dtype)
"""


def install(folder: Path, package: str, backends: dict[str, str], code: str | None = None) -> str:
    """Put a distribution with backends into `folder`; its module is named like the package."""
    lines = [f"{name} = {value}" for name, value in backends.items()]
    return install_text(folder, package, "\n".join(["[quantune.backends]", *lines, ""]), code)


def install_text(folder: Path, package: str, entry_points: str | bytes, code: str | None = None) -> str:
    """As `install`, with the bytes of its entry_points.txt."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    data = entry_points if isinstance(entry_points, bytes) else entry_points.encode()
    (info / "entry_points.txt").write_bytes(data)
    if code is not None:
        (folder / f"{package}.py").write_text(code)
    return str(folder)


def named(name: str, code: str = DESCRIPTION) -> str:
    """Code of a plugin, with its backend called `name`."""
    return code.replace('"mine"', f'"{name}"')


def loading(name: str, load: str, tensor_code: str = TENSOR_CODE) -> str:
    """Code of a plugin whose load() runs the statement `load` after its tensor code."""
    code = "".join(f"    {line}\n" for line in [*tensor_code.splitlines(), load])
    return named(name, DESCRIPTION.replace("    raise NotImplementedError\n", code))
