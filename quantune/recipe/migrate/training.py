"""Rules for the optimization."""

from __future__ import annotations

import math
from typing import Any

from quantune.recipe.migrate.data import evaluates
from quantune.recipe.migrate.qat import trains
from quantune.recipe.migrate.quantization import PRECISION, spelled
from quantune.recipe.migrate.rule import (
    Config,
    Leaf,
    Outcome,
    Rule,
    drop,
    dropped,
    refuse,
    refused,
    same,
    translate,
    write,
    writes,
)
from quantune.recipe.migrate.rule import value as takes
from quantune.recipe.migrate.values import Unusable, flag, is_off, number, text, whole
from quantune.recipe.structure import describe

_TORCHAO = "bitsandbytes' 8-bit AdamW in place of torchao's"
OPTIMIZERS: dict[str, tuple[str, str | None]] = {
    "adamw": ("adamw", None),
    "adamw_torch": ("adamw", None),
    "adamw_torch_fused": ("adamw", None),
    "adamw_hf": ("adamw", None),
    "adamw_apex_fused": ("adamw", None),
    "adamw_8bit": ("adamw_8bit", None),
    "adamw_bnb_8bit": ("adamw_8bit", None),
    "paged_adamw": ("paged_adamw", None),
    "paged_adamw_32bit": ("paged_adamw", None),
    "paged_adamw_8bit": ("paged_adamw_8bit", None),
    "adamw_torch_8bit": ("adamw_8bit", _TORCHAO),
    "ao_adamw_8bit": ("adamw_8bit", _TORCHAO),
    "adamw_torch_4bit": ("adamw_8bit", "moments of 8 bit in place of 4"),
    "ao_adamw_4bit": ("adamw_8bit", "moments of 8 bit in place of 4"),
}
"""Optimizers of that tool, quantune's, and what differs."""
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}


def micro_batch_size(config: Config) -> int:
    """Samples per forward pass and process, 1 where nothing says it."""
    return max(1, config.whole("micro_batch_size", 1))


def batch_size(config: Config) -> int:
    """Samples per optimizer step over all processes."""
    if config.given("batch_size"):
        return max(1, config.whole("batch_size", 1))
    return micro_batch_size(config) * max(1, config.whole("gradient_accumulation_steps", 1)) * config.processes


def _positive(value: Any) -> int:
    found = whole(value)
    if found < 1:
        raise Unusable(f"expected a whole number above 0, found {found}")
    return found


def _batch_note(config: Config) -> str:
    count = f"{config.processes} process" + ("es" if config.processes > 1 else "")
    return f"micro_batch_size x gradient_accumulation_steps x {count}; --processes N if it ran in more"


def _micro(leaf: Leaf) -> Outcome:
    made = {"training.micro_batch_size": _positive(leaf.value), "training.batch_size": batch_size(leaf.config)}
    return writes(made)


def _accumulation(leaf: Leaf) -> Outcome:
    _positive(leaf.value)
    if leaf.config.given("batch_size"):
        return refuse("batch_size says it already; that tool takes one of the two")
    return write("training.batch_size", batch_size(leaf.config), _batch_note(leaf.config))


def _batch(leaf: Leaf) -> Outcome:
    _positive(leaf.value)
    if leaf.config.given("gradient_accumulation_steps"):
        return refuse("gradient_accumulation_steps says it already; that tool takes one of the two")
    if leaf.config.processes == 1:
        return write("training.batch_size", batch_size(leaf.config))
    note = "over all processes, as documented there; that tool's own code took it for the batch of each process"
    return write("training.batch_size", batch_size(leaf.config), note, changed=True)


def _optimizer(leaf: Leaf) -> Outcome:
    name = text(leaf.value)
    if name not in OPTIMIZERS:
        return refuse(
            f'quantune has no optimizer "{name}"; adamw_torch and adamw_bnb_8bit are translated, for instance'
        )
    ours, difference = OPTIMIZERS[name]
    return write("training.optimizer", ours, difference, changed=difference is not None)


def _schedule(leaf: Leaf) -> Outcome:
    name = text(leaf.value)
    if name not in SCHEDULES:
        return refuse(f'quantune has no schedule "{name}"; there are {", ".join(SCHEDULES)}')
    if name == "constant":
        return writes({"training.schedule": "constant", "training.warmup_steps": 0})
    return write("training.schedule", SCHEDULES[name])


