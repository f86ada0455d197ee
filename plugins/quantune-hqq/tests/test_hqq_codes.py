"""Codes are stored in exactly their bits, and come back."""

import pytest
import torch

from quantune_hqq.codes import BITS, code_tensors, decode, limits, pack_codes


def random_codes(bits, shape):
    low, high = limits(bits)
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)


@pytest.mark.parametrize("bits", BITS.values())
@pytest.mark.parametrize("shape", [(1, 8), (3, 40), (64, 512)])
def test_codes_come_back_whole_and_in_parts(bits, shape):
    codes = random_codes(bits, shape)
    packed = pack_codes(codes, bits)
    expected, count = codes.view(-1).float(), codes.numel()
    for start, stop in ((0, count), (0, 8), (count - 8, count), (count // 16 * 8, count)):
        chunk = torch.full((stop - start,), torch.nan)
        decode(packed, bits, start, stop, chunk)
        assert torch.equal(chunk, expected[start:stop])


@pytest.mark.parametrize("bits", BITS.values())
def test_they_take_their_bits_and_no_more(bits):
    shape = (6, 64)
    specs, packed = code_tensors(shape, bits), pack_codes(random_codes(bits, shape), bits)
    assert {name: (spec.dtype, spec.shape) for name, spec in specs.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.items()
    }
    assert 8 * sum(spec.nbytes for spec in specs.values()) == bits * 6 * 64


@pytest.mark.parametrize("bits", BITS.values())
def test_packing_leaves_the_codes_as_they_were(bits):
    codes = random_codes(bits, (4, 16))
    before = codes.clone()
    pack_codes(codes, bits)
    assert torch.equal(codes, before)


def test_the_first_code_is_in_the_lowest_bits():
    codes = torch.tensor([[1, 0, -1, -2, 0, 0, 0, 0]], dtype=torch.int8)
    assert pack_codes(codes, 2)["codes"].tolist() == [[0b10_11_00_01, 0]]
    assert pack_codes(codes, 4)["codes"].tolist() == [[0x01, 0xEF, 0, 0]]
    three = pack_codes(torch.tensor([[3, 0, -1, -4, 0, 0, 0, -3]], dtype=torch.int8), 3)
    assert three["codes"].tolist() == [[0b00_11_00_11, 0b01_00_00_00]]
    assert three["signs"].tolist() == [[0b1000_1100]]
