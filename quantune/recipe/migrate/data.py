"""Rules for the data: sources, their prompts, what is a target, lengths."""

from __future__ import annotations

import string
from collections.abc import Callable, Container
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from quantune.recipe.conflicts import FILE_TYPES
from quantune.recipe.migrate.model import chat_template, chat_template_jinja, template_of
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
    write_path,
    writes,
)
from quantune.recipe.migrate.rule import value as takes
from quantune.recipe.migrate.values import Unusable, flag, names, number, text, whole
from quantune.recipe.structure import describe

PARTS = {"datasets": "train", "test_datasets": "eval"}
LENGTH = 512
"""`sequence_len` where it is absent."""
BUILDERS = ("json", "csv", "parquet", "text", "arrow")
"""What `ds_type` may be, and `path` where `data_files` names the files."""
ROLES_THERE = {"user": ["human"], "assistant": ["gpt"]}
"""What the roles of messages are called beside their own names where `roles` is absent."""
_OTHER_FILES = (
    *(".txt", ".tsv", ".ndjson", ".xml", ".xlsx", ".arrow", ".feather", ".orc", ".avro"),
    *(".gz", ".zst", ".xz", ".bz2", ".lz4", ".zip", ".7z", ".tar", ".tgz"),
)
"""Endings of files that quantune does not read, which are no hub ids either."""
_REMOTE = ("s3://", "gs://", "gcs://", "adl://", "abfs://", "az://", "oci://", "http://", "https://")
_CHAT = ("chat_template", "chat_template.default", "chat_template.load")
_ALPACA = ("Below is an instruction that describes a task", "paired with an input that provides further context")
_REQUEST = "Write a response that appropriately completes the request."
_SYSTEM = (f"{_ALPACA[0]}, {_ALPACA[1]}. {_REQUEST}", f"{_ALPACA[0]}. {_REQUEST}")
_STYLES = {
    "chat": ("SYSTEM: {system}\nUSER: {instruction}\n{input}\nASSISTANT:", "{input}\n"),
    "chatml": (
        "<|im_start|>system\n{system}<|im_end|>\n"
        "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
        "\n{input}",
    ),
}
"""Alpaca's prompt in other styles, and what a row without input leaves out."""


def _styled(style: str) -> dict[str, str]:
    """Alpaca's prompts in another style, as keys of a source."""
    full, given = _STYLES[style]
    return {
        "format": "instruct",
        "response_column": "output",
        "template": full.replace("{system}", _SYSTEM[0]),
        "input_column": "input",
        "template_no_input": full.replace(given, "").replace("{system}", _SYSTEM[1]),
    }


PROMPTS: dict[str, dict[str, str]] = {
    **{name: {"format": "chat"} for name in _CHAT},
    "alpaca": {"format": "alpaca"},
    "completion": {"format": "completion"},
    **{f"alpaca:{style}": _styled(style) for style in _STYLES},
}
"""The keys of a source for each `type` that is text."""
_CUSTOM = {
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "format": "{instruction} {input} ",
    "no_input_format": "{instruction} ",
    "system_prompt": "",
    "system_format": "{system}",
}
"""The keys of a `type` that is a mapping, with what they are where they are absent."""
_PART_IN = {
    "field_instruction": ("template", "template_no_input"),
    "field_input": ("input_column", "template"),
    "field_output": ("response_column",),
    "format": ("template",),
    "no_input_format": ("template_no_input",),
    "system_prompt": ("template", "template_no_input"),
    "system_format": ("template", "template_no_input"),
}
"""The keys of a source that each of them has a part in; that there is a prompt at all says `format`."""
_SYSTEM_COLUMN = "there, the column system of a row, where it has one, takes the place of system_prompt"


def dataset_of(leaf: Leaf) -> dict[Any, Any]:
    """The element of `datasets` or `test_datasets` that a key stands in."""
    found = leaf.config.values[leaf.path[0]][leaf.path[1]]
    assert isinstance(found, dict)
    return found


def at(leaf: Leaf, *keys: str) -> RecipePath:
    """The path of a key of the recipe's source."""
    return ("data", PARTS[str(leaf.path[0])], int(leaf.path[1]), *keys)


def format_of(dataset: Any) -> str | None:
    """The recipe's format for a dataset; None where its `type` has none."""
    given = dataset.get("type") if isinstance(dataset, dict) else None
    if isinstance(given, dict):
        return "instruct"
    return PROMPTS[given]["format"] if isinstance(given, str) and given in PROMPTS else None


