"""transformers' reader of MXFP4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch

from quantune.backends.readers import Destination, Reader

ARCHITECTURE = "gpt_oss"


@attrs.frozen(kw_only=True)
class Mxfp4Reader(Reader):
    """Checkpoints as transformers' `Mxfp4Config` describes them: gpt-oss' fused experts, and nothing else."""

    library = "transformers (Mxfp4Config)"

    def quantization_config(self, kept: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
        return {"quant_method": "mxfp4", "modules_to_not_convert": list(kept)}

    def refusal(self, destination: Destination) -> str | None:
        if destination.model_type == ARCHITECTURE and destination.stacked:
            return None
        return "MXFP4 is read for the experts of gpt-oss only"
