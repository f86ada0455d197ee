"""The torchao backend equals torchao bit for bit, where torchao's arithmetic holds."""

import pytest
import torch
from backends.weights import DTYPES, KINDS, weights
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.quantization import PerGroup, PerRow
from torchao.quantization.quantize_.workflows import Float8Tensor, Int4Tensor
from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import NF4Tensor

from quantune.backends.backend import pack_weight
from quantune.backends.torchao import TorchaoOptions
from quantune.backends.torchao.formats import TorchaoBackend
from quantune.errors import QuantizationError

BACKEND = TorchaoBackend()
ALL = [TorchaoOptions(weight_dtype=dtype).resolved() for dtype in ("int4", "nf4", "nvfp4", "int8", "fp8")]


def options(weight_dtype, **more):
    return TorchaoOptions(weight_dtype=weight_dtype, **more).resolved()


def same_values(found, expected):
    """Equal as numbers: the sign of a zero may differ."""
    assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [None, 32])
def test_int8_equals_torchao(dtype, kind, group_size):
    weight = weights((48, 128), dtype, kind)
    granularity = PerRow() if group_size is None else PerGroup(group_size)
    reference = Int8Tensor.from_hp(weight, granularity)
    packed = pack_weight(BACKEND, weight, options("int8", group_size=group_size))
    assert torch.equal(packed.views()["qdata"], reference.qdata)
    assert torch.equal(packed.views()["scale"], reference.scale)
    for out in DTYPES:
        same_values(BACKEND.dequantize(packed, out), reference.dequantize(out))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_equals_torchao(dtype, kind):
    weight = weights((48, 100), dtype, kind)
    reference = Float8Tensor.from_hp(weight)
    packed = pack_weight(BACKEND, weight, options("fp8"))
    scaled = reference.scale[:, 0] > 0  # torchao divides a row of zeros by its scale 0 and stores NaN
    assert torch.equal(packed.views()["scale"], reference.scale)
    assert torch.equal(packed.views()["qdata"][scaled].view(torch.uint8), reference.qdata[scaled].view(torch.uint8))
    for out in DTYPES:
        found = BACKEND.dequantize(packed, out)
        same_values(found[scaled], reference.dequantize(out)[scaled])
        assert not found[~scaled].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [32, 64])
def test_nf4_equals_torchao(dtype, kind, group_size):
    if kind == "subnormal" and dtype == torch.float16:
        pytest.skip("fp16 holds none of these values")
    weight = weights((128, 256), dtype, kind)
    reference = NF4Tensor.from_tensor(weight, group_size, 256)
    packed = pack_weight(BACKEND, weight, options("nf4", group_size=group_size))
    views = packed.views()
    blocks = weight.reshape(-1, group_size)
    whole = blocks.abs().amax(dim=1) > 0  # torchao divides a block of zeros by its scale 0 and stores -1 times it
    codes = views["quantized_data"].view(len(blocks), -1)
    assert torch.equal(codes[whole], reference.quantized_data.view(len(blocks), -1)[whole])
    spread = torch.isfinite(reference.quantization_factor)  # equal scales: 0 times infinity; fp16 overflows
    assert torch.equal(views["scaler_mean"], reference.scaler_mean.float().reshape(1))
    assert torch.equal(views["quantization_factor"][spread], reference.quantization_factor.float()[spread])
    scalers = views["quantized_scalers"].view(-1, 256)
    assert torch.equal(scalers[spread], reference.quantized_scalers.view(-1, 256)[spread])
    if whole.all() and spread.all():
        for out in DTYPES:
            same_values(BACKEND.dequantize(packed, out), reference.get_original_weight().to(out))
    zeros = BACKEND.dequantize(packed, torch.float32).reshape(-1, group_size)[~whole]
    assert not zeros.any()


def test_nf4_of_small_fp16_weights_keeps_its_scales_where_torchaos_factor_overflows():
    torch.manual_seed(0)
    weight = (torch.randn(64, 256) * 5e-4).half()
    assert torch.isinf(NF4Tensor.from_tensor(weight, 64, 256).quantization_factor).any()
    packed = pack_weight(BACKEND, weight, options("nf4"))
    error = (BACKEND.dequantize(packed, torch.float32) - weight.float()).norm() / weight.float().norm()
    assert error < 0.11


def test_nf4_with_a_huge_scaler_block_size_is_no_larger_than_it_needs_to_be():
    packed = pack_weight(BACKEND, torch.randn(64, 64), options("nf4", scaler_block_size=200_000_000))
    assert packed.data.numel() < 3000


@pytest.mark.parametrize("shape", [(3, 70), (7, 64), (5, 33)])
def test_nf4_stores_shapes_that_torchao_refuses_as_if_filled_up_with_zeros(shape):
    weight = weights(shape, torch.float32, "normal")
    packed = pack_weight(BACKEND, weight, options("nf4"))
    error = (BACKEND.dequantize(packed, torch.float32) - weight).norm() / weight.norm()
    assert error < 0.13


