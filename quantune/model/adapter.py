"""Adapters through PEFT: which layers they cover, attaching, saving and loading them."""

from __future__ import annotations

import difflib
import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantune.errors import ModelError
from quantune.model.initialization import Initialization, initialization
from quantune.model.load import linear_layers, packed_weights
from quantune.model.lora_layer import QuantLoraLinear
from quantune.model.vocabulary import Additions
from quantune.quantized.experts import is_experts
from quantune.quantized.linear import QuantLinear
from quantune.recipe.schema import AdapterConfig

NAME = "default"
"""The adapter's name in PEFT."""
IN_PEFT: dict[str, Any] = {"pissa": "pissa", "olora": "olora", "loftq": True}
"""What a saved adapter says of its initialization: with `pissa` and `olora` PEFT takes the same share out of an
ordinary base when it loads the adapter; a `loftq` adapter belongs to the packed base it was trained on."""
logging.getLogger("torchao").setLevel(logging.ERROR)  # importing it through PEFT reports optional kernels it lacks


def match_targets(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Names of the linear layers that `config.targets` covers.

    Raises:
        ModelError: a target matches nothing, `modules_to_save` names no module, or the regular expression is invalid.
    """
    linears = linear_layers(model)
    targets = config.targets
    taken = _taken_for_experts(model, linears)
    if targets == "all-linear":
        matched = [name for name in linears if _leaf(name) not in taken]
    elif isinstance(targets, str):
        matched = [name for name in linears if _compile(targets).fullmatch(name)]
    else:
        matched = [name for name in linears if any(_has_suffix(name, target) for target in targets)]
        unmatched = [target for target in targets if not any(_has_suffix(name, target) for name in linears)]
        if unmatched:
            raise ModelError(_no_match(unmatched[0], linears))
    if not matched:
        raise ModelError(_no_match(str(targets), linears))
    for leaf in sorted({_leaf(name) for name in matched} & taken):
        raise ModelError(
            f'[adapter] targets: PEFT takes "{leaf}" for the fused weights of this architecture\'s experts, which '
            "quantune's adapters do not reach; leave it out"
        )
    names = [name for name, _ in model.named_modules()]
    for module in config.modules_to_save:
        if not any(_has_suffix(name, module) for name in names):
            leaves = sorted({name.rpartition(".")[2] for name in names if name})
            raise ModelError(
                f'[adapter] modules_to_save: expected names of modules, found "{module}", which the model does not '
                f"have{_did_you_mean(module, leaves)}"
            )
    return matched


def left_out(model: nn.Module) -> list[str]:
    """Names of the linear layers that `all-linear` does not reach, because PEFT takes their names for experts."""
    linears = linear_layers(model)
    taken = _taken_for_experts(model, linears)
    return [name for name in linears if _leaf(name) in taken]


def _taken_for_experts(model: nn.Module, linears: list[str]) -> set[str]:
    """Last parts of the names of linear layers that PEFT does not take for linear layers.

    In some mixtures of experts PEFT turns `up_proj` as a target into the experts' fused weight, and then leaves out the
    linear layers of that name that stand beside the experts.
    """
    taken = set()
    for leaf in {_leaf(name) for name in linears} if any(map(is_experts, model.modules())) else ():
        probe = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(probe, model, None)
        except ValueError:  # one of two names that PEFT turns into one weight
            taken.add(leaf)
        if leaf not in (probe.target_modules or ()):
            taken.add(leaf)
    return taken


def attach(
    model: PreTrainedModel,
    config: AdapterConfig,
    *,
    base_name: str,
    seed: int,
    initialization: Initialization | None = None,
) -> PeftModel:
    """Put a freshly initialized adapter on the model; its parameters are fp32 and the only ones that are trained.

    The initialization depends on `seed`, the model's structure and, with `initialization` (the one the model was loaded
    with), its weights alone, not on how many processes there are.
    """
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT annotates int, and takes any number
        lora_dropout=config.dropout,
        target_modules=_peft_targets(model, config),
        exclude_modules=_head_names(model),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        bias=config.bias,
        init_lora_weights="gaussian" if config.init == "gaussian" else True,
        modules_to_save=list(config.modules_to_save) or None,
        ensure_weight_tying=bool(config.modules_to_save) and model.config.get_text_config().tie_word_embeddings,
        task_type="CAUSAL_LM",
    )
    _refuse_packed(model, config.modules_to_save)
    lora._register_custom_module({QuantLinear: QuantLoraLinear})
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, lora)
    peft_model.peft_config[NAME].base_model_name_or_path = base_name
    compute_dtype = model.dtype
    _train_in_fp32(peft_model)
    if initialization is not None:
        _begin_with(peft_model, initialization)
    if compute_dtype != torch.float32:
        for module in peft_model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                _compute_in_fp32(module.modules_to_save[NAME], compute_dtype)
    return peft_model


def _peft_targets(model: PreTrainedModel, config: AdapterConfig) -> list[str]:
    """`config.targets` as PEFT takes them."""
    matched = match_targets(model, config)
    if config.targets == "all-linear":
        return sorted({name.rpartition(".")[2] for name in matched})
    # a string: PEFT would apply the expression to modules of every kind, and to the output head
    return matched if isinstance(config.targets, str) else list(config.targets)


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
            weight = base.dequantize(torch.float32) if isinstance(base, QuantLinear) else base.weight.float()
            weight = weight + layer.scaling[NAME] * (layer.lora_B[NAME].weight @ layer.lora_A[NAME].weight)
            layer.lora_magnitude_vector[NAME].weight.copy_(torch.linalg.norm(weight, dim=1))
    initialization.factors.clear()  # as large as the adapter
    lora: Any = model.peft_config[NAME]
    lora.init_lora_weights = IN_PEFT[initialization.method]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def build_initialization(model: nn.Module, config: AdapterConfig, *, seed: int) -> Initialization | None:
    """The initialization that `config` asks for over the layers of `model`, which may be on the meta device."""
    trained_in_full = config.modules_to_save
    names = [
        name
        for name in match_targets(model, config)
        if not any(_has_suffix(_above(name, module), module) for module in trained_in_full)
    ]
    return initialization(config, names, seed=seed)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors`."""
    config = model.peft_config[NAME]
    for key in ("target_modules", "exclude_modules"):
        value = getattr(config, key)
        if isinstance(value, set):
            setattr(config, key, sorted(value))  # a set is written in an order that changes from run to run
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "adapter_model.safetensors").chmod((folder / "adapter_config.json").stat().st_mode)  # not for us alone


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a saved adapter on the model, for inference.

    Raises:
        ModelError: the folder holds no adapter, holds pickles, or does not fit the model.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"expected an adapter in {folder}, found no adapter_config.json there")
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"{folder} has no adapter_model.safetensors; quantune does not read pickled adapters (.bin)")
    try:
        config = LoraConfig.from_pretrained(str(folder))
        config._register_custom_module({QuantLinear: QuantLoraLinear})
        config.inference_mode = True
        if isinstance(config.init_lora_weights, str):  # the base was loaded without the adapter's share
            config.init_lora_weights = True
        return PeftModel.from_pretrained(model, str(folder), config=config)
    except (RuntimeError, ValueError, json.JSONDecodeError) as error:
        raise ModelError(f"the adapter in {folder} does not fit the base: {error}") from error


