"""Checks of the format: what packing stores and what comes back."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from quantune.backends.backend import pack_weight
from quantune.backends.layout import PackedWeight, TensorSpec
from quantune.errors import QuantizationError
from quantune.merge.rounding import grid_of, with_codes
from quantune.testing.case import Subject
from quantune.testing.failing import expecting_no_error, fail, require
from quantune.testing.weights import DTYPES, KINDS, relative_error, same_bits, steps_apart

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
AWKWARD_ALLOWANCE = 1.5
"""How many times the bound a small weight may err: over a few weights the errors average less."""
NEARLY_ZERO = 1e-6
MAY_BE_REFUSED = ("huge", "tiny", "subnormal")
WORLD_SIZES = (2, 3, 5, 7)
SAME_CODE = 1e-5
"""How near, as a share of the largest magnitude, two dequantized weights are that have the same code."""
MOST = 0.99
"""Share of weights that must have the same code on every device; arithmetic there may round a few the other way."""
every_device = pytest.mark.parametrize("device", ["cpu", "cuda"])


class FormatChecks:
    """Weights come back, and their bytes are the same every time and mean the same everywhere."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_weights_come_back_within_the_bound(self, subject: Subject, kind: str) -> None:
        worst, where = -1.0, ""
        for shape in subject.case.shapes:
            for dtype in DTYPES:
                weight = subject.weight(shape, dtype, kind)
                packed = _packed_unless_refused(subject, weight, kind)
                if packed is not None:
                    error = _error(subject.dequantize(packed), weight, kind)
                    worst, where = max((worst, where), (error, f"{SHORT[dtype]}, {shape}"))
        _require_within(worst, subject.case.bound(kind), kind, where)

    def test_inner_tensors_say_what_pack_stores(self, subject: Subject) -> None:
        for shape in subject.case.shapes:
            for dtype in DTYPES:
                specs = _specs(subject, shape)
                weight = subject.weight(shape, dtype)
                with expecting_no_error(f"pack of a {SHORT[dtype]} weight of shape {shape}"):
                    tensors = subject.backend.pack(weight, subject.options)
                require(
                    tensors.keys() == specs.keys(),
                    f"pack returned the tensors {sorted(tensors)}, inner_tensors says {sorted(specs)}; they must agree",
                )
                for name, spec in specs.items():
                    found = TensorSpec(tensors[name].dtype, tuple(tensors[name].shape))
                    require(
                        found == spec,
                        f"pack of a {SHORT[dtype]} weight of shape {shape} returned {name!r} as {found.dtype} "
                        f"{found.shape}, inner_tensors says {spec.dtype} {tuple(spec.shape)}; they must agree, "
                        "whatever the dtype of the weight",
                    )
                    require(
                        tensors[name].device == weight.device,
                        f"pack returned {name!r} on {tensors[name].device}, expected the weight's {weight.device}",
                    )

    def test_packing_gives_the_same_bytes_every_time(self, subject: Subject) -> None:
        for dtype in DTYPES:
            weight = subject.weight(dtype=dtype)
            torch.manual_seed(1)
            first = subject.pack(weight).data
            subject.pack(subject.weight(dtype=dtype, kind="outliers", seed=1))
            torch.manual_seed(2)
            for what, again in (
                ("the same weight", weight),
                ("a copy", weight.clone()),
                ("a transposed copy", weight.T.contiguous().T),
                ("a part of a larger tensor", torch.cat([weight, weight])[weight.shape[0] :]),
            ):
                require(
                    torch.equal(subject.pack(again).data, first),
                    f"packing {what} in {SHORT[dtype]} a second time gave other bytes; they must depend on the "
                    "values and options alone: no random numbers, no memory of earlier weights, nothing left "
                    "uninitialized (checkpoints and ranks are compared by these bytes)",
                )

    def test_codes_stand_for_the_values_that_are_said(self, subject: Subject) -> None:
        backend, packed = subject.backend, subject.pack(subject.weight())
        with expecting_no_error("element_values or with_elements"):
            grid = grid_of(backend, packed)
            if grid is None:
                pytest.skip("the format does not say which values its codes stand for")
            generator = torch.Generator().manual_seed(0)
            index = torch.randint(len(grid.codes_C), packed.layout.shape, generator=generator)
            found = subject.dequantize(with_codes(backend, packed, grid.codes_C[index]))
        expected = grid.values_C[index] * grid.scale_IO.T + grid.offset_IO.T
        error = relative_error(found, expected)
        require(
            error < SAME_CODE,
            f"weights with other codes, written by with_elements, are off by {error:.2g} from what element_values says "
            "they stand for; each weight must be its code's value times a scale, plus an offset, and the codes "
            "(out features, in features)",
        )

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("device", ["cuda"])
    def test_packing_on_a_gpu_stores_what_packing_on_the_cpu_does(
        self, subject: Subject, kind: str, device: str
    ) -> None:
        """A GPU packs its weights itself: the same bytes every time, and but for roundings the same weights."""
        _require_device(subject, device)
        for dtype in DTYPES:
            weight = subject.weight(dtype=dtype, kind=kind).to(device)
            packed, again = subject.pack(weight), subject.pack(weight)
            found_on = packed.data.device.type
            require(found_on == device, f"packing a weight on {device} gave bytes on {found_on}")
            require(torch.equal(packed.data, again.data), f"packing twice on {device} gave other bytes")
            here = subject.dequantize(PackedWeight(packed.layout, packed.data.cpu())).float()
            there = subject.dequantize(subject.pack(weight.cpu())).float()
            smallest = torch.finfo(torch.float32).tiny  # below it a GPU's fast arithmetic takes numbers for zero
            apart = (here - there).abs() > (there.abs().max() * SAME_CODE).clamp_min(smallest)
            require(
                float(apart.float().mean()) < 1 - MOST,
                f"a {SHORT[dtype]} weight of the kind {kind!r} packed on {device} means another weight than packed on "
                "the CPU; a rounding apart is fine for single weights, more is not",
            )

    def test_packing_leaves_the_weight_as_it_was(self, subject: Subject) -> None:
        for dtype in DTYPES:
            weight = subject.weight(dtype=dtype)
            before = weight.clone()
            subject.pack(weight)
            require(torch.equal(weight, before), "pack changed the weight it was given; copy before working in place")

    def test_awkward_shapes_are_stored_or_refused(self, subject: Subject) -> None:
        for shape in subject.case.awkward_shapes:
            try:
                subject.backend.inner_tensors(shape, subject.options)
            except QuantizationError as error:
                require(bool(str(error)), f"the QuantizationError for shape {shape} is empty; say what would fit")
                continue
            except Exception as error:
                fail(
                    f"inner_tensors({shape}) raised {type(error).__name__}: {error}. A shape that the format can't "
                    "store must be refused with a QuantizationError that says what does not fit and what would"
                )
            for dtype in DTYPES:
                weight = subject.weight(shape, dtype)
                try:
                    packed = pack_weight(subject.backend, weight, subject.options)
                except Exception as error:
                    fail(
                        f"inner_tensors accepts the shape {shape}, packing it raised {type(error).__name__}: {error}. "
                        "Store it, or raise QuantizationError in inner_tensors, which is asked before weights are read"
                    )
                with expecting_no_error(f"dequantizing a weight of shape {shape}"):
                    found = subject.backend.dequantize(packed, torch.float32)
                _require_within(
                    _error(found, weight, "normal"),
                    AWKWARD_ALLOWANCE * subject.case.error,
                    "normal",
                    f"{SHORT[dtype]}, {shape}",
                )

    def test_bytes_cut_anywhere_and_rejoined_mean_the_same(self, subject: Subject) -> None:
        packed = subject.pack(subject.weight())
        expected = subject.dequantize(packed).clone()
        count = packed.data.numel()
        cuts: list[Iterable[int]] = [range(size, count, size) for size in (-(-count // world) for world in WORLD_SIZES)]
        cuts += [[at] for at in sorted({1, 17, count // 2 + 1, count - 1})]
        for at in cuts:
            parts = [part.clone() for part in torch.tensor_split(packed.data, list(at))]
            found = subject.dequantize(PackedWeight(packed.layout, torch.cat(parts)))
            require(
                same_bits(found, expected),
                f"bytes cut at {list(at)} and rejoined dequantize to other values; a rank holds any slice of the flat "
                "bytes and dequantize gets them gathered again: it must use nothing but packed.views()",
            )

    def test_bytes_mean_the_same_wherever_they_lie(self, subject: Subject) -> None:
        one, two = (subject.pack(subject.weight(seed=seed)) for seed in (0, 1))
        expected = {id(packed): subject.dequantize(packed).clone() for packed in (one, two)}
        place = torch.zeros(one.layout.nbytes, dtype=torch.uint8, device=subject.device)
        for packed in (one, two, one):
            place.copy_(packed.data)
            require(
                same_bits(subject.dequantize(PackedWeight(packed.layout, place)), expected[id(packed)]),
                "bytes gathered into the buffer of another weight dequantize to other values; gathering reuses "
                "memory, so nothing may be remembered by address or by layout",
            )
        stack = torch.stack([two.data, one.data, two.data])
        require(
            same_bits(subject.dequantize(PackedWeight(one.layout, stack[1])), expected[id(one)]),
            "bytes that are a row of a stack dequantize to other values; look at packed.views(), not at the storage",
        )

    def test_weights_do_not_share_state(self, subject: Subject) -> None:
        one = subject.pack(subject.weight(seed=0))
        expected = subject.dequantize(one).clone()
        two = subject.pack(subject.weight(kind="outliers", seed=1))
        subject.dequantize(two)
        remedy = "a backend is stateless: whatever dequantizing needs is in the inner tensors and the layout"
        require(
            same_bits(subject.dequantize(one), expected),
            f"a weight dequantizes to other values after another one was packed; {remedy}",
        )
        with expecting_no_error("dequantizing with a second instance from load()", remedy):
            found = subject.case.description.load().dequantize(one, torch.float32)
        require(
            same_bits(found, expected),
            f"a second instance from load() dequantizes the same bytes to other values; {remedy}",
        )

    @every_device
    def test_dequantize_gives_the_dtype_asked_for(self, subject: Subject, device: str) -> None:
        _require_device(subject, device)
        for stored in DTYPES:
            packed = _moved(subject.pack(subject.weight(dtype=stored)), device)
            exact = subject.dequantize(packed, torch.float32)
            _require_shape(exact, packed, torch.float32)
            for dtype in (torch.bfloat16, torch.float16):
                found = subject.dequantize(packed, dtype)
                _require_shape(found, packed, dtype)
                apart = steps_apart(found, exact.to(dtype))
                allowed = subject.case.ulps
                require(
                    apart <= allowed,
                    f"dequantized to {SHORT[dtype]} (packed from {SHORT[stored]}, on {device}), it differs from the "
                    f"fp32 result rounded by up to {apart} representable numbers, allowed are {allowed}: compute "
                    "in fp32 and round once, or state Case(ulps=1) if the format is defined otherwise",
                )

    @every_device
    def test_dequantize_fills_out_if_it_says_so(self, subject: Subject, device: str) -> None:
        _require_device(subject, device)
        for shape in subject.case.shapes:
            packed = _moved(subject.pack(subject.weight(shape)), device)
            for dtype in DTYPES:
                expected = subject.dequantize(packed, dtype).clone()
                out = torch.full(shape, math.nan, dtype=dtype, device=device)
                found = subject.dequantize(packed, dtype, out)
                _require_shape(found, packed, dtype)
                require(
                    same_bits(found, expected),
                    f"dequantize to {SHORT[dtype]} gives other values with out than without; out's contents are "
                    "undefined, every element must be written",
                )
                if subject.backend.fills_out(packed.layout, dtype):
                    require(
                        found.data_ptr() == out.data_ptr() and found.stride() == out.stride(),
                        f"fills_out says yes for {SHORT[dtype]}, but the result is another tensor than out; write into "
                        "out and return it, or say no in fills_out",
                    )

    @every_device
    def test_dequantize_leaves_the_bytes_as_they_were(self, subject: Subject, device: str) -> None:
        _require_device(subject, device)
        packed = _moved(subject.pack(subject.weight()), device)
        before = packed.data.clone()
        for dtype in DTYPES:
            for out in (None, torch.empty(subject.shape, dtype=dtype, device=device)):
                subject.dequantize(packed, dtype, out)
                require(
                    torch.equal(packed.data, before),
                    "dequantize changed the packed bytes; views share their memory, so work in place on copies only",
                )

    def test_a_result_is_the_callers_own(self, subject: Subject) -> None:
        packed = subject.pack(subject.weight())
        before, expected = packed.data.clone(), subject.dequantize(packed).clone()
        for out in (None, torch.empty(subject.shape, device=subject.device)):
            subject.dequantize(packed, torch.float32, out).fill_(math.nan)
            require(
                torch.equal(packed.data, before) and same_bits(subject.dequantize(packed), expected),
                "writing into a result of dequantize changed the packed bytes or a later result; return new memory, or "
                "out, and keep no reference to either (merging adds in place)",
            )
        first = subject.dequantize(packed)
        second = subject.dequantize(subject.pack(subject.weight(seed=1)))
        require(
            same_bits(first, expected) and first.data_ptr() != second.data_ptr(),
            "a result of dequantize without out was overwritten by the next one; return new memory every time",
        )


def _packed_unless_refused(subject: Subject, weight: Tensor, kind: str) -> PackedWeight | None:
    """The packed weight; None where a format refuses magnitudes that it can't hold, which is honest."""
    what = f"a weight of the kind {kind!r} in {SHORT[weight.dtype]}"
    try:
        return pack_weight(subject.backend, weight, subject.options)
    except QuantizationError as error:
        if kind in MAY_BE_REFUSED:
            return None
        fail(f"{what} is refused: {error}. It must be stored")
    except Exception as error:
        fail(
            f"packing {what} raised {type(error).__name__}: {error}. pack must store every finite weight of a shape "
            "that inner_tensors accepts, or raise a QuantizationError that says why it can't"
        )


def _error(found: Tensor, weight: Tensor, kind: str) -> float:
    """The relative error of a weight that came back; of zeros, the largest magnitude."""
    require(
        found.shape == weight.shape,
        f"dequantize returned shape {tuple(found.shape)} for a weight of shape {tuple(weight.shape)}",
    )
    require(
        bool(torch.isfinite(found).all()),
        f"a weight of the kind {kind!r} ({SHORT[weight.dtype]}, {tuple(weight.shape)}) came back with NaN or infinity; "
        "look for a division by a scale of zero and for scales out of range",
    )
    return relative_error(found, weight)


def _require_within(error: float, bound: float, kind: str, where: str) -> None:
    if kind == "zeros":
        require(
            error <= NEARLY_ZERO,
            f"zeros came back as {error:.4g} ({where}), expected zeros; give them the code and scale of zero",
        )
        return
    state = "a larger error" if kind == "normal" else f'errors={{"{kind}": ...}}'
    require(
        error <= bound,
        f"a weight of the kind {kind!r} came back with a relative error of {error:.4g} at worst ({where}), the case "
        f"allows {bound:.4g}; look at scales, order and rounding, or state {state} if the format can't do better",
    )


def _require_shape(found: Tensor, packed: PackedWeight, dtype: torch.dtype) -> None:
    shape = packed.layout.shape
    require(
        found.dtype == dtype and found.shape == shape,
        f"dequantize to {dtype} returned {found.dtype} of shape {tuple(found.shape)}, expected {dtype} of {shape}",
    )


def _specs(subject: Subject, shape: tuple[int, int]) -> dict[str, TensorSpec]:
    with expecting_no_error(f"inner_tensors({shape})", "A shape of Case.shapes must be stored."):
        specs, again = (dict(subject.backend.inner_tensors(shape, subject.options)) for _ in range(2))
    require(
        list(specs.items()) == list(again.items()),
        f"inner_tensors({shape}) gave {specs} and then {again}; it must depend on shape and options alone",
    )
    return specs


def _require_device(subject: Subject, device: str) -> None:
    if device not in subject.devices:
        pytest.skip(f"no {device} here, or none that the backend runs on")


def _moved(packed: PackedWeight, device: str) -> PackedWeight:
    return PackedWeight(packed.layout, packed.data.to(device))
