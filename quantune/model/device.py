"""Where to compute and in which dtype."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Literal

import torch

from quantune.errors import InputError

Precision = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means for a process, the `local_rank`th of its machine.

    Raises:
        InputError: `cuda` was asked for and there is none, or not one for each process.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            'expected a CUDA device for [training] device = "cuda", torch finds none; '
            'use device = "auto", or install a CUDA build of torch'
        )
    if device == "cpu":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"process {local_rank} of this machine has no GPU of its own, torch finds {torch.cuda.device_count()}: "
            'lower [distributed] processes, or set [training] device = "cpu"'
        )
    chosen = torch.device("cuda", local_rank)
    torch.cuda.set_device(chosen)
    return chosen


def choose_precision(precision: Precision | Literal["auto"], device: torch.device) -> Precision:
    """`fp32` or `bf16`: what `auto` means on `device`.

    A CPU without AMX or AVX512-BF16 multiplies bf16 matrices 8 to 500 times slower than fp32 ones.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() and _cpu_multiplies_bf16() else "fp32"


def _cpu_multiplies_bf16() -> bool:
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("amx"))


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let a GPU multiply fp32 matrices in TF32 while the context is open, if it is `allowed`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def has_tf32(device: torch.device) -> bool:
    """Whether `device` has TF32 arithmetic: GPUs since Ampere do."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@contextlib.contextmanager
def lean_heap() -> Iterator[None]:
    """Return freed tensors to the system at once while the context is open, where the C library is glibc.

    Loading frees one full-precision weight after another; by default glibc keeps them, which doubles the peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mmap_threshold, lean, usual = -3, 128 * 1024, 32 * 1024 * 1024
    mallopt(mmap_threshold, lean)
    try:
        yield
    finally:
        mallopt(mmap_threshold, usual)
        ctypes.CDLL(None).malloc_trim(0)
