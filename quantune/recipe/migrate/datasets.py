"""Rules for the elements of `datasets`: where rows come from, what a row is, what of it is a target."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from quantune.recipe.migrate.model import chat_template, chat_template_jinja, template_of
from quantune.recipe.migrate.prompts import CUSTOM, PROMPTS, SYSTEM_COLUMN, parts_of, prompt_of
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
from quantune.recipe.migrate.values import Unusable, flag, names, text
from quantune.recipe.source_conflicts import FILE_TYPES

PARTS = {"datasets": "train", "test_datasets": "eval"}
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


def all_datasets(config: Config) -> list[Any]:
    found = [config.get(key) for key in PARTS]
    return [dataset for part in found if isinstance(part, list) for dataset in part if isinstance(dataset, dict)]


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
        made[("data", "overlong")] = overlong(leaf.config)
        note = "texts over max_length are split, as there"
    return writes(made, note)


@lru_cache(maxsize=1)
def overlong(config: Config) -> str:
    if any(format_of(dataset) == "completion" for dataset in all_datasets(config)):
        return "split"
    return {"truncate": "truncate", "raise": "error"}.get(str(config.get("excess_length_strategy")), "drop")


def _custom(leaf: Leaf) -> Outcome:
    """The keys of the source that this key has a part in, and at the first one the format; the rest are defaults."""
    text(leaf.value) if leaf.name not in ("format", "no_input_format", "system_prompt", "system_format") else None
    given = dataset_of(leaf)["type"]
    made = prompt_of(given)
    said = {key: parts_of(key, made) for key in CUSTOM if given.get(key) is not None}
    first = leaf.name == next(iter(said))
    mine = said[leaf.name] | ({"format"} if first else set())
    says = {at(leaf, key): value for key, value in made.items() if key in mine}
    if leaf.name == ("system_prompt" if "system_prompt" in said else next(iter(said))):
        return writes(says, SYSTEM_COLUMN, changed=True)
    return writes(says)


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
    return {template_of(config, dataset) for dataset in all_datasets(config) if format_of(dataset) == "chat"}


def _template(rule: Callable[[Leaf], Outcome]) -> Callable[[Leaf], Outcome]:
    """A dataset's own chat template, where it is that of all datasets."""

    def apply(leaf: Leaf) -> Outcome:
        if len(_templates(leaf.config)) > 1:
            return refuse("a recipe has one chat template for all sources")
        return rule(leaf)

    return apply


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


def _both(*keys: str) -> tuple[str, ...]:
    """The keys of an element of `datasets`, and of one of `test_datasets`."""
    return tuple(f"{part}[].{key}" for part in PARTS for key in keys)


RULES: tuple[Rule, ...] = (
    translate(*_both("path"), to="`path` of a file, or `dataset` of the hub", by=_path),
    translate(*_both("type"), to="`format`, and for fixed prompts `template`", by=_type),
    translate(
        *_both(*(f"type.{key}" for key in CUSTOM)),
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
)
