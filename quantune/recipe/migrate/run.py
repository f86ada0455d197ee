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
)
from quantune.recipe.migrate.rule import value as takes
from quantune.recipe.migrate.training import checkpointed
from quantune.recipe.migrate.values import is_off, text, whole

_SHARDING = "this version trains in one process; when it trains in several, blocks are sharded with FSDP2 by themselves"
_TRACKERS = "quantune sends nothing anywhere; metrics.jsonl in the run folder has every step"


_SHARDS_THE_OPTIMIZER = (
    ". ZeRO 1 and 2 shard the optimizer: in FSDP2 that is fsdp_config: {reshard_after_forward: false} with "
    "fsdp_version: 2"
)
_FSDP2 = {
    "1": _SHARDS_THE_OPTIMIZER,
    "2": _SHARDS_THE_OPTIMIZER,
    "3": ". ZeRO 3 shards everything: in FSDP2 that is fsdp_config: {reshard_after_forward: true} with fsdp_version: 2",
}
"""What a stage of ZeRO is in FSDP2."""


def _both(*keys: str) -> tuple[str, ...]:
    """Keys of `fsdp_config`, with the prefix that half of them carry and without."""
    return tuple(f"fsdp_config.{prefix}{key}" for key in keys for prefix in ("", "fsdp_"))


def _deepspeed(leaf: Leaf) -> Outcome:
    if is_off(leaf.value):
        return same()
    equivalent = _FSDP2.get(_stage(leaf.config.get("deepspeed")), "")
    return refuse(f"quantune has no DeepSpeed{equivalent}; {_SHARDING}, so leave it out")


def _stage(deepspeed: Any) -> str:
    """The ZeRO stage that a DeepSpeed config says, or the name of its file; "" where neither does."""
    if isinstance(deepspeed, dict):
        zero = deepspeed.get("zero_optimization")
        said = str(zero.get("stage")) if isinstance(zero, dict) else ""
    else:
        named = re.search(r"zero[-_]?([123])", str(deepspeed).lower())
        said = named[1] if named else ""
    return said


def _offload(leaf: Leaf) -> Outcome:
    if is_off(leaf.value):
        return same()
    return refuse("the packed base stays on its device, a quarter of its size; leave it out")


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
    translate(*_both("offload_params"), to="nothing, when it is off", by=_offload),
    dropped(
        "fsdp",
        "fsdp_version",
        "fsdp_final_state_dict_type",
        *_both(
            "version",
            "sharding_strategy",
            "auto_wrap_policy",
            "transformer_layer_cls_to_wrap",
            "min_num_params",
            "reshard_after_forward",
            "state_dict_type",
            "final_state_dict_type",
            "cpu_ram_efficient_loading",
            "cpu_offload_pin_memory",
            "sync_module_states",
            "use_orig_params",
            "limit_all_gathers",
            "forward_prefetch",
            "backward_prefetch",
            "mixed_precision_policy",
        ),
        because=_SHARDING,
    ),
    Rule(
        keys=("deepspeed", "deepspeed.**"),
        treatment="refuse",
        meaning="quantune has no DeepSpeed; the counterpart in FSDP2 is shown",
        apply=_deepspeed,
    ),
    translate(
        "tensor_parallel_size",
        "context_parallel_size",
        "expert_parallel_size",
        "sequence_parallel_degree",
        to="nothing, when it is 1",
        by=_one,
    ),
    dropped(
        "dp_shard_size",
        "dp_replicate_size",
        "heads_k_stride",
        "ring_attn_func",
        "expert_parallel_backend",
        "expert_parallel_num_nvl_bytes",
        "expert_parallel_num_rdma_bytes",
        "expert_parallel_token_capacity",
        "expert_parallel_fallback_on_unsupported",
        "ddp",
        "ddp_timeout",
        "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers",
        "ddp_find_unused_parameters",
        "deepcompile",
        "accelerator_config",
        "accelerator_config.**",
        "local_rank",
        "world_size",
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
