"""Adapters through PEFT: attaching, saving and loading them."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from quantune.distributed.shares import gathered
from quantune.errors import ModelError
from quantune.model.initialization import Initialization, initialization
from quantune.model.load import packed_weights
from quantune.model.lora_experts import ParamWrapper
from quantune.model.lora_layer import QuantLoraLinear, RoundedLora
from quantune.model.targets import (
    above,
    has_suffix,
    head_names,
    match_parameters,
    match_targets,
    peft_targets,
    trained_in_full,
)
from quantune.quantized import experts
from quantune.quantized.linear import QuantLinear
from quantune.recipe.schema import AdapterConfig

NAME = "default"
"""The adapter's name in PEFT."""
RECIPE, ORIGIN = "recipe.toml", "run.json"
"""What an adapter's folder says of the run that trained it: its recipe, and its manifest."""
IN_PEFT: dict[str, Any] = {"pissa": "pissa", "olora": "olora", "loftq": True}
"""What a saved adapter says of its initialization: with `pissa` and `olora` PEFT takes the same share out of an
ordinary base when it loads the adapter; a `loftq` adapter belongs to the packed base it was trained on."""
logging.getLogger("torchao").setLevel(logging.ERROR)  # importing it through PEFT reports optional kernels it lacks


def attach(
    model: PreTrainedModel,
    config: AdapterConfig,
    *,
    base_name: str,
    seed: int,
    initialization: Initialization | None = None,
    rounds: bool = False,
) -> PeftModel:
    """Put a freshly initialized adapter on the model; its parameters are fp32 and the only ones that are trained.

    The initialization depends on `seed`, the model's structure and, with `initialization` (the one the model was loaded
    with), its weights alone, not on how many processes there are. With `rounds` its layers can round, also over weights
    that are not packed.
    """
    matched = match_targets(model, config)
    match_parameters(model, config.target_parameters)
    full = trained_in_full(model, config)
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT annotates int, and takes any number
        lora_dropout=config.dropout,
        target_modules=DUMMY_TARGET_MODULES if config.type == "full" else peft_targets(model, config),
        exclude_modules=[name for name in head_names(model) if name not in matched and config.type == "lora"] or None,
        target_parameters=list(config.target_parameters) or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        bias=config.bias,
        init_lora_weights="gaussian" if config.init == "gaussian" else True,
        modules_to_save=list(full) or None,
        ensure_weight_tying=_trains_tied(model, config),
        task_type="CAUSAL_LM",
    )
    _refuse_packed(model, full)
    lora._register_custom_module(custom_modules(model, rounds=rounds))
    torch.manual_seed(seed)
    with _whole_weights(model):
        peft_model = get_peft_model(model, lora)
    compute_experts(peft_model)
    peft_model.peft_config[NAME].base_model_name_or_path = base_name
    compute_dtype = model.dtype
    _train_in_fp32(peft_model)
    if initialization is not None:
        _begin_with(peft_model, initialization)
    if compute_dtype != torch.float32:
        for module in _whole_modules(peft_model):
            _compute_in_fp32(module, compute_dtype)
    return peft_model


@contextlib.contextmanager
def _whole_weights(model: nn.Module) -> Iterator[None]:
    """Let PEFT see the whole of dense weights that ranks share, where it looks at them: DoRA starts from their norms.

    PEFT calls `dequantize()` of any layer that has a `W_q`.
    """
    shared = [one for one in model.modules() if type(one) is nn.Linear and isinstance(one.weight, DTensor)]
    for layer in shared:
        layer.W_q = layer.weight.data
        layer.dequantize = functools.partial(gathered, layer.weight.data)  # type: ignore[assignment]  # no module
    try:
        yield
    finally:
        for layer in shared:
            del layer.W_q, layer.dequantize


def custom_modules(model: nn.Module, *, rounds: bool = False) -> dict[type[nn.Module], type[nn.Module]]:
    """quantune's layers for what PEFT can't adapt, or with `rounds` not round, by itself; PEFT takes the first that
    fits."""
    return {
        QuantLinear: QuantLoraLinear,
        **({nn.Linear: RoundedLora} if rounds else {}),
        **{type(module): ParamWrapper for module in model.modules() if experts.is_experts(module)},
    }


def compute_experts(model: PeftModel) -> None:
    """Let quantune's function compute experts that have an adapter: it is the one that knows of it."""
    if any(isinstance(module, ParamWrapper) for module in model.modules()):
        inner: Any = model.get_base_model()
        inner.set_experts_implementation(experts.IMPLEMENTATION)


def _trains_tied(model: PreTrainedModel, config: AdapterConfig) -> bool:
    """Whether an embedding that shares its weight with the output head is trained in full."""
    embedding = model.get_input_embeddings()
    tied = [*head_names(model), *(name for name, module in model.named_modules() if module is embedding)]
    return model.config.get_text_config().tie_word_embeddings and any(
        has_suffix(name, module) for name in tied for module in trained_in_full(model, config)
    )


