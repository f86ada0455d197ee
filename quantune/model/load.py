"""Loading a base model, packed or as it is, and saying what came of it."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantune.backends import registry
from quantune.backends.checkpoints import in_words
from quantune.distributed.shares import Shares, gathered
from quantune.errors import ModelError, QuantizationError
from quantune.model.adoption import kept_modules
from quantune.model.base import Base
from quantune.model.device import lean_heap
from quantune.model.initialization import Initialization
from quantune.model.names import matches_any
from quantune.model.quantizer import (
    QuantizationPlan,
    QuantuneConfig,
    is_router,
    packable,
    quantizable_experts,
    shape_problem,
)
from quantune.model.vocabulary import grow_embeddings
from quantune.quantized import experts
from quantune.quantized.linear import QuantLinear, WeightFormat
from quantune.recipe.schema import QuantizationConfig


@attrs.frozen(kw_only=True)
class ModuleRow:
    """What one kind of module holds."""

    kind: str
    """The module's class."""
    dtype: str
    """What its weights are stored as, e.g. `nf4 (4.13 bits)` or `float32`."""
    count: int
    weights: int
    """Number of weights."""
    nbytes: int


def load_model(
    base: Base,
    quantization: QuantizationConfig | None,
    *,
    compute_dtype: torch.dtype,
    device: torch.device,
    initialization: Initialization | None = None,
    pack_dtype: torch.dtype | None = None,
    shares: Shares | None = None,
) -> PreTrainedModel:
    """Load the base onto `device`, frozen, packing its linear layers one by one when `quantization` is given.

    With `shares` the large parameters are DTensors of which each rank holds its share.

    `initialization` takes an adapter's share out of the weights on the way. Weights are packed from `pack_dtype`, which
    is `compute_dtype` unless a base is to be the one that was trained on with another.

    Raises:
        ModelError: the weights can't be read, are incomplete, or are already quantized and `quantization` is None.
        BackendError: the backend can't run here, or not on this device.
        QuantizationError: a weight can't be packed, or one that should be packed is not.
    """
    if quantization is None and base.stored is not None:
        raise ModelError(
            f"{base.name} is already quantized ({in_words(base.stored)}) and can't be loaded in full precision; choose "
            "the unquantized base"
        )
    plan = None
    if quantization is not None:
        plan = plan_base(
            base,
            quantization,
            compute_dtype,
            device,
            initialization=initialization,
            pack_dtype=pack_dtype,
            shares=shares,
        )
    config = None if plan is None and shares is None else QuantuneConfig(plan, shares, initialization)
    try:
        with lean_heap():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                base.source,
                config=base.config,
                dtype=compute_dtype,
                # ranks put their shares where they belong; transformers would first make room for all of the model
                device_map=None if device.type == "cpu" or shares is not None else {"": device},
                use_safetensors=True,
                attn_implementation=base.attn_implementation,
                quantization_config=config,
                output_loading_info=True,
                **base.loading_arguments(),
            )
        if shares is not None:
            shares.finish()
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, ImportError, ValueError) as error:
        if plan is not None and plan.failures:
            raise plan.failures[0] from error
        raise ModelError(f"[model] base = {json.dumps(base.name)} can't be loaded: {error}") from error
    model, info = loaded
    if shares is not None:
        _share_rest(model, shares)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:5])
        raise ModelError(f"{base.name} lacks weights of its own architecture: {missing}. Fetch the checkpoint again")
    grow_embeddings(model, base.additions)
    model.requires_grad_(False)
    model.eval()
    if quantization is not None:
        assert plan is not None
        _require_packed(model, plan)
    if initialization is not None:
        _split_dense(model, initialization, pack_dtype or compute_dtype)
    if initialization is not None and shares is not None:  # of a packed weight the rank that packed it has them
        packed = {name for name in initialization.factors if isinstance(model.get_submodule(name), QuantLinear)}
        own = {name: initialization.factors[name].on_cpu() for name in packed}
        initialization.factors.update(shares.merged(own))
    return model


