"""Backends that are broken on purpose, each in one way, and the checks of the kit that must find it.

Not collected with the other tests: `test_broken_backends` runs pytest on this file and reads what failed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent / "tiny_plugin"))

from broken_description import probing_with_torch
from quantune_tiny import TinyOptions, description
from quantune_tiny.formats import TinyBackend

from quantune.backends import kernels
from quantune.backends.backend import Backend
from quantune.backends.description import BackendDescription, Probe
from quantune.backends.layout import PackedWeight, TensorSpec
from quantune.backends.readers import Reader
from quantune.errors import QuantizationError
from quantune.testing import BackendConformance, Case

INT4 = TinyOptions(weight_dtype="int4").resolved()


@attrs.frozen(kw_only=True)
class Broken:
    """A case with one fault."""

    case: Case
    fails: tuple[Any, ...]
    """The checks that find it, without `test_`; with `...` at the end others fail as well."""
    says: str
    """What the first of them says, in part."""


BROKEN: dict[str, Broken] = {}
DESCRIBED: set[str] = set()
"""Those whose description is broken, not their format."""


def case_of(made: BackendDescription, options: Any = None) -> Case:
    options = made.options() if options is None else options
    if getattr(options, "weight_dtype", "") == "int4":
        return Case(description=made, options=options, error=0.12, errors={"outliers": 0.15})
    return Case(description=made, options=options, error=0.015, errors={"outliers": 0.05})


def backend(*fails: Any, says: str, options: Any = None) -> Callable[[type[Backend]], type[Backend]]:
    """Register a class as a broken backend behind the description of the tiny plugin."""

    def register(cls: type[Backend]) -> type[Backend]:
        case = case_of(attrs.evolve(description, load=cls), options)
        BROKEN[cls.__name__] = Broken(case=case, fails=fails, says=says)
        return cls

    return register


def described(title: str, *fails: Any, says: str, options: Any = None, **changes: Any) -> None:
    """Register a broken description of a sound backend."""
    if options is not None:
        changes["options"] = type(options)
    DESCRIBED.add(title)
    BROKEN[title] = Broken(case=case_of(attrs.evolve(description, **changes), options), fails=fails, says=says)


BOUND = "weights_come_back_within_the_bound"
AWKWARD = "awkward_shapes_are_stored_or_refused"
AGREE = "inner_tensors_say_what_pack_stores"
DETERMINISM = "packing_gives_the_same_bytes_every_time"
EXPERTS = "experts_of_a_stack_are_packed_as_if_alone"
DTYPE = "dequantize_gives_the_dtype_asked_for"
OUT = "dequantize_fills_out_if_it_says_so"
BYTES = "dequantize_leaves_the_bytes_as_they_were"
OWN = "a_result_is_the_callers_own"
PLACE = "bytes_mean_the_same_wherever_they_lie"
CUT = "bytes_cut_anywhere_and_rejoined_mean_the_same"
STATE = "weights_do_not_share_state"
CODES = "codes_stand_for_the_values_that_are_said"
MERGE = "merging_adds_in_fp32_and_rounds_once"
MERGE_NOTHING = "merging_nothing_changes_nothing"
ADOPT = "exported_tensors_are_adopted_bit_for_bit"
REFUSE = "tensors_that_do_not_fit_are_refused"
READER = "a_checkpoint_for_its_reader_holds_what_is_exported"
CONFIG = "a_checkpoint_says_what_its_weights_are"
SAVED = "saved_bytes_mean_the_same_after_loading"
RESUME = "a_layer_resumes_from_its_state"
LAYER = "a_layer_equals_a_dense_one_on_the_dequantized_weight"
LORA = "a_low_rank_update_trains_as_over_a_dense_weight"
RANKS = "two_ranks_train_as_one_process"


# Values of codes ------------------------------------------------------------------------------------------------------


@backend(CODES, says="are off by", options=INT4)
class CodesOfAnotherOrder(TinyBackend):
    """Says that codes count up from 0, where those with the high bit are negative."""

    def element_values(self, options):
        return tuple(range(16))

    def with_elements(self, packed, codes):
        return {**packed.views(), "codes": kernels.pack_nibbles(codes, high_first=False)}


# Values ---------------------------------------------------------------------------------------------------------------


@backend(BOUND, AWKWARD, says="relative error of")
class ScalesTooLarge(TinyBackend):
    def pack(self, weight, options):
        tensors = super().pack(weight, options)
        return {**tensors, "scales": tensors["scales"] * 1.1}


@backend(BOUND, AWKWARD, says="relative error of", options=INT4)
class NibblesInTheWrongOrder(TinyBackend):
    def pack(self, weight, options):
        codes = super().pack(weight, options)["codes"]
        return {**super().pack(weight, options), "codes": (codes << 4) | (codes >> 4)}


@backend(BOUND, says="came back with NaN or infinity; look for a division by a scale of zero")
class DividesByZero(TinyBackend):
    def pack(self, weight, options):
        scale = weight.float().abs().amax().reshape(1) / 127
        return {"codes": (weight / scale).round().to(torch.int8), "scales": scale if scale > 0 else scale / 0}


@backend(BOUND, says="raised IndexError")
class CrashesOnZeros(TinyBackend):
    def pack(self, weight, options):
        weight.nonzero()[0]  # to look at the first weight that is not zero
        return super().pack(weight, options)


@backend(BOUND, says="a weight of the kind 'constant' in fp32 is refused: weight: its values are all the same")
class RefusesSoundWeights(TinyBackend):
    def pack(self, weight, options):
        if weight.any() and weight.amin() == weight.amax() and weight.numel() > 1:
            raise QuantizationError("its values are all the same")
        return super().pack(weight, options)


# Shapes ---------------------------------------------------------------------------------------------------------------


@backend(AWKWARD, says="with a relative error of")
class ForgetsTheTail(TinyBackend):
    def pack(self, weight, options):
        tensors = super().pack(weight, options)
        tensors["codes"][:, weight.shape[1] // 32 * 32 :] = 0
        return tensors


@backend(AWKWARD, says="inner_tensors((3, 70)) raised AssertionError", options=INT4)
class AssertsItsShapes(TinyBackend):
    def inner_tensors(self, shape, options):
        assert shape == (1, 1) or shape[1] % 32 == 0
        return super().inner_tensors(shape, options)


@backend(AWKWARD, says="inner_tensors accepts the shape (1, 1), packing it raised RuntimeError", options=INT4)
class CrashesOnShapesItAccepts(TinyBackend):
    def inner_tensors(self, shape, options):
        if options.weight_dtype == "int8":
            return super().inner_tensors(shape, options)
        groups = shape[0] * shape[1] // 32
        codes = TensorSpec(torch.uint8, (shape[0], shape[1] // 2))
        return {"codes": codes, "scales": TensorSpec(torch.float32, (groups,))}


@backend(
    AWKWARD,
    says="packing it raised QuantizationError: weight: too small. Store it, or raise QuantizationError in inner",
)
class RefusesTooLate(TinyBackend):
    def pack(self, weight, options):
        if weight.shape[0] < 2:
            raise QuantizationError("too small")
        return super().pack(weight, options)


# What pack returns ----------------------------------------------------------------------------------------------------


@backend(AGREE, ..., says="pack returned the tensors ['codes', 'scale'], inner_tensors says ['codes', 'scales']")
class OtherNames(TinyBackend):
    def pack(self, weight, options):
        tensors = super().pack(weight, options)
        return {"codes": tensors["codes"], "scale": tensors["scales"]}


@backend(AGREE, ..., says="returned 'scales' as torch.float32 (1, 1), inner_tensors says torch.float32 (1,)")
class OtherShapes(TinyBackend):
    def pack(self, weight, options):
        tensors = super().pack(weight, options)
        return {**tensors, "scales": tensors["scales"].view(1, 1)}


@backend(AGREE, ..., says="returned 'scales' as torch.bfloat16 (1,), inner_tensors says torch.float32 (1,)")
class OtherDtypes(TinyBackend):
    """Keeps the scale in the dtype of the weight."""

    def pack(self, weight, options):
        tensors = super().pack(weight, options)
        return {**tensors, "scales": tensors["scales"].to(weight.dtype)}


@backend(AGREE, ..., says="it must depend on shape and options alone")
class CountsItsLayouts(TinyBackend):
    calls = 0

    def inner_tensors(self, shape, options):
        self.calls += 1
        specs = super().inner_tensors(shape, options)
        return dict(sorted(specs.items(), reverse=self.calls % 2 == 0))


# Determinism and state ------------------------------------------------------------------------------------------------


@backend(DETERMINISM, EXPERTS, says="other bytes")
class RoundsAtRandom(TinyBackend):
    def pack(self, weight, options):
        tensors = super().pack(weight, options)
        exact = weight.float() / tensors["scales"].clamp_min(1e-30)
        codes = (exact + torch.rand_like(exact) - 0.5).round().clamp(-127, 127).to(torch.int8)
        return {**tensors, "codes": codes}


@backend(DETERMINISM, ..., says="no memory of earlier weights")
class RemembersTheLargestWeight(TinyBackend):
    """Grows the scale with every weight it packs."""

    largest = torch.zeros(1)

    def pack(self, weight, options):
        self.largest = torch.maximum(self.largest, weight.float().abs().amax())
        scale = self.largest / 127
        codes = (weight.float() / scale.clamp_min(1e-45)).round().clamp(-127, 127).to(torch.int8)
        return {"codes": codes, "scales": scale}


@backend("packing_leaves_the_weight_as_it_was", ..., says="pack changed the weight it was given")
class ScalesTheWeightInPlace(TinyBackend):
    def pack(self, weight, options):
        scale = (weight.float().abs().amax() / 127).reshape(1)
        codes = weight.div_(torch.where(scale > 0, scale, 1.0).to(weight.dtype)).round().to(torch.int8)
        return {"codes": codes, "scales": scale}


@backend(STATE, ..., says="after another one was packed; a backend is stateless")
class KeepsTheScaleOnItself(TinyBackend):
    def pack(self, weight, options):
        tensors = super().pack(weight, options)
        self.scale = tensors["scales"]
        return tensors

    def dequantize(self, packed, dtype, out=None):
        found = (packed.views()["codes"] * self.scale).to(dtype)
        return found if out is None else out.copy_(found)


@backend(STATE, ..., says="a second instance from load() dequantizes the same bytes to other values")
class NeedsTheInstanceThatPacked(TinyBackend):
    def __init__(self):
        self.scales = {}

    def pack(self, weight, options):
        tensors = super().pack(weight, options)
        self.scales[tensors["codes"].sum().item()] = tensors["scales"]
        return tensors

    def dequantize(self, packed, dtype, out=None):
        codes = packed.views()["codes"]
        found = (codes * self.scales.get(codes.sum().item(), torch.ones(1))).to(dtype)
        return found if out is None else out.copy_(found)


@backend(PLACE, RESUME, ..., says="nothing may be remembered by address or by layout")
class RemembersByAddress(TinyBackend):
    def __init__(self):
        self.dense = {}

    def dequantize(self, packed, dtype, out=None):
        address = packed.data.data_ptr()
        if address not in self.dense:
            self.dense[address] = super().dequantize(packed, torch.float32), packed.data  # kept, so it is not reused
        found = self.dense[address][0].to(dtype, copy=True)
        return found if out is None else out.copy_(found)


@backend(PLACE, EXPERTS, ..., says="a row of a stack dequantize to other values; look at packed.views()")
class ReadsTheStorage(TinyBackend):
    def dequantize(self, packed, dtype, out=None):
        whole = torch.tensor([], dtype=torch.uint8).set_(packed.data.untyped_storage())
        return super().dequantize(PackedWeight(packed.layout, whole[: packed.layout.nbytes]), dtype, out)


# Dequantizing ---------------------------------------------------------------------------------------------------------


@backend(BYTES, ..., says="dequantize changed the packed bytes")
class DequantizesInPlace(TinyBackend):
    def dequantize(self, packed, dtype, out=None):
        packed.views()["codes"].sub_(1)
        return super().dequantize(packed, dtype, out)


@backend(DTYPE, OUT, ..., says="returned torch.float32 of shape (64, 256), expected torch.bfloat16")
class IgnoresTheDtype(TinyBackend):
    def dequantize(self, packed, dtype, out=None):
        return super().dequantize(packed, torch.float32)


@backend(DTYPE, OUT, ..., says="dequantize to torch.float16 without out on cpu raised NotImplementedError")
class LacksADtype(TinyBackend):
    def dequantize(self, packed, dtype, out=None):
        if dtype == torch.float16:
            raise NotImplementedError(dtype)
        return super().dequantize(packed, dtype, out)


@backend(DTYPE, says="compute in fp32 and round once")
class ComputesInTheDtype(TinyBackend):
    def dequantize(self, packed, dtype, out=None):
        views = packed.views()
        found = views["codes"].to(dtype) * views["scales"].to(dtype)
        return found if out is None else out.copy_(found)


@backend(DTYPE, ..., says="expected torch.float32 of (64, 256)")
class ForgetsTheShape(TinyBackend):
    def dequantize(self, packed, dtype, out=None):
        return super().dequantize(packed, dtype, out).view(-1)


@backend(OUT, says="fills_out says yes for fp32, but the result is another tensor than out")
class SaysItFillsOut(TinyBackend):
    def dequantize(self, packed, dtype, out=None):
        return super().dequantize(packed, dtype)


@backend(OUT, LAYER, LORA, ..., says="out's contents are undefined, every element must be written")
class AddsToOut(TinyBackend):
    def dequantize(self, packed, dtype, out=None):
        found = super().dequantize(packed, dtype)
        return found if out is None else out.add_(found)


@backend(OWN, says="was overwritten by the next one; return new memory every time")
class ReturnsItsOwnBuffer(TinyBackend):
    def __init__(self):
        self.buffers = {}

    def dequantize(self, packed, dtype, out=None):
        if out is None:
            shape = packed.layout.shape
            out = self.buffers.setdefault((shape, dtype), torch.empty(shape, dtype=dtype))
        return super().dequantize(packed, dtype, out)


@backend(OWN, ..., says="changed the packed bytes or a later result")
class ReturnsAViewOfTheBytes(Backend):
    """Stores fp32 as it is."""

    name = "tiny"

    def inner_tensors(self, shape, options):
        return {"weight": TensorSpec(torch.float32, shape)}

    def pack(self, weight, options):
        return {"weight": weight.float()}

    def dequantize(self, packed, dtype, out=None):
        return packed.views()["weight"].to(dtype)


# Merging and adopting -------------------------------------------------------------------------------------------------


@backend(MERGE, MERGE_NOTHING, says="the dequantized weight plus delta, added in fp32 and rounded once", options=INT4)
class MergesAndQuantizesAgain(TinyBackend):
    def merge(self, packed, delta, dtype):
        merged = super().merge(packed, delta, torch.float32)
        coarse = attrs.evolve(packed.layout.options, group_size=128)
        layout = self.layout(packed.layout.shape, packed.layout.dtype, coarse)
        return self.dequantize(PackedWeight(layout, layout.write(self.pack(merged, coarse))), dtype)


@backend(MERGE, says="values that differ. Leave merge out: the default does it")
class DropsTheDelta(TinyBackend):
    def merge(self, packed, delta, dtype):
        return self.dequantize(packed, dtype)


@backend(MERGE, says="merge to torch.bfloat16 must be")
class RoundsTwice(TinyBackend):
    def merge(self, packed, delta, dtype):
        return self.dequantize(packed, dtype) + delta.to(dtype)


@backend(MERGE, MERGE_NOTHING, says="merge changed the packed bytes or the delta; it must return a new tensor")
class MergesIntoTheDelta(TinyBackend):
    def merge(self, packed, delta, dtype):
        return delta.add_(self.dequantize(packed, torch.float32)).to(dtype)


@backend(ADOPT, REFUSE, says="adopt of the tensors of export gave other bytes")
class AdoptsTheNearestBytes(TinyBackend):
    def adopt(self, tensors, shape, options):
        adopted = super().adopt(tensors, shape, options)
        return {**adopted, "scales": adopted["scales"] * 1.0001}


@backend(ADOPT, REFUSE, says="adopt of the tensors of export raised KeyError")
class ExportsWhatItDoesNotAdopt(TinyBackend):
    def export(self, packed):
        return packed.views()

    def adopt(self, tensors, shape, options):
        return {"codes": tensors["weight"], "scales": tensors["weight_scale"]}


@backend(REFUSE, says="the tensors of export without 'weight_scale' were adopted")
class AdoptsWithoutScales(TinyBackend):
    def adopt(self, tensors, shape, options):
        if "weight" not in tensors:
            raise QuantizationError("lacks its weight")
        return {"codes": tensors["weight"], "scales": tensors.get("weight_scale", torch.ones(1))}


@backend(REFUSE, says="the tensors of export with 'weight' in torch.float32 were adopted")
class AdoptsWhateverCanBeCast(TinyBackend):
    def adopt(self, tensors, shape, options):
        adopted = super().adopt(tensors, shape, options)
        return {"codes": adopted["codes"].to(torch.int8), "scales": adopted["scales"].float()}


@backend(REFUSE, says="adopting the tensors of export without 'weight' raised KeyError")
class AdoptsWithoutLooking(TinyBackend):
    def adopt(self, tensors, shape, options):
        return {"codes": tensors["weight"], "scales": tensors["weight_scale"]}


# Readers --------------------------------------------------------------------------------------------------------------


class TinyReader(Reader):
    library = "transformers with tiny"

    def quantization_config(self, kept, dtype):
        return {"quant_method": "tiny", "modules_to_not_convert": list(kept)}

    def tensors(self, name, packed):
        return {name.removesuffix("weight") + part: tensor for part, tensor in self.backend.export(packed).items()}


@backend(READER, says="of which 1 are those of export, which has 2")
class StoresItsScalesInBf16(TinyBackend):
    def reader(self, options, activation_dtype=None):
        class Lossy(TinyReader):
            def tensors(self, name, packed):
                tensors = super().tensors(name, packed)
                return {key: tensor.bfloat16() if "scale" in key else tensor for key, tensor in tensors.items()}

        return Lossy(backend=self, options=options)


@backend(CONFIG, says="does not mention model.layers.0.mlp.gate")
class ForgetsWhatIsKept(TinyBackend):
    def reader(self, options, activation_dtype=None):
        class Forgetful(TinyReader):
            def quantization_config(self, kept, dtype):
                return {"quant_method": "tiny"}

        return Forgetful(backend=self, options=options)


# Descriptions ---------------------------------------------------------------------------------------------------------


class Bare:
    """Options that are no attrs class."""


@attrs.frozen(kw_only=True)
class OptionsHere(TinyOptions):
    """Options in this module, which imports torch."""


@attrs.define(kw_only=True)
class Changeable:
    """Options that can be set."""

    weight_dtype: Literal["int8", "int4"] = "int8"
    """A format."""


@attrs.frozen(kw_only=True)
class Unhashable:
    """Options that hold a list."""

    sizes: list[int] = [16]  # a mutable default is what is wrong here
    """Sizes."""


@attrs.frozen(kw_only=True)
class Undocumented:
    """Options that nobody explains."""

    weight_dtype: Literal["int8", "int4"] = "int8"


@attrs.frozen(kw_only=True)
class Unwritable:
    """Options that a recipe can't hold."""

    device: torch.device = torch.device("cpu")
    """A device."""


