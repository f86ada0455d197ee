"""What the formats share: walking a weight in chunks that stay in cache, and encoding and decoding elements.

A format dequantizes by filling one flat fp32 buffer chunk by chunk: integers or bit patterns first, then a multiply by
the scales in place. The libraries' own code is slow on a CPU where it casts float8 to fp32 and where it interleaves
nibbles with `torch.stack`; here bits are shifted into place and nibbles looked up two or four at a time.

Every decoder is exact: it computes in fp32 what the format's definition says, with one rounding where the definition
has one. A zero's sign is kept or not as is fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor

from quantune.errors import QuantizationError

CHUNK_ELEMENTS = {"cpu": 1 << 20}
"""Elements decoded at a time: on a CPU 4 MiB of fp32, small enough for its cache and large enough for two threads."""
CHUNK_ELEMENTS_ELSEWHERE = 1 << 26
"""On a GPU launches cost and caches do not matter: a quarter of a gigabyte of fp32 bounds the memory."""
PACKED_AT_ONCE = 1 << 22
"""Elements packed at a time."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of the 4-bit float E2M1 by code (OCP Microscaling Formats 1.0, table 5)."""
E2M1_MAX = 6.0
E4M3_MAX = 448.0

Decode = Callable[[int, int, Tensor], None]


