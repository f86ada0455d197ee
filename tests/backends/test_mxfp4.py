"""The mxfp4 backend equals the OCP specification, torchao where it follows it, and transformers' reading of gpt-oss."""

import pytest
import torch
from backends.weights import DTYPES, KINDS, weights
from torchao.prototype.mx_formats.mx_tensor import MXTensor, to_mx
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quantune.backends.backend import adopt_weight, pack_weight
from quantune.backends.kernels import E2M1_VALUES, encode_e2m1
from quantune.backends.mxfp4 import Mxfp4Options
from quantune.backends.mxfp4.formats import Mxfp4Backend
from quantune.errors import QuantizationError

BACKEND = Mxfp4Backend()
OPTIONS = Mxfp4Options()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "subnormal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_equals_torchao(dtype, kind):
    weight = weights((48, 160), dtype, kind)
    scales, codes = to_mx(weight, torch.float4_e2m1fn_x2, 32)
    packed = pack_weight(BACKEND, weight, OPTIONS)
    assert torch.equal(packed.views()["blocks"], codes)
    assert torch.equal(packed.views()["scales"], scales.view(torch.uint8))
    reference = MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32)
    assert torch.equal(BACKEND.dequantize(packed, dtype), reference.dequantize(dtype))


def test_below_the_smallest_scale_the_specification_decides():
    """torchao divides by 2^-126 where it stores 2^-127; the nearest code of the stored scale is twice as large."""
    weight = torch.full((1, 32), 2.0**-126)
    _, codes = to_mx(weight, torch.float4_e2m1fn_x2, 32)
    packed = pack_weight(BACKEND, weight, OPTIONS)
    assert (packed.views()["scales"] == 0).all()
    assert torch.equal(BACKEND.dequantize(packed, torch.float32), weight)
    assert not torch.equal(packed.views()["blocks"], codes)


def test_every_code_and_scale_dequantizes_to_the_values_of_the_specification():
    codes = torch.arange(256, dtype=torch.uint8).repeat(255, 1)  # 512 weights a row: 16 blocks
    scales = torch.arange(255, dtype=torch.uint8)[:, None].repeat(1, 16)
    packed = adopt_weight(
        BACKEND, {"blocks": codes.view(255, 16, 16), "scales": scales}, (255, 512), torch.float32, OPTIONS
    )
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64)
    byte = torch.arange(256)
    row = torch.stack([values[byte & 15], values[byte >> 4]], dim=1).view(-1)
    expected = row * torch.pow(torch.tensor(2.0, dtype=torch.float64), torch.arange(255.0) - 127)[:, None]
    assert torch.equal(BACKEND.dequantize(packed, torch.float32), expected.float())


def test_dequantizing_equals_transformers_on_a_gpt_oss_checkpoint():
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (2, 64, 3, 16), dtype=torch.uint8)  # (experts, out, in / 32, 16)
    scales = torch.randint(110, 135, (2, 64, 3), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales)  # (experts, in, out), bf16
    for expert in range(2):
        tensors = {"blocks": blocks[expert], "scales": scales[expert]}
        packed = adopt_weight(BACKEND, tensors, (64, 96), torch.bfloat16, OPTIONS)
        assert torch.equal(BACKEND.dequantize(packed, torch.bfloat16), expected[expert].T)
        back = BACKEND.export(packed)
        assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_rounding_is_to_the_nearest_value_and_to_the_even_code_on_a_tie():
    values = torch.tensor(E2M1_VALUES[:8])
    for low, high in zip(range(7), range(1, 8), strict=True):
        middle = (values[low] + values[high]) / 2
        even = low if low % 2 == 0 else high
        below, above = (torch.nextafter(middle, values[end]) for end in (low, high))
        assert encode_e2m1(torch.stack([below, middle, above])).tolist() == [low, even, high]
        assert encode_e2m1(-torch.stack([below, middle, above])).tolist() == [8 + low, 8 + even, 8 + high]
    assert encode_e2m1(torch.tensor([6.0, 1e30, -1e30])).tolist() == [7, 7, 15]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_weight_becomes_finite_values_near_it(dtype, kind):
    weight = weights((16, 64), dtype, kind).float()
    found = BACKEND.dequantize(pack_weight(BACKEND, weight, OPTIONS), torch.float32)
    assert torch.isfinite(found).all()
    assert (found - weight).abs().max() <= weight.abs().max() * 0.25 + 2.0**-129  # half the smallest step there is


def test_rows_that_are_no_multiple_of_32_are_refused_by_name():
    with pytest.raises(QuantizationError, match="down_proj: mxfp4 stores rows in blocks of 32, .* its 48"):
        pack_weight(BACKEND, torch.randn(8, 48), OPTIONS, name="down_proj")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": torch.zeros(8, 1, 16, dtype=torch.uint8)}, r"expected MXFP4 blocks \(8, 2, 16\)"),
        ({"scales": torch.full((8, 2), 255, dtype=torch.uint8)}, "not a number"),
        ({"scales": torch.zeros(8, 2, dtype=torch.int8)}, "expected inner tensor 'scales' as torch.uint8"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(change, message):
    good = BACKEND.export(pack_weight(BACKEND, torch.randn(8, 64), OPTIONS))
    with pytest.raises(QuantizationError, match="up_proj: .*" + message):
        adopt_weight(BACKEND, {**good, **change}, (8, 64), torch.float32, OPTIONS, name="up_proj")