@attrs.frozen(kw_only=True)
class Clashing:
    """Options that take a key of quantune's own."""

    skip: int = 0
    """How many layers to leave."""


@attrs.frozen(kw_only=True)
class Unsettled(TinyOptions):
    """Options whose defaults depend on how often they were asked for."""

    def resolved(self):
        return attrs.evolve(self, group_size=(self.group_size or 16) * 2)


@attrs.frozen(kw_only=True)
class Talkative(TinyOptions):
    """Options whose problems are sentences alone."""

    def problems(self):
        yield "nothing is wrong"


def _fails() -> Probe:
    raise OSError("no such library")


FROZEN = "its_options_are_a_frozen_attrs_class"
HASHABLE = "its_options_are_hashable_and_equal_by_value"
RECIPE = "its_options_can_be_written_in_a_recipe"
SAYS = "its_options_say_what_is_wrong_and_what_the_defaults_are"
DTYPES = "its_weight_dtypes_are_those_of_its_options"
NO_TORCH = "its_description_imports_no_torch"
PROBE = "probe_says_whether_it_runs_here"
BITS = "its_bits_per_weight_are_those_measured"
NAME = "its_name_is_plain"

described("a name with markup", NAME, ..., says="found '[red]../tiny'", name="[red]../tiny")
described("no summary", NAME, says="summary: expected a line", summary=" ")
described(
    "another api version", "it_is_written_for_this_version_of_the_protocol", says="api_version = 1", api_version=0
)
described("options of no attrs class", FROZEN, ..., says="@attrs.frozen(kw_only=True)", options=Bare())
described("options that can be set", FROZEN, ..., says="weight_dtype can be set", options=Changeable())
described("options that are unhashable", HASHABLE, ..., says="give fields tuples", options=Unhashable())
described(
    "options without docs",
    "every_option_has_a_docstring",
    ...,
    says="lacks the string under it",
    options=Undocumented(),
)
described("options that no recipe can hold", RECIPE, ..., says="a type that TOML can hold", options=Unwritable())
described(
    "options named like quantune's", RECIPE, ..., says="skip of [quantization] is quantune's own", options=Clashing()
)
described("defaults that change", SAYS, ..., says="which resolves to itself", options=Unsettled(weight_dtype="int4"))
described("problems without keys", SAYS, ..., says="expected pairs of a key", options=Talkative())
described(
    "weight dtypes of others", DTYPES, ..., says="expected the values of the option", weight_dtypes=("int8", "int2")
)
described("a probe that raises", PROBE, ..., says="probe() raised OSError: no such library", probe=_fails)
described("a probe that is a boolean", PROBE, ..., says="found True", probe=lambda: True)
described(
    "a probe without devices", PROBE, ..., says="available, but on no devices", probe=lambda: Probe(available=True)
)
described("a probe without a reason", PROBE, ..., says="without a reason", probe=lambda: Probe(available=False))
described(
    "bits that are too few", BITS, says="takes 5.000 with default options", bits_per_weight={"int8": 8.0, "int4": 4.0}
)
described(
    "bits of one format alone", BITS, says="declare all of ['int4', 'int8'] or none", bits_per_weight={"int8": 8.0}
)
described("a backend of another name", "its_backend_has_the_same_name", says="found 'tiny'", name="other")
described("a class instead of a backend", BOUND, ..., says="load() must return an instance", load=lambda: TinyBackend)
described("importing torch", NO_TORCH, says="Found: importing it imports torch", options=OptionsHere())
BROKEN["probing with torch"] = Broken(
    case=case_of(probing_with_torch), fails=(NO_TORCH,), says="Found: probe() imports torch"
)


# Two ranks ------------------------------------------------------------------------------------------------------------


@backend(RANKS, says="rank 0 of 2 trained with losses")
class DependsOnTheRank(TinyBackend):
    def dequantize(self, packed, dtype, out=None):
        rank = dist.get_rank() if dist.is_initialized() else 0
        return super().dequantize(packed, dtype, out).mul_(1 + rank)


@backend(RANKS, says="rank 1 failed")
class FailsOnTheSecondRank(TinyBackend):
    def dequantize(self, packed, dtype, out=None):
        if dist.is_initialized() and dist.get_rank() == 1:
            raise RuntimeError("not here")
        return super().dequantize(packed, dtype, out)


# --- The class that pytest runs ---------------------------------------------------------------------------------------

SOUND = Broken(case=case_of(description), fails=(), says="")


class TestBroken(BackendConformance):
    @pytest.fixture(params=[*BROKEN, "sound"])
    def case(self, request):
        return BROKEN.get(request.param, SOUND).case