def _no_warmup(config: Config) -> bool:
    return config.get("lr_scheduler") == "constant"


def _warmup_steps(leaf: Leaf) -> Outcome:
    steps = number(leaf.value)
    if 0 < steps < 1:
        return refuse(f"expected a number of steps, found a fraction; did you mean warmup_ratio: {steps}?")
    if not is_off(leaf.config.get("warmup_ratio")) and not is_off(steps):
        return refuse("warmup_ratio sets the warm-up as well; remove one of them")
    return _warmup(leaf, "training.warmup_steps", whole(leaf.value))


def _warmup_ratio(leaf: Leaf) -> Outcome:
    if leaf.config.given("warmup_steps") and not is_off(leaf.value):
        return refuse("warmup_steps sets the warm-up as well; remove one of them")
    if leaf.config.get("warmup_steps") is not None:  # a 0, which goes first there
        return drop("warmup_steps: 0 goes before it") if is_off(leaf.config.get("warmup_steps")) else same()
    return _warmup(leaf, "training.warmup_ratio", number(leaf.value))


def _warmup(leaf: Leaf, path: str, amount: float) -> Outcome:
    if _no_warmup(leaf.config):
        return drop("lr_scheduler: constant has no warm-up; constant_with_warmup has one")
    return write(path, amount)


def _min_lr(leaf: Leaf) -> Outcome:
    ratio = number(leaf.value)
    if ratio and leaf.config.get("lr_scheduler") not in (None, "cosine"):
        return drop("it had no effect beside that lr_scheduler")
    return write("training.min_lr_ratio", ratio)


def _epochs(leaf: Leaf) -> Outcome:
    epochs = number(leaf.value)
    if leaf.config.whole("max_steps", 0) > 0:
        return drop("max_steps sets the length of the run, there too")
    return write("training.epochs", epochs)


def _max_steps(leaf: Leaf) -> Outcome:
    steps = whole(leaf.value)
    return write("training.max_steps", steps) if steps > 0 else same()


def _clip(leaf: Leaf) -> Outcome:
    norm = number(leaf.value)
    return write("training.max_grad_norm", math.inf if norm == 0 else norm)


def _optim_args(leaf: Leaf) -> Outcome:
    name = leaf.config.get("optimizer")
    if name is None or str(name) in OPTIMIZERS:
        return drop("it has no effect on AdamW there; adam_beta1, adam_beta2 and adam_epsilon do")
    return refuse("the optimizer it belongs to is not one of quantune's")


# precision, memory, compilation


def _bf16(leaf: Leaf) -> Outcome:
    path = "training.precision"
    if isinstance(leaf.value, str) and leaf.value.lower() in ("auto", "full"):
        if leaf.value.lower() == "auto" and spelled(leaf.config).tables.get(PRECISION) == "bf16":
            return same("bnb_4bit_compute_dtype says which")
        return write(path, "auto" if leaf.value.lower() == "auto" else "bf16")
    if flag(leaf.value):
        return write(path, "bf16")
    if leaf.config.flag("fp16") or leaf.config.flag("float16") or leaf.config.flag("bfloat16"):
        return same()
    return write(path, "fp32")


def _bfloat16(leaf: Leaf) -> Outcome:
    return write("training.precision", "bf16") if flag(leaf.value) else same()


def _fp16(leaf: Leaf) -> Outcome:
    if not flag(leaf.value):
        return same()
    bf16 = leaf.config.get("bf16")
    if bf16 == "full" or leaf.config.flag("bf16") or leaf.config.flag("bfloat16"):
        return drop("bf16 goes before it")
    note = "quantune has no fp16, which needs the loss scaled; auto is bf16 where that is fast, otherwise fp32"
    return write("training.precision", "auto", note, changed=True)


def _tf32(leaf: Leaf) -> Outcome:
    on = (isinstance(leaf.value, str) and leaf.value.lower() == "auto") or flag(leaf.value)
    return write("training.tf32", on)


