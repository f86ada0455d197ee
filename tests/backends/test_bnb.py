"""The bnb backend equals bitsandbytes bit for bit."""

import bitsandbytes.functional as bnb
import pytest
import torch

from quantune.backends.backend import pack_weight
from quantune.backends.bnb import BnbOptions
from quantune.backends.bnb.formats import BnbBackend, _write_zeros
from quantune.errors import QuantizationError
from quantune.testing.weights import make_weight

BACKEND = BnbBackend()
SHAPES = [(64, 128), (256, 256), (3, 70), (7, 64), (5, 33)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(shape, dtype, kind):
    torch.manual_seed(0)
    weight = torch.randn(shape) * 0.02
    if kind == "outliers":
        weight[::3, ::5] *= 100
    if kind == "zero rows":
        weight[::2] = 0
    if kind == "huge":
        weight *= 1e5
    if kind == "subnormal":
        weight *= 1e-38
    return weight.to(dtype)


KINDS = ["normal", "outliers", "zero rows", "huge", "subnormal"]


def finite(weight):
    return bool(torch.isfinite(weight).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_dtype", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_4bit_packing_and_dequantizing_equal_bitsandbytes(weight_dtype, double_quant, shape, kind):
    for dtype in DTYPES:
        weight = weights(shape, dtype, kind)
        if not finite(weight):
            continue  # huge values overflow fp16
        options = BnbOptions(weight_dtype=weight_dtype, double_quant=double_quant)
        packed = pack_weight(BACKEND, weight, options)
        codes, state = bnb.quantize_4bit(weight, quant_type=weight_dtype, compress_statistics=double_quant)
        assert torch.equal(packed.views()["codes"], codes.reshape(-1))
        assert torch.equal(packed.views()["absmax"], state.absmax)
        expected = bnb.dequantize_4bit(codes, state)
        assert torch.equal(BACKEND.dequantize(packed, dtype), expected)
        out = torch.empty(shape, dtype=dtype)
        assert torch.equal(BACKEND.dequantize(packed, dtype, out), expected)


@pytest.mark.parametrize("shape", [(3, 160), (5, 96), (129, 32), (4, 64)])
@pytest.mark.parametrize("weight_dtype", ["nf4", "fp4"])
def test_blocks_run_on_from_row_to_row(weight_dtype, shape):
    """Against the definition: with AVX512 bitsandbytes 0.50 begins a block with each row when it dequantizes."""
    weight = weights(shape, torch.float32, "normal")
    packed = pack_weight(BACKEND, weight, BnbOptions(weight_dtype=weight_dtype, double_quant=False))
    codes, absmax = packed.views()["codes"], packed.views()["absmax"]
    each = torch.stack([codes >> 4, codes & 15], dim=1).flatten().long()
    values = bnb.get_4bit_type(weight_dtype, device="cpu")[each] * absmax.repeat_interleave(64)[: weight.numel()]
    assert torch.equal(BACKEND.dequantize(packed, torch.float32), values.view(shape))


@pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
def test_every_block_size_equals_bitsandbytes(block_size):
    weight = weights((64, 200), torch.float32, "normal")
    packed = pack_weight(BACKEND, weight, BnbOptions(block_size=block_size, double_quant=False))
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=block_size)
    assert torch.equal(BACKEND.dequantize(packed, torch.float32), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_packing_and_dequantizing_equal_bitsandbytes(shape, kind):
    for dtype in DTYPES:
        weight = weights(shape, dtype, kind)
        if not finite(weight):
            continue
        packed = pack_weight(BACKEND, weight, BnbOptions(weight_dtype="int8"))
        codes, absmax, _ = bnb.int8_vectorwise_quant(weight.clone())
        nonzero = absmax > 1e-37  # below, 127 / absmax overflows: bitsandbytes' codes of such rows are undefined
        assert torch.equal(packed.views()["absmax"], absmax)
        assert torch.equal(packed.views()["codes"][nonzero], codes[nonzero])
        expected = bnb.int8_vectorwise_dequant(packed.views()["codes"].clone(), absmax)
        assert torch.equal(BACKEND.dequantize(packed, torch.float32), expected)
        assert torch.equal(BACKEND.dequantize(packed, torch.float32, torch.empty(shape)), expected)
        assert torch.equal(BACKEND.dequantize(packed, torch.bfloat16), expected.to(torch.bfloat16))


def test_rows_of_zeros_stay_zero():
    packed = pack_weight(BACKEND, torch.zeros(4, 64), BnbOptions(weight_dtype="int8"))
    assert not BACKEND.dequantize(packed, torch.float32).any()


@pytest.mark.parametrize("shape", [(4, 64), (3, 35)])
def test_blocks_of_zeros_that_a_gpu_packs_get_the_code_of_zero(shape):
    """CUDA's kernel writes the code of -1 there; what puts it right is tried here on codes that are all wrong."""
    weight = make_weight(shape)
    weight[1:] = 0
    packed = pack_weight(BnbBackend(), weight, BnbOptions(double_quant=False))
    codes = packed.views()["codes"]
    wrong = codes.clone()
    wrong[32:] = 0  # all blocks of 64 but the first, which is not all zeros
    _write_zeros(wrong, weight, 64)
    assert torch.equal(wrong, codes)


def test_packing_the_same_weight_twice_gives_the_same_bytes():
    weight = weights((64, 128), torch.bfloat16, "normal")
    for weight_dtype in ("nf4", "fp4", "int8"):
        first, second = (pack_weight(BACKEND, weight, BnbOptions(weight_dtype=weight_dtype)) for _ in range(2))
        assert torch.equal(first.data, second.data)
        assert first.layout == second.layout


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        (BnbOptions(double_quant=False), 4.5),
        (BnbOptions(), 4.127),
        (BnbOptions(weight_dtype="int8"), 8.031),
    ],
)
def test_bits_per_weight(options, bits):
    layout = BACKEND.layout((1024, 1024), torch.bfloat16, options)
    assert layout.bits_per_weight == pytest.approx(bits, abs=1e-3)


def test_merging_adds_in_fp32_and_rounds_once():
    weight = weights((64, 128), torch.bfloat16, "normal")
    packed = pack_weight(BACKEND, weight, BnbOptions())
    delta = torch.randn(64, 128) * 1e-3
    expected = (BACKEND.dequantize(packed, torch.float32) + delta).to(torch.bfloat16)
    assert torch.equal(BACKEND.merge(packed, delta, torch.bfloat16), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad):
    weight = torch.zeros(4, 64)
    weight[1, 2] = bad
    with pytest.raises(QuantizationError, match=r"layers\.3\.mlp: can't be packed, it holds NaN or infinity"):
        pack_weight(BACKEND, weight, BnbOptions(), name="layers.3.mlp")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BnbOptions(weight_dtype="int8", block_size=64), "block_size has no meaning"),
        (BnbOptions(weight_dtype="int8", double_quant=False), "double_quant has no meaning"),
        (BnbOptions(block_size=48), "expected one of 32, 64"),
    ],
)
def test_options_that_do_not_fit_each_other_say_so(options, message):
    assert message in next(iter(options.problems()))[1]
