"""Trying a merged model: against base and adapter as they were trained, loaded by the libraries that will load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantune.backends.checkpoints import stored_activation_dtype
from quantune.errors import InputError, ModelError
from quantune.merge import verify
from quantune.merge.opening import Opened
from quantune.merge.prompts import FEW_TOKENS, MAX_TOKENS, Prompts, prompts_of
from quantune.merge.request import MergeRequest, Observer
from quantune.merge.verify import Verification
from quantune.merge.weights import Onto
from quantune.model.adapter import NAME, adapter_tensors, compute_experts, custom_modules
from quantune.model.base import open_base
from quantune.model.device import choose_precision
from quantune.model.load import load_model
from quantune.model.qat import round_inputs
from quantune.model.trained import hold_dense_in, load_trained_adapter, load_trained_base
from quantune.model.vocabulary import Additions, fill_with_mean
from quantune.quantized.rounding import Rounding
from quantune.recipe.schema import ModelConfig

SMALL = 5e8
"""Weights up to which a whole trial takes seconds."""
CGROUP = Path("/sys/fs/cgroup")
SPARE = 0.5
"""Fraction of the memory that is free which a model may take that nobody asked to be loaded."""


def try_merged(
    opened: Opened, request: MergeRequest, folder: Path, dtype: torch.dtype, observer: Observer
) -> Verification | None:
    """Compare a merged model with base and adapter, if that was asked for, or nothing was asked and it fits.

    Where the merge is exact it must answer alike; otherwise the distance is measured alone.

    Raises:
        VerificationError: it does not answer alike.
    """
    if request.verify is False:
        return None
    needed, free = 4 * _weights(opened), free_memory(opened.device)
    if request.verify is None and needed > SPARE * free:
        observer.warning(
            f"not verified: the merged model takes {needed / 2**30:.1f} GiB in fp32, of {free / 2**30:.1f} GiB that "
            "are free; --verify does it all the same"
        )
        return None
    observer.phase("verifying")
    found = verify.measure(
        lambda: load_reference(opened, request),
        lambda: load_merged(folder, opened, packed=request.onto == "packed"),
        prompts_for(opened, request),
        dtype=dtype,
    )
    if is_exact(opened, request.onto):
        found.require()
    return found


def is_exact(opened: Opened, onto: Onto) -> bool:
    """Whether a right merge answers as base and adapter did, but for the rounding to its dtype.

    On the base as it was trained on it does, unless activations were rounded in training, which dense weights don't
    make a model do; packed it does where weights were rounded in training as packing rounds them.
    """
    if onto == "packed":
        return opened.rounding is not None and reader_activations(opened) == activations(opened)
    trained_on = onto == "dequantized" or opened.base.quantization is None  # then the original is what was trained on
    return trained_on and activations(opened) is None


def prompts_for(opened: Opened, request: MergeRequest, *, trained_on: bool = False) -> Prompts:
    """What a merged model is tried on, or with `trained_on` what it is made with: less of it where that takes long."""
    embedding: Any = opened.model.get_input_embeddings()
    return prompts_of(
        request.recipe,
        opened.base.tokenizer,
        vocabulary_size=embedding.num_embeddings,
        positions=getattr(opened.base.config.get_text_config(), "max_position_embeddings", None),
        trained_on=trained_on,
        max_tokens=MAX_TOKENS if _weights(opened) <= SMALL else FEW_TOKENS,
    )


def load_reference(opened: Opened, request: MergeRequest) -> PeftModel:
    """Base and adapters as they were trained, computing in fp32."""
    setting = opened.setting
    precision = choose_precision(setting.precision, opened.device)  # type: ignore[arg-type]  # one of a recipe
    model = load_trained_base(
        opened.base,
        setting.adapter,
        seed=setting.seed,
        precision=precision,
        compute_dtype=torch.float32,
        device=opened.device,
        rounding=opened.rounding,
    )
    _hold_new_rows(model, opened)
    adapted = load_trained_adapter(model, request.adapters[0].folder, precision=precision, rounding=opened.rounding)
    names = [NAME]
    for index, adapter in enumerate(request.adapters[1:], 2):
        names.append(f"{NAME}_{index}")
        config = LoraConfig.from_pretrained(str(adapter.folder))
        config._register_custom_module(custom_modules(model))
        adapted.add_adapter(names[-1], config)
        set_peft_model_state_dict(adapted, adapter_tensors(adapter.folder), adapter_name=names[-1])
    hold_dense_in(adapted, opened.dtype)  # the others may be on other layers
    compute_experts(adapted)
    if len(names) > 1 or request.weights != (1.0,):
        adapted.base_model.set_adapter(names)  # type: ignore[operator]  # a tuner
        for layer in adapted.modules():
            if isinstance(layer, LoraLayer):
                for name, weight in zip(names, request.weights, strict=True):
                    if name in layer.scaling:
                        layer.scaling[name] *= weight
    return adapted


@torch.no_grad()
def _hold_new_rows(model: PreTrainedModel, opened: Opened) -> None:
    """Give the rows of added tokens the values that the run had: their mean is computed in its dtype."""
    if opened.base.additions == Additions():
        return
    old = int(opened.base.config.get_text_config().vocab_size)
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight: Any = getattr(end, "weight", None)
        if weight is not None and len(weight) > old:
            computed = weight.to(opened.dtype, copy=True)
            fill_with_mean(computed, old)
            weight[old:] = computed[old:].to(weight.dtype)


def load_merged(folder: Path, opened: Opened, *, packed: bool) -> PreTrainedModel:
    """The merged model in fp32: by plain transformers, or, packed, as a base of quantune, which needs no kernels.

    Raises:
        ModelError: it can't be loaded.
    """
    if packed:
        base = open_base(ModelConfig(base=str(folder), trust_remote_code=opened.setting.model.trust_remote_code))
        loaded = load_model(base, base.quantization, compute_dtype=torch.float32, device=opened.device)
        round_inputs(loaded, Rounding(activation_dtype=reader_activations(opened)))
        return loaded
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=opened.setting.model.trust_remote_code,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"the merged model can't be loaded by transformers: {error}") from error
    return model.to(opened.device)  # type: ignore[arg-type]  # a device, which its annotation leaves out


def activations(opened: Opened) -> Literal["int8", "fp8"] | None:
    """What activations were rounded to in training."""
    return None if opened.setting.qat is None else opened.setting.qat.activation_dtype


def reader_activations(opened: Opened) -> Literal["int8", "fp8"] | None:
    """What the reader of a packed merge rounds activations to: as in training, or as the base's own reader does."""
    stored = None if opened.base.stored is None else stored_activation_dtype(opened.base.stored)
    return activations(opened) or stored  # type: ignore[return-value]  # the dtypes that there are


def require_memory(opened: Opened, what: str) -> None:
    """Require that a model in fp32 fits into the memory that is free.

    Raises:
        InputError: it does not.
    """
    needed, free = 4 * _weights(opened), free_memory(opened.device)
    if needed > free:
        raise InputError(
            f"{what} loads the model in fp32, which takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are "
            "free; use a machine with more memory, or leave it out"
        )


def free_memory(device: torch.device) -> float:
    """Bytes of memory on a device that are free, to this container where it is limited."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = float("inf")
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        limit, used = (CGROUP.joinpath(name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
        return min(free, float(limit) - float(used))
    except (OSError, StopIteration, ValueError):  # not Linux, or not limited: "max"
        return free


def _weights(opened: Opened) -> int:
    return sum(parameter.numel() for parameter in opened.model.parameters())