def _datasets(config: Config) -> list[Any]:
    found = [config.get(key) for key in PARTS]
    return [dataset for part in found if isinstance(part, list) for dataset in part if isinstance(dataset, dict)]


def evaluates(config: Config) -> bool:
    """Whether there is anything to evaluate on."""
    return config.given("test_datasets") or config.number("val_set_size", 0) > 0


# where the rows come from


def _is_file(dataset: dict[Any, Any]) -> bool:
    path = str(dataset.get("path") or "")
    local = path.startswith(("./", "../", "/", "~")) or PurePosixPath(path).suffix.lower() in FILE_TYPES + _OTHER_FILES
    by_name = dataset.get("ds_type") is not None and dataset.get("data_files") is None
    return local or by_name or (path in BUILDERS and dataset.get("data_files") is not None)


def _file_of(dataset: dict[Any, Any]) -> str:
    """The one file of a local dataset; raises Unusable where it is none, or several."""
    path, files = text(dataset.get("path")), dataset.get("data_files")
    if PurePosixPath(path).suffix.lower() in FILE_TYPES:
        return path
    if files is None:
        found = f"a folder or a file of another kind, {path!r}"
        raise Unusable(f"expected a file ending in {', '.join(FILE_TYPES)}, found {found}; name the file itself")
    listed = names(files)
    if len(listed) > 1:
        raise Unusable(f"expected one file, found {len(listed)}; write one element of datasets for each")
    return listed[0] if path in BUILDERS else str(PurePosixPath(path) / listed[0])


def _path(leaf: Leaf) -> Outcome:
    path = text(leaf.value)
    if path.startswith(_REMOTE):
        return refuse("quantune reads files and datasets of the hub; download it first")
    if not _is_file(dataset_of(leaf)):
        return write(at(leaf, "dataset"), path)
    return write_path(leaf, at(leaf, "path"), _file_of(dataset_of(leaf)))


def _data_files(leaf: Leaf) -> Outcome:
    if _is_file(dataset_of(leaf)):
        return write_path(leaf, at(leaf, "path"), _file_of(dataset_of(leaf)))
    return write(at(leaf, "data_files"), names(leaf.value))


def _ds_type(leaf: Leaf) -> Outcome:
    kind, dataset = text(leaf.value), dataset_of(leaf)
    if not _is_file(dataset):
        return drop("the type of a file is read off its ending")
    suffix = PurePosixPath(_file_of(dataset)).suffix.lower()
    if suffix in {"json": (".json", ".jsonl"), "csv": (".csv",), "parquet": (".parquet",)}.get(kind, ()):
        return same()
    return refuse(f"the type of a file is read off its ending, and {suffix or 'no ending'} is not that of {kind}")


def _of_hub(key: str) -> Callable[[Leaf], Outcome]:
    def apply(leaf: Leaf) -> Outcome:
        if _is_file(dataset_of(leaf)):
            return drop(f"{leaf.name} has no meaning for a file")
        return write(at(leaf, key), text(leaf.value))

    return apply


def _split(leaf: Leaf) -> Outcome:
    return write(at(leaf, "split"), text(leaf.value))


# what a row is


def _type(leaf: Leaf) -> Outcome:
    name = text(leaf.value)
    if name not in PROMPTS:
        way_out = "a type that is a mapping (field_instruction, format, ...) can spell out the prompt"
        if name.startswith("sharegpt"):
            way_out = "write type: chat_template, field_messages: conversations and message_property_mappings"
        return refuse(f'quantune has nothing for datasets of type "{name}"; {way_out}')
    made = {at(leaf, key): value for key, value in PROMPTS[name].items()}
    note = None
    if name == "completion":
        made[("data", "overlong")] = _overlong(leaf.config)
        note = "texts over max_length are split, as there"
    return writes(made, note)


def _custom(leaf: Leaf) -> Outcome:
    """The keys of the source that this key has a part in, and at the first one the format; the rest are defaults."""
    text(leaf.value) if leaf.name not in ("format", "no_input_format", "system_prompt", "system_format") else None
    given = dataset_of(leaf)["type"]
    made = prompt_of(given)
    said = {key: _parts(key, made) for key in _CUSTOM if given.get(key) is not None}
    first = leaf.name == next(iter(said))
    mine = said[leaf.name] | ({"format"} if first else set())
    says = {at(leaf, key): value for key, value in made.items() if key in mine}
    if leaf.name == ("system_prompt" if "system_prompt" in said else next(iter(said))):
        return writes(says, _SYSTEM_COLUMN, changed=True)
    return writes(says)


def _parts(key: str, made: Container[str]) -> set[str]:
    """What a key has a part in; where there is one prompt for all rows, it is that."""
    return {part for part in _PART_IN[key] if part in made} or {"template"}