def checkpointing(config: Config) -> bool | str:
    """What `gradient_checkpointing`, `activation_offloading` and FSDP's own switch come to."""
    given, offloading = config.get("gradient_checkpointing"), config.get("activation_offloading")
    if given in ("offload", "unsloth") or not is_off(offloading):
        return "offload"
    fsdp = config.get("fsdp_config")
    prefixes = ("activation_checkpointing", "fsdp_activation_checkpointing")
    by_fsdp = isinstance(fsdp, dict) and any(not is_off(fsdp.get(key)) for key in prefixes)
    return config.flag("gradient_checkpointing") or by_fsdp


def checkpointed(leaf: Leaf) -> Outcome:
    """The rule for whatever recomputes activations."""
    path = "training.activation_checkpointing"
    if isinstance(leaf.value, str) and leaf.value == "unsloth":
        return write(path, "offload", "in the way of that name: the inputs of the blocks wait in the CPU's memory")
    if isinstance(leaf.value, str) and leaf.value == "offload":
        return write(path, "offload")
    if leaf.value in ("offload_disk", "disk"):
        return refuse("quantune keeps activations in memory; offload keeps them in the CPU's")
    return write(path, checkpointing(leaf.config)) if flag(leaf.value) else same()


def _offloading(leaf: Leaf) -> Outcome:
    if is_off(leaf.value):
        return same()
    if leaf.value == "disk":
        return refuse("quantune keeps activations in memory; activation_offloading: true keeps them in the CPU's")
    if leaf.value not in (True, "legacy", "hidden_states", "true"):
        raise Unusable(f"expected true, legacy or hidden_states, found {describe(leaf.value)}")
    note = "only the inputs of the blocks are offloaded, and the rest is recomputed"
    exact = leaf.value == "hidden_states"
    return write("training.activation_checkpointing", "offload", None if exact else note, changed=not exact)


def _compile(leaf: Leaf) -> Outcome:
    on = (isinstance(leaf.value, str) and leaf.value.lower() == "auto") or flag(leaf.value)
    if on and trains(leaf.config):
        return writes({}, "qat packs each weight outside of graphs; nothing is compiled", changed=True)
    return write("training.compile", on)


def _backend(leaf: Leaf) -> Outcome:
    if leaf.value == "inductor" or not leaf.config.given("torch_compile"):
        return same()
    return refuse("quantune compiles with inductor")


# how often


def _run_epochs(config: Config) -> float:
    return max(config.number("num_epochs", 1.0), 1e-9)


def _per_epoch(section: str, times: int, config: Config) -> Outcome:
    """So many times an epoch; where max_steps ends the run, that tool counts its epochs from num_epochs."""
    steps, parts = config.whole("max_steps", 0), times * _run_epochs(config)
    if steps > 0 and parts > 1:
        note = f"{parts:g} times in the run, as that tool counts where max_steps is set"
        return write(f"{section}.every_steps", math.ceil(steps / parts), note)
    return write(f"{section}.per_epoch", times)


def _every(section: str, leaf: Leaf) -> Outcome:
    """Every so many steps, or every such part of the run."""
    amount = number(leaf.value)
    if amount >= 1:
        return write(f"{section}.every_steps", whole(leaf.value))
    if amount <= 0:
        return same()
    steps = leaf.config.whole("max_steps", 0)
    if steps > 0:
        return write(f"{section}.every_steps", math.ceil(steps * amount), f"{amount:g} of max_steps")
    times = 1 / (amount * _run_epochs(leaf.config))
    if math.isclose(times, round(times), rel_tol=1e-6) and times >= 1:
        return write(f"{section}.per_epoch", round(times), f"{amount:g} of the run")
    return refuse(f"{amount:g} of the run is no whole number of times an epoch; write a number of steps")


def _saves(leaf: Leaf) -> Outcome:
    times = whole(leaf.value)
    if times > 0 and leaf.config.given("save_steps"):
        return refuse("save_steps says it as well; remove one of them")
    if times < 1:
        return drop("0 left it to save_steps and save_strategy there")
    return _per_epoch("checkpoint", times, leaf.config)


def _save_steps(leaf: Leaf) -> Outcome:
    if not is_off(leaf.value) and leaf.config.given("saves_per_epoch"):
        return refuse("saves_per_epoch says it as well; remove one of them")
    return _every("checkpoint", leaf)


