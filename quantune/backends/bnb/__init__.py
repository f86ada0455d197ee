"""The bitsandbytes backend: 4-bit NF4 and FP4, and row-wise 8-bit integers, as weight-only formats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import attrs

from quantune.backends.description import BackendDescription, Probe, probe_package

if TYPE_CHECKING:
    from quantune.backends.backend import Backend

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DEFAULT_BLOCK_SIZE = 64


@attrs.frozen(kw_only=True)
class BnbOptions:
    """Options of the bitsandbytes backend."""

    weight_dtype: Literal["nf4", "fp4", "int8"] = "nf4"
    """4-bit NormalFloat, 4-bit float, or 8-bit integers with one scale per row."""
    block_size: int | None = None
    """`nf4` and `fp4`: weights that share one scale: 32, 64 (the default), and so on in powers of two up to 4096."""
    double_quant: bool | None = None
    """`nf4` and `fp4`: store the scales in 8 bit too (about 0.4 bits per weight less), true by default."""

    def problems(self) -> Iterable[tuple[str, str]]:
        """What is wrong across the values: pairs of key and message."""
        if self.weight_dtype == "int8":
            for key in ("block_size", "double_quant"):
                if getattr(self, key) is not None:
                    yield key, f'{key} has no meaning for weight_dtype = "int8", which has one scale per row'
        elif self.block_size is not None and self.block_size not in BLOCK_SIZES:
            sizes = ", ".join(str(size) for size in BLOCK_SIZES)
            yield "block_size", f"expected one of {sizes}, found {self.block_size}"

    def resolved(self) -> BnbOptions:
        """The same options with every default written out."""
        if self.weight_dtype == "int8":
            return self
        return attrs.evolve(
            self,
            block_size=self.block_size or DEFAULT_BLOCK_SIZE,
            double_quant=True if self.double_quant is None else self.double_quant,
        )

    def activations_when_read(self) -> str | None:
        """What bitsandbytes does to the inputs of a layer of this format."""
        return "bitsandbytes' int8 layers always round activations to int8" if self.weight_dtype == "int8" else None

    def checkpoint_problem(self, quantization_config: Mapping[str, Any]) -> str | None:
        """What of a checkpoint's own quantization does not fit: another dtype, or scales stored in another way."""
        stored = self.of_checkpoint(quantization_config)
        if stored is None:
            return "its config.json does not say nf4, fp4 or int8 as bitsandbytes' layers have them"
        if stored.weight_dtype != self.weight_dtype:
            return f'it holds {stored.weight_dtype}, where the recipe has weight_dtype = "{self.weight_dtype}"'
        if stored.double_quant != self.resolved().double_quant:
            said = str(stored.double_quant).lower()
            return f"its double_quant is {said}, which the recipe must say: double_quant = {said}"
        return None

    @classmethod
    def of_checkpoint(cls, quantization_config: Mapping[str, Any]) -> BnbOptions | None:
        """The options that a checkpoint was quantized with, as transformers' `BitsAndBytesConfig` says them, blocks of
        64 weights being the only ones it writes; None for what it does not say."""
        if quantization_config.get("load_in_8bit"):
            return cls(weight_dtype="int8")
        weight_dtype = quantization_config.get("bnb_4bit_quant_type", "fp4")
        storage = quantization_config.get("bnb_4bit_quant_storage", "uint8")
        if not quantization_config.get("load_in_4bit") or weight_dtype not in ("nf4", "fp4") or storage != "uint8":
            return None
        double_quant = bool(quantization_config.get("bnb_4bit_use_double_quant", False))
        return cls(weight_dtype=weight_dtype, block_size=DEFAULT_BLOCK_SIZE, double_quant=double_quant)


def _probe() -> Probe:
    return probe_package(
        "bitsandbytes", minimum=(0, 50), devices=("cpu", "cuda"), install="pip install 'bitsandbytes>=0.50'"
    )


def _load() -> Backend:
    from quantune.backends.bnb.formats import BnbBackend

    return BnbBackend()


description = BackendDescription(
    name="bnb",
    summary="bitsandbytes: 4-bit NF4 and FP4 in blocks, int8 by rows",
    weight_dtypes=("nf4", "fp4", "int8"),
    bits_per_weight={"nf4": 4.127, "fp4": 4.127, "int8": 8.008},
    adopts=("bitsandbytes",),
    options=BnbOptions,
    probe=_probe,
    load=_load,
)