def plan_base(
    base: Base,
    quantization: QuantizationConfig,
    compute_dtype: torch.dtype,
    device: torch.device,
    *,
    initialization: Initialization | None = None,
    pack_dtype: torch.dtype | None = None,
    shares: Shares | None = None,
) -> QuantizationPlan:
    """What to pack of a base, or to take over as it is; the arguments are those of `load_model`.

    Raises:
        ModelError: an adapter's share can't be taken out of weights that are already quantized.
        BackendError: the backend can't run here, or not on `device`.
    """
    plan = plan_quantization(quantization, compute_dtype, device)
    plan = attrs.evolve(plan, initialization=initialization, pack_dtype=pack_dtype or compute_dtype, shares=shares)
    if base.stored is None:
        return plan
    if initialization is not None:
        raise ModelError(
            f'[adapter] init = "{initialization.method}" changes the weights before they are packed, and '
            f'{base.name} is already quantized; use init = "default", or choose the unquantized base'
        )
    return attrs.evolve(plan, adopt=True, skip=(*plan.skip, *kept_modules(base.stored)))


def plan_quantization(
    quantization: QuantizationConfig,
    compute_dtype: torch.dtype,
    device: torch.device,
) -> QuantizationPlan:
    """Import the backend and say what to pack with it.

    Raises:
        BackendError: the backend can't run here, or not on `device`.
    """
    description = registry.describe_available(quantization.backend)
    registry.require_device(description, getattr(quantization.options, "weight_dtype", None), device.type)
    return QuantizationPlan(
        backend=registry.load_backend(description),
        options=quantization.options,
        skip=quantization.skip,
        experts=quantization.experts,
        compute_dtype=compute_dtype,
        pack_dtype=compute_dtype,
    )


def check_plan(
    model: PreTrainedModel,
    quantization: QuantizationConfig,
    device: torch.device,
    stored: Mapping[str, Any] | None = None,
) -> None:
    """Check what `quantization` says against a model without weights.

    `stored` is what the `config.json` of a checkpoint that is already quantized says of that.

    Raises:
        ModelError: a pattern of `skip` names nothing, nothing is left to pack, the format can't store a shape, or the
            checkpoint holds experts packed that should stay in full precision.
        BackendError: the backend can't run here, or not on `device`.
    """
    plan = plan_quantization(quantization, torch.float32, device)
    names = [name for name, _ in model.named_modules() if name] + [name for name, _ in model.named_parameters()]
    for pattern in plan.skip:
        if not any(matches_any(name, [pattern]) for name in names):
            leaves = sorted({name.rpartition(".")[2] for name in linear_layers(model)})
            close = difflib.get_close_matches(pattern.rpartition(".")[2], leaves, n=1)
            raise ModelError(
                f"[quantization] skip: {json.dumps(pattern)} names no module of this base"
                + (f' (did you mean "{close[0]}"?)' if close else f"; the linear layers are {', '.join(leaves)}")
            )
    if stored is not None:
        plan = attrs.evolve(plan, skip=(*plan.skip, *kept_modules(stored)))
        held = next(quantizable_experts(model, plan.skip), None)
        if held is not None and not plan.experts:
            raise ModelError(
                f"[quantization] experts = false: this checkpoint already holds its experts packed, e.g. {held[2]}; "
                'take experts = false out, dequantize them with skip = ["experts"], or choose the unquantized base'
            )
    if not packable(model, plan.skip, plan.experts):
        raise ModelError(_nothing_packed(model, plan))
    problem = shape_problem(model, plan)
    if problem is not None:
        raise ModelError(problem)


def module_table(model: nn.Module) -> list[ModuleRow]:
    """What the model holds, per class of module and stored dtype; shared weights are counted once."""
    rows: dict[tuple[str, str], list[int]] = {}
    seen: set[int] = set()
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            weights, dtype = parameter.numel(), str(parameter.dtype).removeprefix("torch.")
            packed = packed_weights(module).get(leaf)
            if packed is not None:
                layout = packed.layout
                weights = math.prod(layout.shape) * (parameter.shape[0] if parameter.dim() == 2 else 1)
                name = getattr(layout.options, "weight_dtype", layout.backend)
                dtype = f"{name} ({layout.bits_per_weight:.2f} bits)"
            row = rows.setdefault((type(module).__name__, dtype), [0, 0, 0])
            row[0] += leaf == "weight" or weights > 0
            row[1] += weights
            row[2] += parameter.nbytes
    return [
        ModuleRow(kind=kind, dtype=dtype, count=count, weights=weights, nbytes=nbytes)
        for (kind, dtype), (count, weights, nbytes) in sorted(rows.items(), key=lambda item: -item[1][2])
    ]


def packed_weights(module: nn.Module) -> dict[str, WeightFormat]:
    """The formats of the packed parameters of a module itself, by name.

    A packed linear layer's `weight` is one weight, shape (bytes,); a packed stack of experts holds one in each row.
    """
    return {"weight": module.weight_format} if isinstance(module, QuantLinear) else experts.weight_formats(module)