def prompt_of(given: dict[Any, Any]) -> dict[str, str]:
    """The keys of a source for a prompt that is spelled out.

    There, `format` is the prompt of rows with an input and `no_input_format` of those without, and both name the
    columns as {instruction} and {input} whatever they are called.
    """
    said = {key: default if given.get(key) is None else str(given[key]) for key, default in _CUSTOM.items()}
    system = said["system_format"].replace("{system}", said["system_prompt"]) if said["system_prompt"] else ""
    columns = {"instruction": said["field_instruction"], "input": said["field_input"]}
    head = system.replace("{", "{{").replace("}", "}}")
    template, without = (head + _renamed(said[key], columns) for key in ("format", "no_input_format"))
    made = {"format": "instruct", "response_column": said["field_output"], "template": template}
    if template == without:
        return made
    return {**made, "input_column": said["field_input"], "template_no_input": without}


def _renamed(template: str, columns: dict[str, str]) -> str:
    """The template with its columns renamed; raises Unusable where it has others."""
    made = ""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise Unusable(f"expected a template such as '{{instruction}} {{input}}': {error}") from None
    for literal, column, spec, conversion in parts:
        made += literal.replace("{", "{{").replace("}", "}}")
        if column is None:
            continue
        if column not in columns or spec or conversion:
            raise Unusable(f"expected {{instruction}} and {{input}} in a template, found {{{column}}}")
        made += f"{{{columns[column]}}}"
    return made


def _for(format_: str, by: Callable[[Leaf], Outcome]) -> Callable[[Leaf], Outcome]:
    """The rule for rows of one format; where a dataset has another, the key had no meaning there either."""

    def apply(leaf: Leaf) -> Outcome:
        found = format_of(dataset_of(leaf))
        if found in (format_, None):
            return by(leaf)
        return drop(f"{leaf.key.partition('.')[2]} has no meaning for this type of dataset, there as here")

    return apply


def _column(key: str) -> Callable[[Leaf], Outcome]:
    return lambda leaf: write(at(leaf, key), text(leaf.value))


def _message_key(leaf: Leaf) -> Outcome:
    known = str(leaf.path[-1]).removeprefix("message_field_")
    column = text(leaf.value)
    return same() if known == column else write(at(leaf, "message_keys", known), column)


def _thinking_key(leaf: Leaf) -> Outcome:
    """Where the reasoning stands in a message, and what the template calls it."""
    dataset = dataset_of(leaf)
    column = str(dataset.get("field_thinking") or "reasoning_content")
    known = str(dataset.get("template_thinking_key") or "reasoning_content")
    return same() if known == column else write(at(leaf, "message_keys", known), column)


def _role(leaf: Leaf) -> Outcome:
    role = leaf.name
    others = [name for name in names(leaf.value) if name != role]
    return write(at(leaf, "roles", role), others) if others else same()


def _drop_system(leaf: Leaf) -> Outcome:
    return write(at(leaf, "drop_system_message"), True) if flag(leaf.value) else same()


@lru_cache(maxsize=1)
def _templates(config: Config) -> set[str]:
    return {template_of(config, dataset) for dataset in _datasets(config) if format_of(dataset) == "chat"}


def _template(rule: Callable[[Leaf], Outcome]) -> Callable[[Leaf], Outcome]:
    """A dataset's own chat template, where it is that of all datasets."""

    def apply(leaf: Leaf) -> Outcome:
        if len(_templates(leaf.config)) > 1:
            return refuse("a recipe has one chat template for all sources")
        return rule(leaf)

    return apply


# what is a target


def _roles_to_train(leaf: Leaf) -> Outcome:
    given = dataset_of(leaf).get("roles")
    roles = given if isinstance(given, dict) and given else ROLES_THERE
    called = {
        name: str(role) for role, listed in roles.items() if isinstance(listed, list) for name in map(str, listed)
    }
    if leaf.value == []:
        return refuse("with no role to train on there is nothing to learn")
    trained = list(dict.fromkeys(called.get(name, name) for name in names(leaf.value)))
    if trained == ["assistant"]:
        return same()
    return write(at(leaf, "loss_on"), trained)


def _train_on_eos(leaf: Leaf) -> Outcome:
    return write(at(leaf, "train_on_eos"), text(leaf.value))


def _train_on_eot(leaf: Leaf) -> Outcome:
    if leaf.value == (dataset_of(leaf).get("train_on_eos") or "turn"):
        return same()
    return refuse("quantune has one rule for the end of a turn and of a text; set train_on_eos alone")


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