@pytest.mark.parametrize("kind", ["normal", "outliers", "zero rows", "huge", "tiny", "constant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nvfp4_equals_torchao(dtype, kind):
    weight = weights((48, 160), dtype, kind)
    scale = per_tensor_amax_to_scale(weight.abs().max())
    reference = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale)
    packed = pack_weight(BACKEND, weight, options("nvfp4"))
    views = packed.views()
    assert torch.equal(views["qdata"], reference.qdata)
    assert torch.equal(views["scale"].view(torch.uint8), reference.scale.view(torch.uint8))
    assert views["per_tensor_scale"] == scale
    for out in DTYPES:
        same_values(BACKEND.dequantize(packed, out), reference.dequantize(out))


def test_nvfp4_stores_a_weight_of_zeros_where_torchao_divides_by_zero():
    weight = torch.zeros(16, 32)
    reference = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().max()))
    assert not torch.isfinite(reference.scale.float()).all()
    packed = pack_weight(BACKEND, weight, options("nvfp4"))
    assert not BACKEND.dequantize(packed, torch.float32).any()


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_int4_is_the_layout_of_torchaos_int4_tensor(group_size):
    """Codes, scale and zero go into an `Int4Tensor` as they are; its own definition gives the same weight."""
    weight = weights((24, 512), torch.bfloat16, "normal")
    packed = pack_weight(BACKEND, weight, options("int4", group_size=group_size))
    views = BACKEND.export(packed)
    tensor = Int4Tensor(**views, block_size=[1, group_size], shape=weight.shape)
    low, high = (tensor.qdata << 4) >> 4, tensor.qdata >> 4  # arithmetic shifts: two's complement
    codes = torch.stack([low, high], dim=-1).view(weight.shape).float()
    scale, zero = (part.float().T.repeat_interleave(group_size, dim=1) for part in (tensor.scale, tensor.zero_point))
    same_values(BACKEND.dequantize(packed, torch.float32), codes * scale + zero)
    same_values(BACKEND.dequantize(packed, torch.bfloat16), (codes * scale + zero).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int4_is_within_half_a_step_of_the_weight(dtype, kind):
    weight = weights((24, 128), dtype, kind)
    packed = pack_weight(BACKEND, weight, options("int4", group_size=32))
    groups = weight.float().view(24, 4, 32)
    scale, zero = (packed.views()[name].float().T[:, :, None] for name in ("scale", "zero_point"))
    error = (BACKEND.dequantize(packed, torch.float32).view(24, 4, 32) - groups).abs()
    ends = 15 / 2 * scale * 2**-8 + zero.abs() * 2**-8  # scale and zero are rounded to bf16: 8 bits
    assert (error <= scale / 2 + 2 * ends + 1e-38).all()


def test_int4_of_equal_weights_is_exact():
    packed = pack_weight(BACKEND, weights((8, 64), torch.float32, "constant"), options("int4", group_size=32))
    assert (BACKEND.dequantize(packed, torch.float32) == 0.125).all()


@pytest.mark.parametrize("plan", ALL, ids=lambda plan: plan.weight_dtype)
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_packs_every_kind_of_weight_into_finite_values(plan, kind):
    weight = weights((24, 256), torch.float32, kind)
    found = BACKEND.dequantize(pack_weight(BACKEND, weight, plan), torch.float32)
    assert torch.isfinite(found).all()
    smallest = 6e-8 if plan.weight_dtype == "int8" else 1e-35  # torchao's int8 has no scale below 1.2e-7
    assert (found - weight).abs().max() <= weight.abs().max() * 0.2 + smallest


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (options("int4"), r"q_proj: group_size = 128 does not divide its 96 in features; group_size = 32 would"),
        (options("int8", group_size=64), r"q_proj: group_size = 64 does not divide its 96 in features"),
        (options("nvfp4"), "groups of 16, which do not divide its 100"),
    ],
)
def test_groups_that_do_not_divide_a_row_are_refused_by_name(plan, message):
    columns = 100 if plan.weight_dtype == "nvfp4" else 96
    with pytest.raises(QuantizationError, match=message):
        pack_weight(BACKEND, torch.randn(8, columns), plan, name="q_proj")


@pytest.mark.parametrize(
    ("given", "key", "message"),
    [
        ({"weight_dtype": "fp8", "group_size": 64}, "group_size", 'no meaning for weight_dtype = "fp8"'),
        ({"weight_dtype": "int4", "group_size": 48}, "group_size", "expected one of 32, 64, 128, 256"),
        ({"weight_dtype": "int4", "group_size": 0}, "group_size", "found 0"),
        ({"weight_dtype": "int8", "group_size": -1}, "group_size", "must be greater than 0, found -1"),
        ({"weight_dtype": "nvfp4", "group_size": 32}, "group_size", "expected 16"),
        ({"weight_dtype": "int8", "scaler_block_size": 8}, "scaler_block_size", "no meaning"),
        ({"weight_dtype": "nf4", "scaler_block_size": 0}, "scaler_block_size", "greater than 0"),
    ],
)
def test_options_that_do_not_fit_each_other_say_so(given, key, message):
    ((found_key, found),) = TorchaoOptions(**given).problems()
    assert found_key == key and message in found
