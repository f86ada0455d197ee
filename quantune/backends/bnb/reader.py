"""transformers' reader of bitsandbytes checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch

from quantune.backends.bnb import BnbOptions
from quantune.backends.readers import Destination, Reader, dtype_name


@attrs.frozen(kw_only=True)
class BnbReader(Reader):
    """Checkpoints as transformers' `BitsAndBytesConfig` describes them. Its int8 layers round activations as well."""

    library = "transformers with bitsandbytes"

    options: BnbOptions

    def quantization_config(self, kept: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
        config: dict[str, Any] = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": list(kept)}
        if self.options.weight_dtype == "int8":
            return {**config, "load_in_8bit": True, "load_in_4bit": False}
        return {
            **config,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.options.weight_dtype,
            "bnb_4bit_use_double_quant": self.options.double_quant,
            "bnb_4bit_compute_dtype": dtype_name(dtype),
            "bnb_4bit_quant_storage": "uint8",
        }

    def refusal(self, destination: Destination) -> str | None:
        if destination.expert:
            return "bitsandbytes' layers are linear layers, and this is one of fused experts"
        return None
