"""What is stored dequantizes to what the stored numbers say, and is nearer to the weight than rounding to nearest."""

import attrs
import pytest
import torch
from quantune.backends import kernels
from quantune.backends.backend import adopt_weight, pack_weight
from quantune.errors import QuantizationError

from quantune_hqq import HqqOptions, description
from quantune_hqq.codes import BITS
from quantune_hqq.formats import HqqBackend

BACKEND = HqqBackend()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_format = pytest.mark.parametrize("weight_dtype", BITS)


def normal(shape, std=0.02, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def with_outliers(shape=(256, 512)):
    """A normal distribution, one weight in a hundred eight times larger."""
    weight = normal(shape)
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.01
    return torch.where(chosen, weight * 8, weight)


def heavy_tailed(shape=(256, 512)):
    """Student's t with 3 degrees of freedom."""
    torch.manual_seed(0)
    return torch.distributions.StudentT(3.0).sample(shape) * 0.02


def relative_error(found, weight):
    return ((found - weight).norm() / weight.norm()).item()


def lp_error(found, weight, p=0.7):
    return ((found - weight).abs().pow(p).sum() / weight.abs().pow(p).sum()).item()


def stored_codes(views, bits):
    """Codes by plain arithmetic on single bytes."""
    data = views["codes"].int()
    if bits == 8:
        return data
    per_byte = 4 if bits == 3 else 8 // bits
    width = 8 // per_byte
    codes = torch.stack([(data >> (width * i)) % (1 << width) for i in range(per_byte)], dim=-1).flatten(1)
    if bits == 3:
        signs = torch.stack([(views["signs"].int() >> i) % 2 for i in range(8)], dim=-1).flatten(1)
        codes = codes + 4 * signs
    return torch.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes)


@every_format
@pytest.mark.parametrize("shape", [(24, 192), (5, 64), (2050, 576)], ids=str)  # the last is more than one chunk
def test_it_dequantizes_to_what_the_stored_numbers_say(weight_dtype, shape):
    packed = pack_weight(BACKEND, normal(shape), HqqOptions(weight_dtype=weight_dtype))
    views = packed.views()
    codes = stored_codes(views, BITS[weight_dtype]).float().unflatten(1, (-1, 64))
    expected = ((codes - views["zero"].float()[:, :, None]) * views["scale"].float()[:, :, None]).flatten(1)
    for dtype in DTYPES:
        assert torch.equal(BACKEND.dequantize(packed, dtype), expected.to(dtype))
    out = torch.full(shape, torch.nan)
    assert BACKEND.dequantize(packed, torch.float32, out) is out and torch.equal(out, expected)
    assert shape != (2050, 576) or out.numel() > kernels.CHUNK_ELEMENTS["cpu"]


@pytest.mark.parametrize("make", [with_outliers, heavy_tailed])
@pytest.mark.parametrize(
    ("weight_dtype", "relative", "lp"),  # what is left of the errors of rounding to nearest, at most
    [("int4", 0.97, 0.98), ("int3", 0.95, 0.97), ("int2", 0.77, 0.86)],
)
def test_outliers_cost_less_than_with_rounding_to_nearest(make, weight_dtype, relative, lp):
    weight = make()
    options = HqqOptions(weight_dtype=weight_dtype)
    fitted, rounded = (
        BACKEND.dequantize(pack_weight(BACKEND, weight, plan), torch.float32)
        for plan in (options, attrs.evolve(options, iterations=0))
    )
    assert relative_error(fitted, weight) < relative * relative_error(rounded, weight)
    assert lp_error(fitted, weight) < lp * lp_error(rounded, weight)


@every_format
def test_no_group_is_worse_than_rounded_to_nearest(weight_dtype):
    weight = heavy_tailed((64, 256))
    options = HqqOptions(weight_dtype=weight_dtype, group_size=32)
    fitted, rounded = (
        (BACKEND.dequantize(pack_weight(BACKEND, weight, plan), torch.float32) - weight).abs().view(-1, 32).mean(1)
        for plan in (options, attrs.evolve(options, iterations=0))
    )
    assert (fitted <= rounded * (1 + 1e-5)).all()


@pytest.mark.parametrize("weight_dtype", ["int4", "int3", "int2"])
def test_its_errors_are_below_those_of_the_hqq_package(weight_dtype):
    quantize = pytest.importorskip("hqq.core.quantize", reason="compares with the hqq package, which is not installed")
    weight = with_outliers()
    codes, meta = quantize.Quantizer.quantize(weight, nbits=BITS[weight_dtype], group_size=64, axis=1, device="cpu")
    theirs = quantize.Quantizer.dequantize(codes, {**meta, "compute_dtype": torch.float32})
    ours = BACKEND.dequantize(pack_weight(BACKEND, weight, HqqOptions(weight_dtype=weight_dtype)), torch.float32)
    assert lp_error(ours, weight) < lp_error(theirs, weight)
    assert relative_error(ours, weight) < relative_error(theirs, weight)


@every_format
def test_bytes_depend_on_the_rows_values_alone(weight_dtype):
    options = HqqOptions(weight_dtype=weight_dtype)
    weight = heavy_tailed((4100, 64))  # more than is fitted at once
    whole = pack_weight(BACKEND, weight, options).views()
    for rows in (slice(0, 1), slice(4090, 4100)):
        part = pack_weight(BACKEND, weight[rows], options).views()
        assert all(torch.equal(part[name], whole[name][rows]) for name in whole)