def _strategy(leaf: Leaf) -> str:
    """`no`, `steps`, `epoch` or `best`; YAML reads a bare `no` as false."""
    name = "no" if leaf.value is False else leaf.value
    if name not in ("no", "steps", "epoch", "best"):
        raise Unusable(f"expected no, steps or epoch, found {describe(leaf.value)}")
    return str(name)


def _save_strategy(leaf: Leaf) -> Outcome:
    name = _strategy(leaf)
    if name == "best":
        return refuse("quantune keeps the last checkpoints, whatever the evaluation says")
    if leaf.config.given("save_steps") or leaf.config.given("saves_per_epoch") or name == "steps":
        return same()
    if name == "epoch":
        return write("checkpoint.per_epoch", 1)
    return same("one checkpoint is written at the end all the same")


def _keep(leaf: Leaf) -> Outcome:
    count = whole(leaf.value)
    if count == 1:
        note = "one more than there, so that a damaged one has a predecessor"
        return write("checkpoint.keep", 2, note, changed=True)
    return same("0 keeps that tool's default") if count == 0 else write("checkpoint.keep", count)


def _evaluating(rule: Any) -> Any:
    """The rule where there is something to evaluate on; otherwise the key had no effect, there as here."""
    return lambda leaf: rule(leaf) if evaluates(leaf.config) else same()


def _evals(leaf: Leaf) -> Outcome:
    times = whole(leaf.value)
    if times > 0 and leaf.config.given("eval_steps"):
        return refuse("eval_steps says it as well; remove one of them")
    if times > 0:
        return _per_epoch("evaluation", times, leaf.config)
    return same() if scheduled(leaf.config) else write("evaluation.at_end", False)


def _eval_steps(leaf: Leaf) -> Outcome:
    if not is_off(leaf.value) and leaf.config.given("evals_per_epoch"):
        return refuse("evals_per_epoch says it as well; remove one of them")
    return _every("evaluation", leaf)


def _eval_strategy(leaf: Leaf) -> Outcome:
    name = _strategy(leaf)
    if name == "best":
        raise Unusable("expected no, steps or epoch, found best")
    if name == "no":
        return same() if scheduled(leaf.config) else write("evaluation.at_end", False)
    if name == "steps" or leaf.config.given("eval_steps") or leaf.config.given("evals_per_epoch"):
        return same()
    return write("evaluation.per_epoch", 1)


def scheduled(config: Config) -> bool:
    """Whether that tool evaluates at all while it trains."""
    strategies = (config.get("eval_strategy"), config.get("evaluation_strategy"))
    return config.given("eval_steps") or config.given("evals_per_epoch") or "epoch" in strategies


def _deprecated_strategy(leaf: Leaf) -> Outcome:
    if leaf.config.get("eval_strategy") is not None and leaf.config.get("eval_strategy") != leaf.value:
        return refuse("eval_strategy says something else; remove this one")
    return _eval_strategy(leaf)


_SAME_RESULT = "it changes the speed and not the result; quantune chooses by itself"

