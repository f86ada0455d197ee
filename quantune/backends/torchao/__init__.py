"""torchao's weight formats: int4 in groups, NF4, NVFP4, int8, and fp8 by rows. Needs no torchao: see `formats`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import attrs

from quantune.backends.description import BackendDescription, Probe

if TYPE_CHECKING:
    from quantune.backends.backend import Backend

INT4_GROUP_SIZES = (32, 64, 128, 256)
NF4_GROUP_SIZES = (16, 32, 64, 128, 256)
NVFP4_GROUP_SIZE = 16
DEFAULT_GROUP_SIZE = {"int4": 128, "nf4": 64, "nvfp4": NVFP4_GROUP_SIZE}
DEFAULT_SCALER_BLOCK_SIZE = 256


@attrs.frozen(kw_only=True)
class TorchaoOptions:
    """Options of the torchao backend."""

    weight_dtype: Literal["int4", "nf4", "nvfp4", "int8", "fp8"]
    """4-bit integers in groups (asymmetric), 4-bit NormalFloat, NVIDIA's 4-bit float, 8-bit integers, or 8-bit float
    (e4m3) with one scale per row."""
    group_size: int | None = None
    """Weights of a row that share one scale. `int4`: 32, 64, 128 (the default) or 256. `nf4`: 16, 32, 64 (the
    default), 128 or 256, of the flattened weight. `nvfp4`: always 16. `int8`: the whole row by default. `fp8`: has no
    groups."""
    scaler_block_size: int | None = None
    """`nf4`: scales that share one scale of their own, 256 by default."""

    def problems(self) -> Iterable[tuple[str, str]]:
        """What is wrong across the values: pairs of key and message."""
        sizes = {"int4": INT4_GROUP_SIZES, "nf4": NF4_GROUP_SIZES, "nvfp4": (NVFP4_GROUP_SIZE,)}.get(self.weight_dtype)
        if self.group_size is not None:
            if self.weight_dtype == "fp8":
                yield "group_size", 'group_size has no meaning for weight_dtype = "fp8", which has one scale per row'
            elif sizes is not None and self.group_size not in sizes:
                expected = f"one of {', '.join(map(str, sizes))}" if len(sizes) > 1 else str(sizes[0])
                message = f'expected {expected} for weight_dtype = "{self.weight_dtype}", found {self.group_size}'
                yield "group_size", message
            elif self.group_size < 1:
                yield "group_size", f"must be greater than 0, found {self.group_size}"
        if self.scaler_block_size is not None:
            if self.weight_dtype != "nf4":
                message = f'scaler_block_size has no meaning for weight_dtype = "{self.weight_dtype}"'
                yield "scaler_block_size", message
            elif self.scaler_block_size < 1:
                yield "scaler_block_size", f"must be greater than 0, found {self.scaler_block_size}"

    def activation_dtypes(self) -> tuple[str, ...]:
        """What torchao rounds the inputs of a layer of this format to, each token by a scale of its own."""
        return (self.weight_dtype,) if self.weight_dtype in ("int8", "fp8") and self.group_size is None else ()

    def resolved(self) -> TorchaoOptions:
        """The same options with every default written out."""
        return attrs.evolve(
            self,
            group_size=self.group_size or DEFAULT_GROUP_SIZE.get(self.weight_dtype),
            scaler_block_size=(self.scaler_block_size or DEFAULT_SCALER_BLOCK_SIZE)
            if self.weight_dtype == "nf4"
            else None,
        )

    def checkpoint_problem(self, quantization_config: Mapping[str, Any]) -> str | None:
        """What of a checkpoint's own quantization does not fit: another dtype, or groups of another size."""
        stored = self.of_checkpoint(quantization_config)
        if stored is None:
            return "its config.json does not say int8, fp8, int4 or nvfp4 as quantune has them"
        if stored.resolved() != self.resolved():
            return f"it holds {_in_words(stored)}, where the recipe has {_in_words(self)}"
        return None

    @classmethod
    def of_checkpoint(cls, quantization_config: Mapping[str, Any]) -> TorchaoOptions | None:
        """The options that a checkpoint was quantized with, as transformers' `TorchAoConfig` says them; None for those
        of torchao's that quantune has not. What it does to activations is left out."""
        types = quantization_config.get("quant_type")
        described = types.get("default") if isinstance(types, Mapping) else None
        if not isinstance(described, Mapping) or not isinstance(described.get("_data", {}), Mapping):
            return None
        kind, data = described.get("_type"), described.get("_data", {})
        if kind in ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"):
            granularity = _granularity(data)
            if granularity in (None, "PerRow"):
                return cls(weight_dtype="int8")
            return cls(weight_dtype="int8", group_size=granularity) if isinstance(granularity, int) else None
        if kind == "Float8WeightOnlyConfig" and _granularity(data) in (None, "PerRow"):
            return cls(weight_dtype="fp8")
        if kind == "Float8DynamicActivationFloat8WeightConfig" and _granularity(data) == "PerRow":
            return cls(weight_dtype="fp8")
        if kind == "Int4WeightOnlyConfig" and _name(data.get("int4_packing_format")) in (None, "PLAIN"):
            return cls(weight_dtype="int4", group_size=data.get("group_size"))
        if kind in ("NVFP4WeightOnlyConfig", "NVFP4DynamicActivationNVFP4WeightConfig"):
            return cls(weight_dtype="nvfp4") if data.get("use_dynamic_per_tensor_scale", True) else None
        return None

    @staticmethod
    def hint(key: str, value: object) -> str | None:
        """What to write instead of a value that is refused."""
        if key == "weight_dtype" and value == "mxfp4":
            return 'mxfp4 is a backend of its own: backend = "mxfp4", without weight_dtype'
        return None


def _granularity(data: Mapping[str, Any]) -> str | int | None:
    """Which weights share a scale: the name of torchao's class, or the size of the groups; None by default."""
    said = data.get("granularity")
    if isinstance(said, list) and said:
        said = said[-1]  # the first is that of the activations
    if not isinstance(said, Mapping):
        return None
    inner = said.get("_data")
    size = inner.get("group_size") if isinstance(inner, Mapping) else None
    return size if isinstance(size, int) else str(said.get("_type"))


def _name(value: Any) -> Any:
    """The name of a member of an enumeration, as torchao writes it."""
    return value.get("_data") if isinstance(value, Mapping) else value


def _in_words(options: TorchaoOptions) -> str:
    size = options.resolved().group_size
    return options.weight_dtype + ("" if size is None else f" with group_size = {size}")


def _load() -> Backend:
    from quantune.backends.torchao.formats import TorchaoBackend

    return TorchaoBackend()


description = BackendDescription(
    name="torchao",
    summary="torchao's formats: int4 in groups, NF4, NVFP4, int8, fp8 by rows",
    weight_dtypes=("int4", "nf4", "nvfp4", "int8", "fp8"),
    bits_per_weight={"int4": 4.25, "nf4": 4.127, "nvfp4": 4.5, "int8": 8.008, "fp8": 8.008},
    adopts=("torchao",),
    options=TorchaoOptions,
    probe=lambda: Probe(available=True, devices=("cpu", "cuda")),
    load=_load,
)
