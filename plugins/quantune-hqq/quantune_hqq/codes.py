"""Integers of 8, 4, 3 and 2 bits as dense bytes, and back.

Codes are two's complement, from -2^(bits - 1) to 2^(bits - 1) - 1, in the order of the weights, the first in the lowest
bits of a byte:

    int8   one a byte
    int4   two a byte
    int2   four a byte
    int3   its two lower bits as four a byte, its sign bit as eight a byte, in two tensors: 3 bits, none left over

Bytes are spread to one code a byte by shifts of whole words: 4 to 6 operations for 4 or 8 codes at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from quantune.backends import kernels
from quantune.backends.layout import TensorSpec
from torch import Tensor

BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}


def limits(bits: int) -> tuple[int, int]:
    """The lowest and the highest code."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def code_tensors(shape: tuple[int, int], bits: int) -> dict[str, TensorSpec]:
    """The tensors that hold the codes of a weight whose rows are a multiple of 8 long."""
    rows, columns = shape
    if bits == 8:
        return {"codes": TensorSpec(torch.int8, shape)}
    if bits == 3:
        return {
            "codes": TensorSpec(torch.uint8, (rows, columns // 4)),
            "signs": TensorSpec(torch.uint8, (rows, columns // 8)),
        }
    return {"codes": TensorSpec(torch.uint8, (rows, columns * bits // 8))}


def pack_codes(codes: Tensor, bits: int) -> dict[str, Tensor]:
    """Codes, int8, shape (rows, columns), as the tensors of `code_tensors`."""
    if bits == 8:
        return {"codes": codes}
    unsigned = codes.view(torch.uint8).bitwise_and((1 << bits) - 1)
    if bits == 4:
        return {"codes": kernels.pack_nibbles(unsigned, high_first=False)}
    if bits == 3:
        return {"codes": _gather(unsigned & 3, 2), "signs": _gather(unsigned >> 2, 1)}
    return {"codes": _gather(unsigned, 2)}


def decode(packed: Mapping[str, Tensor], bits: int, start: int, stop: int, chunk: Tensor) -> None:
    """Write codes start..stop, multiples of 8, as fp32 into `chunk`, shape (stop - start,)."""
    codes = packed["codes"].view(-1)
    if bits == 8:
        chunk.copy_(codes[start:stop])
    elif bits == 4:
        kernels.decode_int4(codes, start, stop, chunk)
    elif bits == 3:
        spread = _spread_pairs(codes[start // 4 : stop // 4]).view(torch.int64)
        spread.bitwise_or_(_spread_bits(packed["signs"].view(-1)[start // 8 : stop // 8]).bitwise_left_shift_(2))
        chunk.copy_(_signed(spread, bits))
    else:
        chunk.copy_(_signed(_spread_pairs(codes[start // 4 : stop // 4]), bits))


def _gather(values: Tensor, bits: int) -> Tensor:
    """8 / `bits` values of `bits` bits a byte, the first lowest; uint8 of shape (rows, columns)."""
    parts = values.unflatten(1, (-1, 8 // bits))
    gathered = parts[:, :, 0].clone()
    for place in range(1, 8 // bits):
        gathered |= parts[:, :, place] << (bits * place)
    return gathered


def _spread_pairs(data: Tensor) -> Tensor:
    """Each byte's four pairs of bits as the four bytes of an int32."""
    words = data.to(torch.int32)
    words.bitwise_or_(words << 12).bitwise_and_(0x000F000F)
    return words.bitwise_or_(words << 6).bitwise_and_(0x03030303)


def _spread_bits(data: Tensor) -> Tensor:
    """Each byte's eight bits as the eight bytes of an int64."""
    words = data.to(torch.int64)
    words.bitwise_or_(words << 28).bitwise_and_(0x0000000F0000000F)
    words.bitwise_or_(words << 14).bitwise_and_(0x0003000300030003)
    return words.bitwise_or_(words << 7).bitwise_and_(0x0101010101010101)


def _signed(words: Tensor, bits: int) -> Tensor:
    """The bytes of `words`, unsigned codes, as int8 in two's complement."""
    sign = 1 << (bits - 1)
    return words.view(torch.int8).bitwise_xor_(sign).sub_(sign)
