"""Rules for the run: where it goes, who watches, how many processes."""

from __future__ import annotations

import re
from typing import Any

from quantune.recipe.migrate.rule import (
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
)
from quantune.recipe.migrate.rule import value as takes
from quantune.recipe.migrate.training import checkpointed
from quantune.recipe.migrate.values import flag, is_off, number, text, whole

_SHARDED = "with several processes, every block is sharded among all of them with FSDP2 by itself"
_GATHERED = "a block is gathered when it is needed and given up again, as FSDP2 orders it"
_WRITTEN_WHOLE = "the adapter and the checkpoints are written whole, whatever the number of processes"
_COUNTED = "[distributed] processes, torchrun or srun says how many processes there are"
_NO_DDP = "no process keeps the whole model, so that DDP's settings have no counterpart"
_TRACKERS = "quantune sends nothing anywhere; metrics.jsonl in the run folder has every step"


_STAGES = {
    "1": ". ZeRO 1 shards the optimizer; quantune shards the weights too",
    "2": ". ZeRO 2 shards the optimizer and the gradients; quantune shards the weights too",
    "3": ". ZeRO 3 shards everything, as quantune does",
}
"""What a stage of ZeRO is beside what quantune does."""


def _both(*keys: str) -> tuple[str, ...]:
    """Keys of `fsdp_config`, with the prefix that half of them carry and without."""
    return tuple(f"fsdp_config.{prefix}{key}" for key in keys for prefix in ("", "fsdp_"))


def _deepspeed(leaf: Leaf) -> Outcome:
    if is_off(leaf.value):
        return same()
    given = leaf.config.get("deepspeed")
    offload = ", and write [distributed] cpu_offload = true" if _offloads(given) else ""
    return refuse(f"quantune has no DeepSpeed{_STAGES.get(_stage(given), '')}: {_SHARDED}. Leave it out{offload}")


def _stage(deepspeed: Any) -> str:
    """The ZeRO stage that a DeepSpeed config says, or the name of its file; "" where neither does."""
    if isinstance(deepspeed, dict):
        zero = deepspeed.get("zero_optimization")
        said = str(zero.get("stage")) if isinstance(zero, dict) else ""
    else:
        named = re.search(r"(?:zero|_z)[-_]?([123])", str(deepspeed).lower())
        said = named[1] if named else ""
    return said


def _offloads(deepspeed: Any) -> bool:
    """Whether a DeepSpeed config keeps weights or the optimizer in the CPU's memory."""
    zero = deepspeed.get("zero_optimization") if isinstance(deepspeed, dict) else None
    places = [zero.get(key) for key in ("offload_param", "offload_optimizer")] if isinstance(zero, dict) else []
    return any(isinstance(place, dict) and place.get("device") == "cpu" for place in places)


def _options(fsdp: Any) -> list[str]:
    """The options of `fsdp`, which stand in a list or in one text."""
    options = fsdp if isinstance(fsdp, list) else re.split(r"[\s,]+", str(fsdp))
    return [str(option).strip().lower() for option in options]


def _offload(leaf: Leaf) -> Outcome:
    """`offload_params`, with the prefix or without, or among the options of `fsdp`; they have to agree."""
    config = leaf.config.get("fsdp_config")
    keys = ("offload_params", "fsdp_offload_params") if isinstance(config, dict) else ()
    said = {flag(config[key]) for key in keys if config.get(key) is not None}
    if "offload" in _options(leaf.config.get("fsdp")):
        said.add(True)
    if len(said) > 1:
        return refuse("it is on in one place and off in another of fsdp and fsdp_config; leave one of them")
    return write("distributed.cpu_offload", True) if True in said else same()


def _fsdp(leaf: Leaf) -> Outcome:
    if is_off(leaf.value):
        return same()
    options = _options(leaf.value)
    if "offload" in options:
        return _offload(leaf)
    if "no_shard" in options:
        return drop(f"no_shard left the whole model on every process; {_SHARDED}")
    return drop(_SHARDED)


def _version(leaf: Leaf) -> Outcome:
    return same("quantune uses FSDP2") if whole(leaf.value) == 2 else drop("quantune uses FSDP2, its successor")


def _reshard(leaf: Leaf) -> Outcome:
    if isinstance(leaf.value, str) and leaf.value.upper().endswith(("_SHARD", "_OP", "_ZERO2")):
        return drop(_SHARDED)  # of FSDP1, where it has the names of sharding strategies
    if flag(leaf.value):
        return same("each block is given up again after the forward pass")
    return drop("each block is given up again after the forward pass, which takes more traffic and less memory")


def _timeout(leaf: Leaf) -> Outcome:
    seconds = number(leaf.value)
    if seconds <= 0:
        return same()
    return write("distributed.timeout", seconds, "seconds until a process that makes no progress is named")


def _one(leaf: Leaf) -> Outcome:
    return same() if is_off(leaf.value) or whole(leaf.value) == 1 else refuse("no layer or sample is split up")


def _resume(leaf: Leaf) -> Outcome:
    return same() if is_off(leaf.value) else drop("a run goes on with quantune run --resume")


def _safe(leaf: Leaf) -> Outcome:
    return drop("everything is written as safetensors") if is_off(leaf.value) else same()