@every_format
@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e7, 1e30])
def test_the_unit_of_the_weights_does_not_matter(weight_dtype, factor):
    weight = with_outliers((32, 128))
    options = HqqOptions(weight_dtype=weight_dtype)
    one, other = (
        relative_error(BACKEND.dequantize(pack_weight(BACKEND, w, options), torch.float32).double(), w.double())
        for w in (weight, weight * factor)
    )
    assert other == pytest.approx(one, rel=0.05)  # the scales are rounded elsewhere


@every_format
@pytest.mark.parametrize("value", [0.0, 0.125, -3.0, 1e-3, 1e30, -7e-30])
def test_equal_weights_come_back_as_themselves(weight_dtype, value):
    weight = torch.full((4, 64), value).bfloat16()
    packed = pack_weight(BACKEND, weight, HqqOptions(weight_dtype=weight_dtype))
    assert torch.equal(BACKEND.dequantize(packed, torch.bfloat16), weight)


@every_format
def test_a_narrow_group_far_from_zero_keeps_eleven_bits_of_its_place(weight_dtype):
    weight = 5 + normal((8, 64), std=1e-6)
    found = BACKEND.dequantize(pack_weight(BACKEND, weight, HqqOptions(weight_dtype=weight_dtype)), torch.float32)
    assert ((found - weight).abs() <= 5 * 2.0**-11).all()


@every_format
def test_subnormal_weights_become_zeros_or_stay_near(weight_dtype):
    weight = normal((8, 64)) * 1e-38
    found = BACKEND.dequantize(pack_weight(BACKEND, weight, HqqOptions(weight_dtype=weight_dtype)), torch.float32)
    assert ((found - weight).abs() <= 2.0**-127 + 1e-40).all()


@every_format
def test_weights_at_the_end_of_fp32_stay_finite_or_are_refused(weight_dtype):
    largest = torch.finfo(torch.float32).max
    options = HqqOptions(weight_dtype=weight_dtype)
    near = pack_weight(BACKEND, normal((8, 64)).sign() * largest * 0.98, options)
    assert torch.isfinite(BACKEND.dequantize(near, torch.float32)).all()
    with pytest.raises(QuantizationError, match="its values are too large"):
        pack_weight(BACKEND, torch.full((8, 64), largest), options)


def test_groups_that_do_not_divide_a_row_are_refused_with_those_that_would():
    message = r"q_proj: group_size = 64 does not divide its 96 in features; group_size = 8 or 16 or 32 would"
    with pytest.raises(QuantizationError, match=message):
        pack_weight(BACKEND, normal((8, 96)), HqqOptions(), name="q_proj")


@every_format
def test_what_is_exported_is_adopted_bit_for_bit(weight_dtype):
    options = HqqOptions(weight_dtype=weight_dtype)
    packed = pack_weight(BACKEND, normal((8, 128)), options)
    adopted = adopt_weight(BACKEND, BACKEND.export(packed), (8, 128), torch.float32, options)
    assert torch.equal(adopted.data, packed.data)


@pytest.mark.parametrize("name", ["scale", "zero"])
def test_a_checkpoint_with_numbers_that_are_none_is_refused_by_name(name):
    tensors = {
        key: tensor.clone() for key, tensor in pack_weight(BACKEND, normal((8, 128)), HqqOptions()).views().items()
    }
    tensors[name][3, 1] = torch.nan
    with pytest.raises(QuantizationError, match=f"up_proj: its {name} holds NaN or infinity"):
        adopt_weight(BACKEND, tensors, (8, 128), torch.float32, HqqOptions(), name="up_proj")


@every_format
def test_bits_per_weight_are_those_declared(weight_dtype):
    layout = BACKEND.layout((4096, 4096), torch.bfloat16, HqqOptions(weight_dtype=weight_dtype))
    assert layout.bits_per_weight == description.bits_per_weight[weight_dtype]


@pytest.mark.parametrize(
    ("given", "key", "message"),
    [
        ({"group_size": 0}, "group_size", "expected a positive multiple of 8, found 0"),
        ({"group_size": -64}, "group_size", "found -64"),
        ({"group_size": 12}, "group_size", "found 12"),
        ({"iterations": -1}, "iterations", "must not be negative"),
        ({"lp_norm": 0.0}, "lp_norm", "greater than 0 and at most 1"),
        ({"lp_norm": 1.5}, "lp_norm", "found 1.5"),
        ({"lp_norm": float("nan")}, "lp_norm", "found nan"),
    ],
)
def test_options_out_of_range_say_what_is_expected(given, key, message):
    ((found_key, found),) = HqqOptions(**given).problems()
    assert found_key == key and message in found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@every_format
def test_a_gpu_reads_the_same_weight(weight_dtype):
    weight = heavy_tailed((64, 256))
    packed = pack_weight(BACKEND, weight, HqqOptions(weight_dtype=weight_dtype))
    moved = attrs.evolve(packed, data=packed.data.cuda())
    for dtype in DTYPES:
        assert torch.equal(BACKEND.dequantize(moved, dtype).cpu(), BACKEND.dequantize(packed, dtype))
    there = BACKEND.dequantize(
        pack_weight(BACKEND, weight.cuda(), HqqOptions(weight_dtype=weight_dtype)), torch.float32
    )
    error = relative_error(BACKEND.dequantize(packed, torch.float32), weight)
    assert relative_error(there.cpu(), weight) == pytest.approx(error, rel=0.01)