RULES: tuple[Rule, ...] = (
    translate("micro_batch_size", to="`training.micro_batch_size` and `training.batch_size`", by=_micro),
    translate("gradient_accumulation_steps", to="`training.batch_size`, over all processes", by=_accumulation),
    translate("batch_size", to="`training.batch_size`", by=_batch),
    takes("learning_rate", "training.learning_rate", number),
    translate("optimizer", to="`training.optimizer`", by=_optimizer),
    translate("optim_args", "optim_args.**", to="nothing: without effect on AdamW", by=_optim_args),
    translate("lr_scheduler", to="`training.schedule`", by=_schedule),
    translate("warmup_steps", to="`training.warmup_steps`", by=_warmup_steps),
    translate("warmup_ratio", to="`training.warmup_ratio`", by=_warmup_ratio),
    translate("cosine_min_lr_ratio", to="`training.min_lr_ratio`", by=_min_lr),
    takes("weight_decay", "training.weight_decay", number),
    takes("adam_beta1", "training.beta1", number),
    takes("adam_beta2", "training.beta2", number),
    takes("adam_epsilon", "training.eps", number),
    translate("num_epochs", to="`training.epochs`, unless max_steps is set", by=_epochs),
    translate("max_steps", to="`training.max_steps`", by=_max_steps),
    translate("max_grad_norm", to="`training.max_grad_norm`, 0 as `inf`", by=_clip),
    takes("seed", "training.seed", whole),
    translate("bf16", to="`training.precision`", by=_bf16),
    translate("bfloat16", to="`training.precision`", by=_bfloat16),
    translate("fp16", "float16", to='`training.precision = "auto"`', by=_fp16),
    translate("tf32", to="`training.tf32`", by=_tf32),
    translate("gradient_checkpointing", to="`training.activation_checkpointing`", by=checkpointed),
    translate("activation_offloading", to='`training.activation_checkpointing = "offload"`', by=_offloading),
    translate("torch_compile", to="`training.compile`", by=_compile),
    translate("torch_compile_backend", to="nothing, if it is inductor", by=_backend),
    translate("saves_per_epoch", to="`checkpoint.per_epoch`", by=_saves),
    translate("save_steps", to="`checkpoint.every_steps`", by=_save_steps),
    translate("save_strategy", to="`checkpoint.per_epoch` for epoch", by=_save_strategy),
    translate("save_total_limit", to="`checkpoint.keep`, at least 2", by=_keep),
    translate("evals_per_epoch", to="`evaluation.per_epoch`", by=_evaluating(_evals)),
    translate("eval_steps", to="`evaluation.every_steps`", by=_evaluating(_eval_steps)),
    translate("eval_strategy", to="`evaluation.per_epoch` for epoch", by=_evaluating(_eval_strategy)),
    translate("evaluation_strategy", to="`evaluation.per_epoch` for epoch", by=_evaluating(_deprecated_strategy)),
    translate(
        "eval_batch_size",
        to="`evaluation.batch_size`",
        by=_evaluating(lambda leaf: write("evaluation.batch_size", whole(leaf.value))),
    ),
    takes("logging_steps", "logging.every_steps", whole),
    dropped("save_only_model", because="a checkpoint always holds what a run needs to go on"),
    dropped("save_first_step", because="checkpoints begin at the first interval"),
    dropped(
        "gradient_checkpointing_kwargs.*",
        because="checkpointing is non-reentrant, as torch recommends; the gradients are the same",
    ),
    dropped("torch_compile_mode", "torch_compile_options.*", "flex_attn_compile_kwargs.*", because=_SAME_RESULT),
    dropped("torchdistx_path", because="it belongs to an optimizer that is gone"),
    refused(
        "cosine_constant_lr_ratio",
        "lr_quadratic_warmup",
        "lr_scheduler_kwargs.**",
        "lr_div_factor",
        because="schedules have the keys schedule, min_lr_ratio and a warm-up",
    ),
    refused("lr_groups", "lr_groups.**", "embedding_lr", "embedding_lr_scale", because="there is one learning rate"),
    refused(
        "adam_beta3",
        "adam_epsilon2",
        "dion_lr",
        "dion_momentum",
        "dion_rank_fraction",
        "dion_rank_multiple_of",
        "qgalore_rank",
        "qgalore_update_proj_gap",
        "qgalore_scale",
        "qgalore_proj_type",
        "qgalore_proj_quant",
        "qgalore_proj_bits",
        "qgalore_proj_group_size",
        "qgalore_cos_threshold",
        "qgalore_gamma_proj",
        "qgalore_queue_size",
        "optim_target_modules",
        because="it belongs to an optimizer that quantune does not have",
    ),
    refused("auto_find_batch_size", because='set micro_batch_size; in a recipe "auto" keeps it within 16,384 tokens'),
    refused("selective_checkpointing", "selective_checkpointing.**", because="a block is recomputed as a whole"),
    refused("layer_offloading", because="the packed base stays on its device"),
    refused("neftune_noise_alpha", "noisy_embedding_alpha", because="quantune adds no noise to embeddings"),
    refused(
        "early_stopping_patience",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
        because="a run trains to its end, and the adapter is that of the last step",
    ),
    refused("fp32_norms", "fp32_norm_classes", "embeddings_skip_upcast", because="precision is one key for the base"),
    refused("use_eaft", "eaft_alpha", "eaft_k", because="the loss is cross-entropy"),
    refused("fix_untrained_tokens", because="quantune leaves the base as it is"),
)