RULES: tuple[Rule, ...] = (
    takes("output_dir", "output.dir", text),
    translate(
        "resume_from_checkpoint",
        "auto_resume_from_checkpoints",
        to="nothing: `quantune run --resume`",
        by=_resume,
    ),
    translate("save_safetensors", to="what quantune does anyway", by=_safe),
    translate(*_both("activation_checkpointing"), to="`training.activation_checkpointing`", by=checkpointed),
    translate(*_both("offload_params"), to="`distributed.cpu_offload`", by=_offload),
    translate("fsdp", to="`distributed.cpu_offload`, where it has `offload`; the rest is not needed", by=_fsdp),
    translate("fsdp_version", *_both("version"), to="FSDP2, which quantune uses", by=_version),
    translate(*_both("reshard_after_forward"), to="what quantune does, when it is true", by=_reshard),
    dropped(
        *_both("sharding_strategy", "auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params"),
        "dp_shard_size",
        "dp_replicate_size",
        because=_SHARDED,
    ),
    dropped(
        *_both("cpu_ram_efficient_loading", "sync_module_states"),
        because="each process reads and packs its own share of the base, and none holds all of it",
    ),
    dropped(
        "fsdp_final_state_dict_type",
        *_both("state_dict_type", "final_state_dict_type"),
        because=_WRITTEN_WHOLE,
    ),
    dropped(*_both("limit_all_gathers", "forward_prefetch", "backward_prefetch"), because=_GATHERED),
    dropped(*_both("use_orig_params"), because="FSDP2 has no flat parameters, each keeps its name"),
    dropped(*_both("cpu_offload_pin_memory"), because="what is offloaded is pinned where there is a GPU"),
    dropped(*_both("mixed_precision_policy"), because="training.precision says what is computed in"),
    Rule(
        keys=("deepspeed", "deepspeed.**"),
        treatment="refuse",
        meaning="quantune has no DeepSpeed; what a stage of ZeRO is beside FSDP2 is shown",
        apply=_deepspeed,
    ),
    translate("ddp_timeout", to="`distributed.timeout`", by=_timeout),
    dropped(
        "ddp",
        "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers",
        "ddp_find_unused_parameters",
        because=_NO_DDP,
    ),
    dropped("local_rank", "world_size", because=_COUNTED),
    translate(
        "tensor_parallel_size",
        "context_parallel_size",
        "expert_parallel_size",
        "sequence_parallel_degree",
        to="nothing, when it is 1",
        by=_one,
    ),
    dropped(
        "heads_k_stride",
        "ring_attn_func",
        "expert_parallel_backend",
        "expert_parallel_num_nvl_bytes",
        "expert_parallel_num_rdma_bytes",
        "expert_parallel_token_capacity",
        "expert_parallel_fallback_on_unsupported",
        "deepcompile",
        "accelerator_config",
        "accelerator_config.**",
        "use_ray",
        "ray_run_name",
        "ray_num_workers",
        "resources_per_worker",
        "resources_per_worker.**",
        because="how processes work together is quantune's own matter",
    ),
    dropped(
        "device",
        "device_map",
        "device_map.**",
        "max_memory",
        "max_memory.**",
        "gpu_memory_limit",
        "low_cpu_mem_usage",
        "experimental_skip_move_to_device",
        "torch_dtype",
        "float32",
        because="quantune finds the device, and streams the base onto it",
    ),
    dropped(
        "use_wandb",
        "wandb_project",
        "wandb_entity",
        "wandb_watch",
        "wandb_name",
        "wandb_run_id",
        "wandb_mode",
        "wandb_log_model",
        "use_mlflow",
        "mlflow_tracking_uri",
        "mlflow_experiment_name",
        "mlflow_run_name",
        "hf_mlflow_log_artifacts",
        "use_comet",
        "comet_api_key",
        "comet_workspace",
        "comet_project_name",
        "comet_experiment_key",
        "comet_mode",
        "comet_online",
        "comet_experiment_config.**",
        "use_tensorboard",
        "use_trackio",
        "trackio_project_name",
        "trackio_run_name",
        "trackio_space_id",
        "use_swanlab",
        "swanlab_project",
        "swanlab_experiment_name",
        "swanlab_description",
        "swanlab_mode",
        "swanlab_workspace",
        "swanlab_api_key",
        "swanlab_log_model",
        "swanlab_web_host",
        "swanlab_api_host",
        "swanlab_lark_webhook_url",
        "swanlab_lark_secret",
        "swanlab_log_completions",
        "swanlab_completion_log_interval",
        "swanlab_completion_max_buffer",
        "use_otel_metrics",
        "otel_metrics_host",
        "otel_metrics_port",
        because=_TRACKERS,
    ),
    dropped(
        "include_tokens_per_second",
        "include_tkps",
        "profiler_steps",
        "profiler_steps_start",
        "gc_steps",
        "gc_collect_steps",
        "torch_empty_cache_steps",
        "loss_watchdog_threshold",
        "loss_watchdog_patience",
        because="quantune reports tokens per second and memory, and stops at a loss that is not finite",
    ),
    dropped(
        "hub_model_id",
        "hub_strategy",
        "hub_revision",
        because="quantune uploads nothing; the adapter in the run folder is a PEFT adapter",
    ),
    dropped(
        "strict",
        "debug",
        "inference",
        "prompter",
        "project_name",
        "axolotl_config_path",
        "gradio_title",
        "gradio_share",
        "gradio_server_name",
        "gradio_server_port",
        "gradio_max_new_tokens",
        "gradio_temperature",
        because="it belongs to that tool's own commands",
    ),
    refused(
        "do_causal_lm_eval",
        "eval_causal_lm_metrics",
        "do_bench_eval",
        "bench_dataset",
        "bench_split",
        "generate_samples",
        "num_generation_samples",
        "generation_max_new_tokens",
        "generation_temperature",
        "generation_top_p",
        "generation_top_k",
        "generation_prompt_ratio",
        "generation_do_sample",
        "eval_table_size",
        "eval_max_new_tokens",
        because="evaluation reports the loss, and with [evaluation] exact_match how many answers are right",
    ),
    refused("trainer_cls", because="quantune has one training loop"),
)