def _train_in_fp32(model: PeftModel) -> None:
    """Hold what is trained in fp32, but biases of layers that compute in another dtype and don't cast them."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        if "lora_" in name or "modules_to_save" in name or isinstance(owner, QuantLinear):
            parameter.data = parameter.data.float()


@torch.no_grad()
def _begin_with(model: PeftModel, initialization: Initialization) -> None:
    """Put what was taken out of the weights into the adapter."""
    for name, factors in initialization.factors.items():
        layer: Any = model.get_base_model().get_submodule(name)
        layer.lora_A[NAME].weight.copy_(factors.lora_A)
        layer.lora_B[NAME].weight.copy_(factors.lora_B)
        if NAME in layer.lora_magnitude_vector:  # DoRA: the norms of base and update together
            base = layer.get_base_layer()
            packed = isinstance(base, QuantLinear)
            weight = base.dequantize(torch.float32) if packed else gathered(base.weight).float()
            weight = weight + layer.scaling[NAME] * (layer.lora_B[NAME].weight @ layer.lora_A[NAME].weight)
            layer.lora_magnitude_vector[NAME].weight.copy_(torch.linalg.norm(weight, dim=1))
    initialization.factors.clear()  # as large as the adapter
    lora: Any = model.peft_config[NAME]
    lora.init_lora_weights = IN_PEFT[initialization.method]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted_layers(model: PeftModel, config: AdapterConfig) -> int:
    """How many layers are trained: those with an adapter, or in full where that is what `[adapter]` asks for."""
    if config.type == "full":
        return sum(isinstance(module, ModulesToSaveWrapper) for module in model.modules())
    return sum(hasattr(module, "lora_A") for module in model.modules())


def build_initialization(model: PreTrainedModel, config: AdapterConfig, *, seed: int) -> Initialization | None:
    """The initialization that `config` asks for over the layers of `model`, which may be on the meta device."""
    trained_in_full = config.modules_to_save
    names = [
        name
        for name in match_targets(model, config)
        if isinstance(model.get_submodule(name), nn.Linear)  # embeddings begin at zero
        and not any(above(name, module) for module in trained_in_full)
    ]
    return initialization(config, names, seed=seed)


def needed_whole(model: PreTrainedModel, config: AdapterConfig, *, grown: bool) -> list[str]:
    """Modules whose weights must be whole when the adapter is attached: copies of them are trained, or, in a vocabulary
    that has `grown`, they get new rows."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    shared = [weight for end in ends if end is not None for weight in end.parameters()]
    tied = len({id(weight) for weight in shared}) < len(shared)
    full = trained_in_full(model, config)
    names = [name for name, _ in model.named_modules() if any(has_suffix(name, wanted) for wanted in full)]
    end_names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    if grown or (tied and set(names).intersection(end_names)):
        names += end_names
    return names


def whole_state(model: PeftModel) -> dict[str, Tensor]:
    """The state of the model, on the CPU where it is trained, with what is trained whole; all ranks call this."""
    state = model.state_dict(keep_vars=True)
    return {name: gathered(value.detach()).cpu() if value.requires_grad else value for name, value in state.items()}


def save_adapter(model: PeftModel, folder: Path, whole: dict[str, Tensor] | None = None) -> None:
    """Write the adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

    `whole` is the model's `whole_state`, where the model is sharded.
    """
    config = model.peft_config[NAME]
    for key in ("target_modules", "exclude_modules", "target_parameters"):
        value = getattr(config, key)
        if isinstance(value, set):
            setattr(config, key, sorted(value))  # a set is written in an order that changes from run to run
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False, state_dict=whole)
    (folder / "adapter_model.safetensors").chmod((folder / "adapter_config.json").stat().st_mode)  # not for us alone


def load_adapter(model: PreTrainedModel, folder: Path, *, rounds: bool = False) -> PeftModel:
    """Put a saved adapter on the model, for inference; `rounds` as in `attach`.

    Raises:
        ModelError: the folder holds no adapter, holds pickles, or does not fit the model.
    """
    require_adapter(folder)
    try:
        config = LoraConfig.from_pretrained(str(folder))
        config._register_custom_module(custom_modules(model, rounds=rounds))
        config.inference_mode = True
        if isinstance(config.init_lora_weights, str):  # the base was loaded without the adapter's share
            config.init_lora_weights = True
        loaded = PeftModel.from_pretrained(model, str(folder), config=config)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"the adapter in {folder} does not fit the base: {error}") from error
    compute_experts(loaded)
    full = _whole_modules(loaded) if model.dtype != torch.float32 else []
    for module in full:
        module.float()
        _compute_in_fp32(module, model.dtype)
    if full:  # PEFT rounded them to the dtype of the base
        set_peft_model_state_dict(loaded, adapter_tensors(folder), adapter_name=NAME)
    return loaded


def require_adapter(folder: Path) -> None:
    """Require that a folder holds an adapter without pickles.

    Raises:
        ModelError: it does not.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"expected an adapter in {folder}, found no adapter_config.json there")
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"{folder} has no adapter_model.safetensors; quantune does not read pickled adapters (.bin)")


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter by name.

    Raises:
        ModelError: they can't be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} can't be read, it is damaged: {error}") from error


def _refuse_packed(model: nn.Module, full: tuple[str, ...]) -> None:
    """Refuse to train modules in full that are packed."""
    for name, module in model.named_modules():
        saved = next((wanted for wanted in full if has_suffix(name, wanted)), None)
        if saved is not None and any(packed_weights(part) for part in module.modules()):
            raise ModelError(
                f'[adapter] modules_to_save: "{saved}" is packed, and packed weights can\'t be trained; '
                f'keep it in full precision with [quantization] skip = ["{saved}"]'
            )


def _whole_modules(model: PeftModel) -> list[nn.Module]:
    """The modules that are trained in full."""
    return [one.modules_to_save[NAME] for one in model.modules() if isinstance(one, ModulesToSaveWrapper)]


def _compute_in_fp32(module: nn.Module, outside: torch.dtype) -> None:
    """Let a module with fp32 parameters work among modules that compute in another dtype."""

    def cast(values: Any, dtype: torch.dtype) -> Any:
        if isinstance(values, Tensor):
            return values.to(dtype) if values.is_floating_point() else values
        return tuple(cast(value, dtype) for value in values) if isinstance(values, tuple) else values

    module.register_forward_pre_hook(lambda _, inputs: cast(inputs, torch.float32))
    module.register_forward_hook(lambda _, inputs, output: cast(output, outside))
