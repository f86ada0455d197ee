"""transformers' reader of fp8 in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch

from quantune.backends.fp8 import Fp8Options
from quantune.backends.readers import Destination, Reader


@attrs.frozen(kw_only=True)
class Fp8Reader(Reader):
    """Checkpoints as transformers' `FineGrainedFP8Config` describes them. On a GPU its layers round activations as
    well; without one, or with `dequantize=True`, it dequantizes the weights."""

    library = "transformers (FineGrainedFP8Config)"

    options: Fp8Options

    def quantization_config(self, kept: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(self.options.block_size),
            "modules_to_not_convert": list(kept),
        }

    def refusal(self, destination: Destination) -> str | None:
        if destination.stacked:
            return "this checkpoint stores its experts in one tensor, and fp8 in blocks is read for experts one by one"
        # it takes the size of the blocks to be rows / rows of scales (transformers' Fp8Dequantize)
        for size, block, what in zip(destination.shape, self.options.block_size, ("rows", "columns"), strict=True):
            whole = size % block == 0 or (size < block and not destination.expert)  # experts are joined by rows
            if not whole:
                return f"its {size} {what} don't fill blocks of {block}, and transformers then misreads the scales"
        return None