def require_trained_tokens(model: PreTrainedModel, additions: Additions, config: AdapterConfig) -> None:
    """Require that an adapter trains the rows of added tokens: untrained, they mean nothing to the model.

    That holds for rows that an embedding had to spare as well. `model` may be on the meta device.

    Raises:
        ModelError: it does not; names the tokens, and the modules to train.
    """
    if not additions.tokens:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    names = [name for name, module in model.named_modules() if module is embedding or (module is head and not tied)]
    either = [name for name, module in model.named_modules() if module is embedding or module is head]
    trained = {name for name in either if any(_has_suffix(name, saved) for saved in config.modules_to_save)}
    if trained and (tied or trained.issuperset(names)):
        return
    wanted = dict.fromkeys([*config.modules_to_save, *(_leaf(name) for name in names if name not in trained)])
    shown = ", ".join(additions.tokens[:5])
    more = f" and {len(additions.tokens) - 5} more" if len(additions.tokens) > 5 else ""
    raise ModelError(
        f"[model] adds tokens that the vocabulary lacks ({shown}{more}), and nothing trains their embeddings: set "
        f"[adapter] modules_to_save = {json.dumps([*wanted])}, or leave the tokens out"
    )


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter by name."""
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def _refuse_packed(model: nn.Module, modules_to_save: tuple[str, ...]) -> None:
    """Refuse to train modules in full that are packed."""
    for name, module in model.named_modules():
        saved = next((wanted for wanted in modules_to_save if _has_suffix(name, wanted)), None)
        if saved is not None and any(packed_weights(part) for part in module.modules()):
            raise ModelError(
                f'[adapter] modules_to_save: "{saved}" is packed, and packed weights can\'t be trained; '
                f'keep it in full precision with [quantization] skip = ["{saved}"]'
            )


def _compute_in_fp32(module: nn.Module, outside: torch.dtype) -> None:
    """Let a module with fp32 parameters work among modules that compute in another dtype."""

    def cast(values: Any, dtype: torch.dtype) -> Any:
        if isinstance(values, Tensor):
            return values.to(dtype) if values.is_floating_point() else values
        return tuple(cast(value, dtype) for value in values) if isinstance(values, tuple) else values

    module.register_forward_pre_hook(lambda _, inputs: cast(inputs, torch.float32))
    module.register_forward_hook(lambda _, inputs, output: cast(output, outside))


def _head_names(model: PreTrainedModel) -> list[str] | None:
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is head] or None


def _has_suffix(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _above(name: str, module: str) -> str:
    """The part of a layer's name down to a module of the name `module` that the layer is in; empty where it is in none.

    >>> _above("model.layers.0.mlp.up_proj", "mlp")
    'model.layers.0.mlp'
    """
    parts = name.split(".")
    wanted = module.split(".")
    for end in range(len(parts), len(wanted) - 1, -1):
        if parts[end - len(wanted) : end] == wanted:
            return ".".join(parts[:end])
    return ""


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ModelError(
            f"[adapter] targets: expected a regular expression, found {json.dumps(pattern)}: {error}"
        ) from error


def _no_match(target: str, linears: list[str]) -> str:
    kinds: dict[str, int] = {}
    for name in linears:
        leaf = name.rpartition(".")[2]
        kinds[leaf] = kinds.get(leaf, 0) + 1
    there_are = ", ".join(f"{leaf} (x{count})" for leaf, count in sorted(kinds.items())) or "none"
    example = f", e.g. {linears[0]}" if linears else ""
    return (
        f"[adapter] targets: {json.dumps(target)} matches no linear layer{_did_you_mean(target, list(kinds))}. "
        f"The linear layers there are: {there_are}{example}. A list holds name suffixes; a string is one regular "
        'expression over whole names, or "all-linear"'
    )


def _did_you_mean(word: str, options: list[str]) -> str:
    close = difflib.get_close_matches(word, options, n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""