def packed_fingerprint(model: nn.Module, *, counts: bool = True) -> str:
    """One fingerprint of all packed weights, see `fingerprint_of`.

    Ranks that share the model gather it weight by weight; where it does not count, nothing is hashed.
    """
    digests: dict[str, str] = {}
    for name, module in model.named_modules():
        for leaf in packed_weights(module):
            data = gathered(module.get_parameter(leaf).detach())
            if counts:
                label = f"{name}.{leaf}"
                rows = {label: data} if data.dim() == 1 else {f"{label}[{i}]": row for i, row in enumerate(data)}
                digests.update({row: packed_digest(packed) for row, packed in rows.items()})
    return fingerprint_of(digests)


def packed_digest(data: Tensor) -> str:
    """sha256 of the bytes of one packed weight, shape (bytes,), dtype uint8."""
    return hashlib.sha256(data.cpu().numpy().data).hexdigest()


def fingerprint_of(digests: Mapping[str, str]) -> str:
    """sha256 over the digests of packed weights by name, whatever order they were packed in.

    A weight is called what the model calls it, the one of an expert `...experts.down_proj[3]`.
    """
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def linear_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers, the output head left out."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def _share_rest(model: nn.Module, shares: Shares) -> None:
    """Share what was loaded whole though it is large, as a checkpoint's own quantizer leaves dense weights, and put
    vectors and buffers, which every rank holds, onto the device."""
    shared: dict[int, nn.Parameter] = {}  # by what it replaces, for tied weights
    for module_name, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                continue
            if shares.covers(f"{module_name}.{leaf}", parameter):
                if id(parameter) not in shared:
                    shared[id(parameter)] = shares.rows(parameter.data)
                module.register_parameter(leaf, shared[id(parameter)])
            else:
                parameter.data = parameter.data.to(shares.device)
        for buffer in module.buffers(recurse=False):
            buffer.data = buffer.data.to(shares.device)


def _split_dense(model: nn.Module, initialization: Initialization, dtype: torch.dtype) -> None:
    """Take the adapter's share out of the adapted layers that are not packed, as a run in `dtype` did."""
    for name in sorted(initialization.names - initialization.factors.keys()):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        if not isinstance(layer, QuantLinear):
            weight = layer.weight.data
            layer.weight.data = initialization.split(name, weight.to(dtype), None).to(weight.dtype)


def _require_packed(model: PreTrainedModel, plan: QuantizationPlan) -> None:
    """Fail if a weight matrix that the recipe meant to pack is still in full precision."""
    left = sorted(name for name in _full_precision(model, plan.experts) if not matches_any(name, plan.skip))
    packed = any(packed_weights(module) for module in model.modules())
    if packed and not left:
        return
    if not packed:
        raise QuantizationError(_nothing_packed(model, plan))
    shown = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
    raise QuantizationError(
        f"{len(left)} weights that [quantization] should cover are still in full precision: {shown}. "
        "quantune packs linear layers (nn.Linear) and fused experts; name these in [quantization] skip to keep them as "
        "they are"
    )


def _nothing_packed(model: nn.Module, plan: QuantizationPlan) -> str:
    kept = f"skip = {json.dumps(plan.skip)}" + ("" if plan.experts else ", experts = false")
    return (
        f"nothing is packed: [quantization] covers no linear layer of {type(model).__name__} ({kept}). "
        "Leave [quantization] out to train on the base as it is"
    )


def _full_precision(model: PreTrainedModel, stacks: bool) -> Iterable[str]:
    """Names of weights that quantization is about: all large matrices, and with `stacks` stacks of them, of any module.

    Left out are embeddings, the output head, routers, convolutions, and what the architecture keeps in fp32.
    """
    keep = set(model._keep_in_fp32_modules or ()) | set(model._keep_in_fp32_modules_strict or ())
    head = model.get_output_embeddings()
    hidden = getattr(model.config.get_text_config(), "hidden_size", 0)
    for name, module in model.named_modules():
        if module is head or is_router(name) or isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d):
            continue
        if any(part in keep for part in name.split(".")):
            continue
        if isinstance(module, nn.Linear | Conv1D) and not isinstance(module, QuantLinear):
            yield name
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            matrix = parameter.is_floating_point() and (parameter.dim() > 1 if stacks else parameter.dim() == 2)
            large = parameter.numel() >= hidden * hidden / 4
            if matrix and large and not (is_router(leaf) or leaf.endswith("bias")):
                yield f"{name}.{leaf}"