def is_finite(tensor: Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor infinity: its extremes tell, twenty times as fast as `isfinite`."""
    if tensor.numel() == 0:
        return True
    least, largest = torch.aminmax(tensor)
    return bool(torch.isfinite(least) & torch.isfinite(largest))  # one `bool`: on a GPU each waits for it


def fill(out: Tensor, decode: Decode, *, step: int, rounded_to: torch.dtype = torch.float32) -> Tensor:
    """Fill `out`, contiguous and of any float dtype, from `decode`; returns it.

    Args:
        decode: called with (start, stop, chunk) over the flattened elements; writes elements start..stop as fp32 into
            `chunk`, shape (stop - start,). `start` is a multiple of `step`.
        step: elements that must not be separated, e.g. a block.
        rounded_to: a dtype that the values are rounded to on their way into `out`.
    """
    flat = out.view(-1)
    count = flat.numel()
    limit = CHUNK_ELEMENTS.get(out.device.type, CHUNK_ELEMENTS_ELSEWHERE)
    size = max(step, limit // step * step)
    direct = out.dtype == torch.float32 and rounded_to == torch.float32
    scratch = None if direct else torch.empty(min(size, count), dtype=torch.float32, device=out.device)
    for start in range(0, count, size):
        stop = min(count, start + size)
        chunk = flat[start:stop] if scratch is None else scratch[: stop - start]
        decode(start, stop, chunk)
        if scratch is not None:
            flat[start:stop].copy_(chunk if rounded_to == torch.float32 else chunk.to(rounded_to))
    return out


def scale_blocks_(values: Tensor, scales: Tensor, block: int) -> None:
    """Multiply each `block` of flat `values` by its scale; the last block may be short."""
    whole = values.numel() // block
    values[: whole * block].view(whole, block).mul_(scales[:whole, None])
    if whole * block < values.numel():
        values[whole * block :].mul_(scales[whole])


def block_absmax(weight: Tensor, block: int) -> Tensor:
    """Largest magnitude of each `block` of the flattened weight, the last one short if need be; in its dtype."""
    return pad_blocks(weight, block).abs().amax(dim=1)


def pad_blocks(weight: Tensor, block: int) -> Tensor:
    """The flattened weight as (blocks, block), filled up with zeros."""
    flat = weight.reshape(-1)
    missing = -flat.numel() % block
    if missing:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    return flat.view(-1, block)


def pack_nibbles(codes: Tensor, *, high_first: bool) -> Tensor:
    """Two 4-bit codes a byte: uint8 codes of any shape with an even last dimension, flattened in pairs."""
    pairs = codes.reshape(*codes.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    return (first << 4) | second if high_first else first | (second << 4)


# E2M1, two a byte, the even element in the low nibble -----------------------------------------------------------------


def encode_e2m1(values: Tensor) -> Tensor:
    """The codes of fp32 values: nearest, ties to the even code, magnitudes above 6 to 6."""
    boundaries = _e2m1_boundaries(values.device)
    codes = torch.bucketize(values.abs(), boundaries, out_int32=True).to(torch.uint8)
    return codes | (values.signbit().to(torch.uint8) << 3)


def decode_e2m1_blocks(codes: Tensor, scales: Tensor, block: int, start: int, stop: int, chunk: Tensor) -> None:
    """Write elements start..stop of a weight into `chunk`.

    Args:
        codes: uint8, shape (elements / 2,).
        scales: fp32, shape (elements / block,), halved: the table holds twice the values, as integers.
    """
    table = _e2m1_quads(codes.device)
    quads = codes[start // 2 : stop // 2].view(torch.int16).to(torch.int32).add_(1 << 15)
    chunk.copy_(torch.index_select(table, 0, quads).view(torch.int8))
    scale_blocks_(chunk, scales[start // block :], block)


@lru_cache
def _e2m1_boundaries(device: torch.device) -> Tensor:
    """Midpoints between neighbours; where the upper code is the even one, the largest fp32 below the midpoint."""
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    up = torch.tensor([False, True, False, True, False, True, False])
    return torch.where(up, torch.nextafter(middles, torch.zeros(())), middles).to(device)


@lru_cache
def _e2m1_quads(device: torch.device) -> Tensor:
    """Four values for each pair of bytes, doubled, as one int32; indexed by the pair as int16 + 2^15."""
    doubled = (torch.tensor(E2M1_VALUES) * 2).to(torch.int8)
    byte = torch.arange(256)
    pairs = torch.stack([doubled[byte & 15], doubled[byte >> 4]], dim=1)
    both = (torch.arange(1 << 16) - (1 << 15)) & 0xFFFF
    quads = torch.cat([pairs[both & 255], pairs[both >> 8]], dim=1)
    return quads.contiguous().view(torch.int32).reshape(-1).to(device)


# E4M3 -----------------------------------------------------------------------------------------------------------------


def encode_e4m3(values: Tensor) -> Tensor:
    """fp32 values as float8_e4m3fn: nearest, ties to even, magnitudes above 448 to 448."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def e4m3_values() -> tuple[float, ...]:
    """The value of each float8_e4m3fn code; NaN for two of them."""
    return tuple(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist())


def int8_values() -> tuple[float, ...]:
    """The value of each signed 8-bit integer, by its bits."""
    return tuple(torch.arange(256, dtype=torch.uint8).view(torch.int8).float().tolist())


E4M3_UNIT = 256.0
"""`decode_e4m3` leaves values / 256: the bits of E4M3 read as fp16, whose exponent is biased by 8 more."""


def decode_e4m3(codes: Tensor, chunk: Tensor) -> None:
    """Write float8_e4m3fn `codes` as fp32 value / 256 into `chunk` of the same shape; NaN codes are not understood.

    The 7 bits below the sign, shifted up by 7, are the same number in fp16 with another exponent bias.
    """
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    chunk.copy_(bits.view(torch.float16))


# Tables of pairs ------------------------------------------------------------------------------------------------------


def pair_table(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A table of 256 int64, each two fp32: the values of a byte's high and low nibble, in that order."""
    return _pair_table(values, device)


@lru_cache
def _pair_table(values: tuple[float, ...], device: torch.device) -> Tensor:
    table = torch.tensor(values, dtype=torch.float32)
    byte = torch.arange(256)
    return torch.stack([table[byte >> 4], table[byte & 15]], dim=1).view(torch.int64).reshape(-1).to(device)


def decode_pairs(codes: Tensor, table: Tensor, start: int, stop: int, chunk: Tensor) -> None:
    """Look elements start..stop up in a `pair_table`; `codes` is uint8 of shape (ceil(elements / 2),)."""
    count = stop - start
    pairs = codes[start // 2 : start // 2 + count // 2].to(torch.int32)
    even = chunk[: count // 2 * 2]
    if even.data_ptr() % 8 == 0:
        torch.index_select(table, 0, pairs, out=even.view(torch.int64))
    else:
        even.copy_(torch.index_select(table, 0, pairs).view(torch.float32))
    if count % 2:
        chunk[-1:] = table[codes[start // 2 + count // 2].long()].view(1).view(torch.float32)[:1]


# Signed 4-bit integers, two a byte, the even element in the low nibble ------------------------------------------------


def decode_int4(codes: Tensor, start: int, stop: int, chunk: Tensor) -> None:
    """Write two's-complement nibbles start..stop as fp32 integers into `chunk`; `codes` is one byte a pair."""
    spread = codes.view(torch.uint8)[start // 2 : stop // 2].to(torch.int16)
    spread.bitwise_or_(spread << 4).bitwise_and_(0x0F0F)
    chunk.copy_(spread.view(torch.int8).bitwise_xor_(8).sub_(8))


# Shapes ---------------------------------------------------------------------------------------------------------------


def blocks_of(length: int, block: int) -> int:
    """How many blocks cover `length`."""
    return -(-length // block)


def require_groups(in_features: int, size: int, key: str, alternatives: Iterable[int] = ()) -> None:
    """Require that groups of `size` along a row cover it.

    Raises:
        QuantizationError: they don't; the message names the key and those of `alternatives` that would.
    """
    if in_features % size == 0:
        return
    fitting = [str(other) for other in alternatives if in_features % other == 0]
    way_out = f"; {key} = {' or '.join(fitting)} would" if fitting else ""
    raise QuantizationError(f"{key} = {size} does not divide its {in_features} in features{way_out}")


def in_row_slices(weight: Tensor, pack: Callable[[Tensor], tuple[Tensor, ...]], *, rows: int = 1) -> list[Tensor]:
    """Pack slices of rows one after the other, which bounds the temporaries, and concatenate each result.

    Args:
        rows: how many rows must stay together, e.g. those of a block.
    """
    size = max(rows, PACKED_AT_ONCE // max(1, weight.shape[1]) // rows * rows)
    parts = [pack(part) for part in weight.split(size)]
    return [_cat(one) for one in zip(*parts, strict=True)]


def _cat(parts: tuple[Tensor, ...]) -> Tensor:
    """The parts by rows; float8 as bytes, which every device can concatenate."""
    dtype = parts[0].dtype
    if dtype.itemsize > 1 or not dtype.is_floating_point:
        return torch.cat(parts)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts]).view(dtype)
