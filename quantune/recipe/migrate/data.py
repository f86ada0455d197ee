"""Rules for the data as a whole: lengths, order, what is held out."""

from __future__ import annotations

from typing import Any

from quantune.recipe.migrate.datasets import PARTS, all_datasets, format_of, overlong
from quantune.recipe.migrate.rule import (
    Config,
    Leaf,
    Outcome,
    RecipePath,
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
from quantune.recipe.migrate.values import Unusable, flag, number, text, whole
from quantune.recipe.structure import describe

LENGTH = 512
"""`sequence_len` where it is absent."""


def evaluates(config: Config) -> bool:
    """Whether there is anything to evaluate on."""
    return config.given("test_datasets") or config.number("val_set_size", 0) > 0


def _train_on_inputs(leaf: Leaf) -> Outcome:
    if not flag(leaf.value):
        return same()
    made: dict[RecipePath, Any] = {}
    chat = False
    for key, part in PARTS.items():
        listed = leaf.config.get(key)
        for index, dataset in enumerate(listed if isinstance(listed, list) else ()):
            if format_of(dataset) in ("chat", "instruct", "alpaca"):
                made[("data", part, index, "loss_on")] = "all"
                chat = chat or format_of(dataset) == "chat"
    if not made:
        return same()
    note = "also on what the template puts around the messages, which that tool leaves out" if chat else None
    return writes(made, note, changed=chat)


def _excess(leaf: Leaf) -> Outcome:
    known = {"drop": "drop", "truncate": "truncate", "raise": "error"}
    strategy = text(leaf.value)
    if strategy not in known:
        raise Unusable(f"expected one of {', '.join(known)}, found {describe(leaf.value)}")
    made = overlong(leaf.config)
    if made == known[strategy] or (made == "split" and strategy == "drop"):
        return write("data.overlong", made)
    if all(format_of(dataset) == "completion" for dataset in all_datasets(leaf.config)):
        return drop("completion texts over the length are split before it is looked at")
    return refuse("completion texts are split, and then what is too long of other formats is dropped")


def _val_set_size(leaf: Leaf) -> Outcome:
    size = number(leaf.value)
    if size == 0:
        return same()
    if leaf.config.given("test_datasets"):
        return refuse("test_datasets are what is evaluated on already; remove one of them")
    if size < 0 or size == 1:
        raise Unusable(f"expected a fraction between 0 and 1 or a number of samples, found {size}")
    return write("data.eval_size", whole(int(size)) if size > 1 else float(size))


def _shuffle(leaf: Leaf) -> Outcome:
    if flag(leaf.value):
        return same()
    if leaf.config.flag("curriculum_sampling"):
        return write("data.shuffle", False)
    note = "batches are drawn at random there all the same"
    if leaf.config.number("val_set_size", 0) > 0:
        note += "; what is held out is drawn at random here, and was the last rows there"
    return drop(note)


def _curriculum(leaf: Leaf) -> Outcome:
    if not flag(leaf.value):
        return same()
    listed, key = leaf.config.get("datasets"), "shuffle_merged_datasets"
    shuffled = key not in leaf.config.values or leaf.config.flag(key)  # a null switches it off
    if not (shuffled and isinstance(listed, list) and len(listed) > 1):
        return write("data.shuffle", False)
    note = "the files' order; there, several datasets are shuffled once unless shuffle_merged_datasets is false"
    return write("data.shuffle", False, note, changed=True)


def _packing(leaf: Leaf) -> Outcome:
    return write("data.packing", True) if flag(leaf.value) else same()


def _eval_packing(leaf: Leaf) -> Outcome:
    if not flag(leaf.value) or not evaluates(leaf.config):
        return same()
    return drop("evaluation is not packed; the loss is the same")


def _pad(leaf: Leaf) -> Outcome:
    return write("data.pad_to_max_length", True) if flag(leaf.value) else same()


_NO_STREAMS = "quantune trains on whole datasets; a streamed corpus is for pretraining"

RULES: tuple[Rule, ...] = (
    takes("sequence_len", "data.max_length", whole),
    translate("excess_length_strategy", to="`data.overlong`", by=_excess),
    translate("sample_packing", to="`data.packing`", by=_packing),
    translate("eval_sample_packing", to="nothing: evaluation is not packed", by=_eval_packing),
    translate("pad_to_sequence_len", to="`data.pad_to_max_length`", by=_pad),
    translate("val_set_size", to="`data.eval_size`, a fraction or a count", by=_val_set_size),
    translate("train_on_inputs", to='`loss_on = "all"` of every source', by=_train_on_inputs),
    translate("shuffle_merged_datasets", to="`data.shuffle`", by=_shuffle),
    translate("curriculum_sampling", to="`data.shuffle = false`", by=_curriculum),
    dropped(
        "sample_packing_group_size",
        "sample_packing_bin_size",
        "sample_packing_sequentially",
        "sample_packing_mp_start_method",
        "sample_packing_eff_est",
        "sample_packing_seq_len_multiplier",
        "multipack_real_batches",
        "batch_flattening",
        "pad_to_multiple_of",
        "total_num_tokens",
        "total_supervised_tokens",
        because="how rows are filled is quantune's own matter; samples never see each other",
    ),
    dropped(
        "dataset_prepared_path",
        "dataset_processes",
        "dataset_num_proc",
        "dataset_keep_in_memory",
        "dataset_shard_num",
        "dataset_shard_idx",
        "skip_prepare_dataset",
        "num_dataset_shards_to_save",
        "push_dataset_to_hub",
        "hf_use_auth_token",
        "shuffle_before_merging_datasets",
        "is_preprocess",
        "preprocess_iterable",
        "dataloader_pin_memory",
        "dataloader_num_workers",
        "dataloader_prefetch_factor",
        "dataloader_drop_last",
        "remove_unused_columns",
        because="quantune reads and tokenizes the data by itself in every run",
    ),
    dropped("group_by_length", because="batches are drawn at random; packing saves the padding"),
    refused("eval_sequence_len", because="evaluation has the same max_length as training"),
    refused("max_packed_sequence_len", because="it is sample_packing now"),
    refused("min_sample_len", because="no sample is too short for quantune; filter the data"),
    refused("max_prompt_len", because="it belongs to preference training, which quantune does not do"),
    refused(
        "dataset_exact_deduplication", because="quantune trains on the rows as they are; remove doubles beforehand"
    ),
    refused(
        "pretraining_dataset",
        "pretraining_dataset.**",
        "streaming",
        "streaming_multipack_buffer_size",
        "pretrain_multipack_buffer_size",
        "pretrain_multipack_attn",
        "pretraining_sample_concatenation",
        because=_NO_STREAMS,
    ),
    refused(
        "use_pose",
        "pose_split_on_token_ids",
        "pose_max_context_len",
        "pose_num_chunks",
        because="quantune does not change positions",
    ),
)