# lengths, order, evaluation


@lru_cache(maxsize=1)
def _overlong(config: Config) -> str:
    if any(format_of(dataset) == "completion" for dataset in _datasets(config)):
        return "split"
    return {"truncate": "truncate", "raise": "error"}.get(str(config.get("excess_length_strategy")), "drop")


def _excess(leaf: Leaf) -> Outcome:
    known = {"drop": "drop", "truncate": "truncate", "raise": "error"}
    strategy = text(leaf.value)
    if strategy not in known:
        raise Unusable(f"expected one of {', '.join(known)}, found {describe(leaf.value)}")
    made = _overlong(leaf.config)
    if made == known[strategy] or (made == "split" and strategy == "drop"):
        return write("data.overlong", made)
    if all(format_of(dataset) == "completion" for dataset in _datasets(leaf.config)):
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


def _both(*keys: str) -> tuple[str, ...]:
    """The keys of an element of `datasets`, and of one of `test_datasets`."""
    return tuple(f"{part}[].{key}" for part in PARTS for key in keys)


_NO_STREAMS = "quantune trains on whole datasets; a streamed corpus is for pretraining"

RULES: tuple[Rule, ...] = (
    translate(*_both("path"), to="`path` of a file, or `dataset` of the hub", by=_path),
    translate(*_both("type"), to="`format`, and for fixed prompts `template`", by=_type),
    translate(
        *_both(*(f"type.{key}" for key in _CUSTOM)),
        to='`format = "instruct"` with `template`, `response_column` and what rows without input take',
        by=_custom,
    ),
    translate(*_both("split"), to="`split`, slices included", by=_split),
    translate(*_both("name"), to="`name`", by=_of_hub("name")),
    translate(*_both("revision"), to="`revision`", by=_of_hub("revision")),
    translate(*_both("data_files"), to="`data_files`, or `path` of a local file", by=_data_files),
    translate(*_both("ds_type"), to="nothing: read off the file's ending", by=_ds_type),
    translate(*_both("field"), to="`text_column`", by=_for("completion", _column("text_column"))),
    translate(*_both("field_messages"), to="`messages_column`", by=_for("chat", _column("messages_column"))),
    translate(
        *_both("message_property_mappings.*", "message_field_role", "message_field_content"),
        to="`message_keys`",
        by=_for("chat", _message_key),
    ),
    translate(*_both("field_thinking", "template_thinking_key"), to="`message_keys`", by=_for("chat", _thinking_key)),
    translate(*_both("roles.*"), to="`roles`; without it human is user and gpt assistant", by=_for("chat", _role)),
    translate(*_both("drop_system_message"), to="`drop_system_message`", by=_for("chat", _drop_system)),
    translate(*_both("roles_to_train"), to="`loss_on`", by=_for("chat", _roles_to_train)),
    translate(*_both("train_on_eos"), to="`train_on_eos`", by=_for("chat", _train_on_eos)),
    translate(*_both("train_on_eot"), to="nothing, if it is train_on_eos", by=_for("chat", _train_on_eot)),
    translate(
        *_both("chat_template"),
        to="`model.chat_template`, if all datasets have the same",
        by=_for("chat", _template(chat_template)),
    ),
    translate(
        *_both("chat_template_jinja"), to="`model.chat_template`", by=_for("chat", _template(chat_template_jinja))
    ),
    dropped(*_both("preprocess_shards"), because="rows are tokenized as they are read"),
    refused(*_both("trust_remote_code"), because="datasets no longer run code of the hub"),
    refused(*_both("shards", "shards_idx"), because='take a part of the rows with split, e.g. "train[:25%]"'),
    refused(*_both("type.field_system"), because="a system prompt of each row belongs into chat messages"),
    refused(
        *_both("message_field_training", "message_field_training_detail"),
        because="targets are chosen by role, not by marks in the data",
    ),
    refused(*_both("field_tools"), because="quantune passes no tools to a chat template"),
    refused(*_both("split_thinking"), because="quantune trains on an answer as it stands"),
    refused(
        *_both(
            "conversation",
            "field_human",
            "field_model",
            "field_system",
            "input_format",
            "input_transform",
            "logprobs_field",
            "temperature",
        ),
        because="only chat_template, alpaca, completion and prompts that are spelled out have a counterpart",
    ),
    refused(
        *_both(
            "field_chosen",
            "field_rejected",
            "field_prompt",
            "field_completion",
            "field_label",
            "step_separator",
            "max_completion_length",
            "train_on_last_step_only",
        ),
        because="quantune learns from answers, not from preferences or rewards",
    ),
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
