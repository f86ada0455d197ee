"""Every rule of `migrate`, as a table: what a key says becomes what the recipe says, or is refused or dropped by name.

A row is a YAML in few words (merged into BASE), the key it is about, the outcome, and what the recipe then holds.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import tomli
import yaml
from migration import migrate

import quantune.recipe
from quantune.backends import registry
from quantune.recipe.conflicts import check
from quantune.recipe.load import structure_recipe
from quantune.recipe.migrate import leaf_keys
from quantune.recipe.migrate.datasets import ROLES_THERE
from quantune.recipe.migrate.table import BY_KEY, RULES

BASE = {
    "base_model": "org/model",
    "datasets": [{"path": "org/data", "type": "chat_template"}],
    "adapter": "lora",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_linear": True,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-4,
}
EVALUATED = {"val_set_size": 0.1}


class Nothing:
    def __repr__(self):
        return "NOTHING"  # without an address, so that the ids of tests are the same in every process


NOTHING = Nothing()
"""The recipe does not have the key."""


def migrated(changes, **options):
    document = {key: value for key, value in {**BASE, **changes}.items() if value is not NOTHING}
    return migrate(yaml.safe_dump(document, sort_keys=False), **options)


def entry_of(migration, key):
    (entry,) = [entry for entry in migration.report.entries if entry.key == key]
    return entry


def holds(document, where):
    for part in where.replace("[", ".[").split("."):
        step = int(part[1:-1]) if part.startswith("[") else part
        if isinstance(document, dict) and step not in document:
            return NOTHING
        document = document[step]
    return document


def one(**dataset):
    return {"datasets": [{"path": "org/data", "type": "chat_template", **dataset}]}


def prompt(**type_):
    return {"datasets": [{"path": "data.jsonl", "type": type_}]}


SOURCE = "data.train[0]"
TWO = {"datasets": [{"path": "org/data", "type": "alpaca"}, {"path": "org/more", "type": "alpaca"}]}
ROWS = [
    # model
    ({}, "base_model", "translated", {"model.base": "org/model"}),
    ({"revision_of_model": "abc"}, "revision_of_model", "translated", {"model.revision": "abc"}),
    ({"revision_of_model": 6299}, "revision_of_model", "translated", {"model.revision": "6299"}),
    ({"model_revision": "abc"}, "model_revision", "translated", {"model.revision": "abc"}),
    ({"tokenizer_config": "org/other"}, "tokenizer_config", "translated", {"model.tokenizer": "org/other"}),
    ({"trust_remote_code": True}, "trust_remote_code", "translated", {"model.trust_remote_code": True}),
    ({"trust_remote_code": False}, "trust_remote_code", "default", {"model.trust_remote_code": NOTHING}),
    ({"attn_implementation": "sdpa"}, "attn_implementation", "translated", {"model.attn_implementation": "sdpa"}),
    ({"attn_implementation": "xformers"}, "attn_implementation", "changed", {"model.attn_implementation": "sdpa"}),
    (
        {"attn_implementation": "kernels-community/vllm-flash-attn3"},
        "attn_implementation",
        "changed",
        {"model.attn_implementation": "flash_attention_3"},
    ),
    ({"attn_implementation": "sage"}, "attn_implementation", "refused", {"model.attn_implementation": NOTHING}),
    ({"flash_attention": True}, "flash_attention", "translated", {"model.attn_implementation": "flash_attention_2"}),
    ({"flash_attention": "true"}, "flash_attention", "translated", {"model.attn_implementation": "flash_attention_2"}),
    ({"flash_attention": False}, "flash_attention", "default", {"model.attn_implementation": NOTHING}),
    ({"sdp_attention": True}, "sdp_attention", "translated", {"model.attn_implementation": "sdpa"}),
    ({"flex_attention": True}, "flex_attention", "translated", {"model.attn_implementation": "flex_attention"}),
    ({"eager_attention": True}, "eager_attention", "translated", {"model.attn_implementation": "eager"}),
    ({"xformers_attention": True}, "xformers_attention", "changed", {"model.attn_implementation": "sdpa"}),
    ({"sage_attention": True}, "sage_attention", "refused", {}),
    ({"chat_template": "chatml"}, "chat_template", "translated", {"model.chat_template": "chatml"}),
    ({"chat_template": "phi_3"}, "chat_template", "changed", {"model.chat_template": "phi3"}),
    ({"chat_template": "tokenizer_default"}, "chat_template", "default", {"model.chat_template": NOTHING}),
    (
        {"chat_template": "tokenizer_default_fallback_llama3"},
        "chat_template",
        "changed",
        {"model.chat_template": NOTHING},
    ),
    ({"chat_template": "gemma3"}, "chat_template", "changed", {"model.chat_template": NOTHING}),
    ({"chat_template": "chatlm"}, "chat_template", "refused", {}),
    (
        {"chat_template": "jinja", "chat_template_jinja": "chat.jinja"},
        "chat_template_jinja",
        "translated",
        {"model.chat_template": "chat.jinja"},
    ),
    ({"chat_template_jinja": "{% for m in messages %}"}, "chat_template_jinja", "refused", {}),
    (
        {"special_tokens": {"pad_token": "<pad>"}},
        "special_tokens.pad_token",
        "translated",
        {"model.special_tokens.pad_token": "<pad>"},
    ),
    (
        {"special_tokens": {"additional_special_tokens": ["<a>", "<b>"]}},
        "special_tokens.additional_special_tokens",
        "translated",
        {"model.special_tokens.additional_special_tokens": ["<a>", "<b>"]},
    ),
    (
        {"tokens": {"eos_token": "</s>"}},
        "tokens.eos_token",
        "translated",
        {"model.special_tokens.eos_token": "</s>"},
    ),
    ({"special_tokens": None}, "special_tokens", "default", {"model.special_tokens": NOTHING}),
    ({"special_tokens": "<pad>"}, "special_tokens", "refused", {}),
    ({"special_tokens": {"pad_tokn": "<pad>"}}, "special_tokens.pad_tokn", "unrecognised", {}),
    ({"tokens": ["<x>", "<y>"]}, "tokens", "translated", {"model.added_tokens": ["<x>", "<y>"]}),
    (
        {"resize_token_embeddings_to_32x": True},
        "resize_token_embeddings_to_32x",
        "translated",
        {"model.pad_vocabulary_to_multiple_of": 32},
    ),
    ({"resize_token_embeddings_to_32x": False}, "resize_token_embeddings_to_32x", "default", {}),
    ({"mean_resizing_embeddings": True}, "mean_resizing_embeddings", "default", {}),
    ({"mean_resizing_embeddings": False}, "mean_resizing_embeddings", "dropped", {}),
    (
        {"model_config": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}},
        "model_config.rope_scaling.factor",
        "translated",
        {"model.config.rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    (
        {"overrides_of_model_config": {"output_router_logits": True}},
        "overrides_of_model_config.output_router_logits",
        "translated",
        {"model.config.output_router_logits": True},
    ),
    (
        {"model_config": {"a": 1}, "overrides_of_model_config": {"a": {"b": 2}}},
        "model_config.a",
        "refused",
        {"model.config": NOTHING},
    ),
    ({"model_type": "AutoModelForCausalLM"}, "model_type", "dropped", {}),
    ({"model_type": "AutoModelForSequenceClassification"}, "model_type", "refused", {}),
    ({"type_of_model": "LlamaForCausalLM"}, "type_of_model", "dropped", {}),
    ({"base_model_config": "org/model"}, "base_model_config", "default", {}),
    ({"base_model_config": "org/other"}, "base_model_config", "refused", {}),
    # data: where rows come from
    (one(), "datasets[0].path", "translated", {f"{SOURCE}.dataset": "org/data"}),
    (one(path="a/b.jsonl"), "datasets[0].path", "translated", {f"{SOURCE}.path": "a/b.jsonl"}),
    (one(path="./rows.csv"), "datasets[0].path", "translated", {f"{SOURCE}.path": "./rows.csv"}),
    (one(path="s3://bucket/rows.jsonl"), "datasets[0].path", "refused", {}),
    (one(path="./folder"), "datasets[0].path", "refused", {}),
    (one(path="rows.jsonl.zst", ds_type="json"), "datasets[0].path", "refused", {}),
    (one(path="data/corpus.txt"), "datasets[0].path", "refused", {f"{SOURCE}.dataset": NOTHING}),
    (one(path="data/x.arrow"), "datasets[0].path", "refused", {f"{SOURCE}.dataset": NOTHING}),
    (one(path="data/x.jsonl.gz"), "datasets[0].path", "refused", {f"{SOURCE}.dataset": NOTHING}),
    (one(path="text", data_files="x.txt"), "datasets[0].data_files", "refused", {f"{SOURCE}.dataset": NOTHING}),
    (one(path="org/data.v2"), "datasets[0].path", "translated", {f"{SOURCE}.dataset": "org/data.v2"}),
    (
        one(path="json", data_files="a.jsonl", ds_type="json"),
        "datasets[0].data_files",
        "translated",
        {f"{SOURCE}.path": "a.jsonl", f"{SOURCE}.dataset": NOTHING},
    ),
    (
        one(path="./folder", data_files=["a.jsonl"]),
        "datasets[0].data_files",
        "translated",
        {f"{SOURCE}.path": "folder/a.jsonl"},
    ),
    (one(path="json", data_files=["a.jsonl", "b.jsonl"]), "datasets[0].data_files", "refused", {}),
    (
        one(data_files=["x/a.json"]),
        "datasets[0].data_files",
        "translated",
        {f"{SOURCE}.data_files": ["x/a.json"], f"{SOURCE}.dataset": "org/data"},
    ),
    (one(path="a.jsonl", ds_type="json"), "datasets[0].ds_type", "default", {}),
    (one(path="a.jsonl", ds_type="csv"), "datasets[0].ds_type", "refused", {}),
    (one(data_files=["a.json"], ds_type="json"), "datasets[0].ds_type", "dropped", {}),
    (one(split="train[:20%]"), "datasets[0].split", "translated", {f"{SOURCE}.split": "train[:20%]"}),
    (one(split="train"), "datasets[0].split", "default", {f"{SOURCE}.split": NOTHING}),
    (one(name="main"), "datasets[0].name", "translated", {f"{SOURCE}.name": "main"}),
    (one(path="a.jsonl", name="main"), "datasets[0].name", "dropped", {f"{SOURCE}.name": NOTHING}),
    (one(revision="v1"), "datasets[0].revision", "translated", {f"{SOURCE}.revision": "v1"}),
    # data: what a row is
    (one(type="chat_template.default"), "datasets[0].type", "translated", {f"{SOURCE}.format": "chat"}),
    (one(), "datasets[0].type", "translated", {f"{SOURCE}.roles": ROLES_THERE}),
    (one(roles={}), "datasets[0].roles", "default", {f"{SOURCE}.roles": ROLES_THERE}),
    (one(type="alpaca"), "datasets[0].type", "translated", {f"{SOURCE}.format": "alpaca", f"{SOURCE}.roles": NOTHING}),
    (
        one(type="completion"),
        "datasets[0].type",
        "translated",
        {f"{SOURCE}.format": "completion", "data.overlong": "split"},
    ),
    (
        one(type="alpaca:chat"),
        "datasets[0].type",
        "translated",
        {
            f"{SOURCE}.format": "instruct",
            f"{SOURCE}.response_column": "output",
            f"{SOURCE}.input_column": "input",
            f"{SOURCE}.template": "SYSTEM: Below is an instruction that describes a task, paired with an input that "
            "provides further context. Write a response that appropriately completes the request.\n"
            "USER: {instruction}\n{input}\nASSISTANT:",
            f"{SOURCE}.template_no_input": "SYSTEM: Below is an instruction that describes a task. Write a response "
            "that appropriately completes the request.\nUSER: {instruction}\nASSISTANT:",
        },
    ),
    (one(type="sharegpt"), "datasets[0].type", "refused", {}),
    (
        prompt(field_instruction="q", field_output="a", format="[{instruction}]", no_input_format="[{instruction}]"),
        "datasets[0].type.format",
        "translated",
        {
            f"{SOURCE}.format": "instruct",
            f"{SOURCE}.template": "[{q}]",
            f"{SOURCE}.response_column": "a",
            f"{SOURCE}.input_column": NOTHING,
        },
    ),
    (
        prompt(field_instruction="q", field_input="c", system_prompt="Be {brief}.\n"),
        "datasets[0].type.system_prompt",
        "changed",
        {
            f"{SOURCE}.template": "Be {{brief}}.\n{q} {c} ",
            f"{SOURCE}.template_no_input": "Be {{brief}}.\n{q} ",
            f"{SOURCE}.input_column": "c",
            f"{SOURCE}.response_column": "output",
        },
    ),
    (
        prompt(field_input="c", format="{instruction}: {input}", no_input_format="{instruction}"),
        "datasets[0].type.field_input",
        "changed",
        {f"{SOURCE}.template": "{instruction}: {c}", f"{SOURCE}.template_no_input": "{instruction}"},
    ),
    (
        prompt(field_output="a", system_prompt="S", system_format="<{system}>"),
        "datasets[0].type.system_format",
        "translated",
        {f"{SOURCE}.template": "<S>{instruction} {input} "},
    ),
    (prompt(field_output="a"), "datasets[0].type.field_output", "changed", {f"{SOURCE}.response_column": "a"}),
    (prompt(no_input_format="{question}"), "datasets[0].type.no_input_format", "refused", {}),
    (prompt(field_instruction="q"), "datasets[0].type.field_instruction", "changed", {}),
    (
        {"datasets": [{"path": "org/data", "type": "completion", "field": "body"}]},
        "datasets[0].field",
        "translated",
        {f"{SOURCE}.text_column": "body"},
    ),
    (one(field="body"), "datasets[0].field", "dropped", {f"{SOURCE}.text_column": NOTHING}),
    (
        one(field_messages="conversations"),
        "datasets[0].field_messages",
        "translated",
        {f"{SOURCE}.messages_column": "conversations"},
    ),
    (one(field_messages="messages"), "datasets[0].field_messages", "default", {}),
    (
        one(message_property_mappings={"role": "from", "content": "value"}),
        "datasets[0].message_property_mappings.role",
        "translated",
        {f"{SOURCE}.message_keys": {"role": "from", "content": "value"}, f"{SOURCE}.roles": ROLES_THERE},
    ),
    (
        one(message_property_mappings={"role": "role", "content": "content"}),
        "datasets[0].message_property_mappings.content",
        "default",
        {f"{SOURCE}.message_keys": NOTHING},
    ),
    (
        one(message_field_role="from"),
        "datasets[0].message_field_role",
        "translated",
        {f"{SOURCE}.message_keys.role": "from"},
    ),
    (
        one(message_field_content="value"),
        "datasets[0].message_field_content",
        "translated",
        {f"{SOURCE}.message_keys": {"content": "value"}},
    ),
    (
        one(message_property_mappings={"role": "from"}, roles={"user": ["human"], "assistant": ["gpt", "bot"]}),
        "datasets[0].roles.assistant",
        "translated",
        {f"{SOURCE}.roles": {"user": ["human"], "assistant": ["gpt", "bot"]}},
    ),
    (one(roles={"user": ["user"]}), "datasets[0].roles.user", "default", {f"{SOURCE}.roles": NOTHING}),
    (
        one(field_thinking="thinking", template_thinking_key="reasoning"),
        "datasets[0].field_thinking",
        "translated",
        {f"{SOURCE}.message_keys": {"reasoning": "thinking"}},
    ),
    (
        one(field_thinking="thinking", template_thinking_key="thinking"),
        "datasets[0].template_thinking_key",
        "default",
        {},
    ),
    (
        one(drop_system_message=True),
        "datasets[0].drop_system_message",
        "translated",
        {f"{SOURCE}.drop_system_message": True},
    ),
    (one(roles_to_train=["assistant"]), "datasets[0].roles_to_train", "default", {f"{SOURCE}.loss_on": NOTHING}),
    (
        one(roles_to_train=["gpt", "human"]),
        "datasets[0].roles_to_train",
        "translated",
        {f"{SOURCE}.loss_on": ["assistant", "user"]},
    ),
    (one(roles_to_train=[]), "datasets[0].roles_to_train", "refused", {}),
    (one(train_on_eos="last"), "datasets[0].train_on_eos", "translated", {f"{SOURCE}.train_on_eos": "last"}),
    (one(train_on_eos="turn"), "datasets[0].train_on_eos", "default", {}),
    (one(train_on_eos="sometimes"), "datasets[0].train_on_eos", "refused", {f"{SOURCE}.train_on_eos": NOTHING}),
    (one(train_on_eot="turn"), "datasets[0].train_on_eot", "default", {}),
    (one(train_on_eot="all"), "datasets[0].train_on_eot", "refused", {}),
    (one(chat_template="llama3"), "datasets[0].chat_template", "translated", {"model.chat_template": "llama3"}),
    (
        {"chat_template": "chatml", **one(chat_template="llama3")},
        "datasets[0].chat_template",
        "refused",
        {},
    ),
    (
        one(chat_template="jinja", chat_template_jinja="chat.jinja"),
        "datasets[0].chat_template_jinja",
        "translated",
        {"model.chat_template": "chat.jinja"},
    ),
    (
        {"test_datasets": [{"path": "org/test", "type": "alpaca", "split": "test"}]},
        "test_datasets[0].split",
        "translated",
        {"data.eval[0]": {"dataset": "org/test", "format": "alpaca", "split": "test"}, "data.eval_size": NOTHING},
    ),
    ({"test_datasets": [{"path": "org/t", "type": "alpaca"}]}, "lora_r", "translated", {"data.eval[0].split": "test"}),
    ({"test_datasets": [{"path": "t.csv", "type": "alpaca"}]}, "lora_r", "translated", {"data.eval[0].split": NOTHING}),
    # data: lengths, targets, evaluation
    ({}, "lora_r", "translated", {"data.max_length": 512}),
    ({"sequence_len": "2048"}, "sequence_len", "translated", {"data.max_length": 2048}),
    ({"sequence_len": 1}, "sequence_len", "refused", {}),
    ({"excess_length_strategy": "truncate"}, "excess_length_strategy", "translated", {"data.overlong": "truncate"}),
    ({"excess_length_strategy": "raise"}, "excess_length_strategy", "translated", {"data.overlong": "error"}),
    ({"excess_length_strategy": "drop"}, "excess_length_strategy", "default", {"data.overlong": NOTHING}),
    (
        {**one(type="completion"), "excess_length_strategy": "truncate"},
        "excess_length_strategy",
        "dropped",
        {"data.overlong": "split"},
    ),
    ({"sample_packing": True}, "sample_packing", "translated", {"data.packing": True}),
    ({"sample_packing": False}, "sample_packing", "default", {"data.packing": NOTHING}),
    ({**EVALUATED, "eval_sample_packing": True}, "eval_sample_packing", "dropped", {}),
    ({"eval_sample_packing": False}, "eval_sample_packing", "default", {}),
    ({"pad_to_sequence_len": True}, "pad_to_sequence_len", "translated", {"data.pad_to_max_length": True}),
    ({"val_set_size": 0.05}, "val_set_size", "translated", {"data.eval_size": 0.05}),
    ({"val_set_size": "0.05"}, "val_set_size", "translated", {"data.eval_size": 0.05}),
    ({"val_set_size": 200}, "val_set_size", "translated", {"data.eval_size": 200}),
    ({"val_set_size": 200.0}, "val_set_size", "translated", {"data.eval_size": 200}),
    ({"val_set_size": 0.0}, "val_set_size", "default", {"data.eval_size": NOTHING, "evaluation": NOTHING}),
    ({"val_set_size": 1}, "val_set_size", "refused", {}),
    (
        {"val_set_size": 0.1, "test_datasets": [{"path": "org/test", "type": "chat_template"}]},
        "val_set_size",
        "refused",
        {},
    ),
    ({**one(type="alpaca"), "train_on_inputs": True}, "train_on_inputs", "translated", {f"{SOURCE}.loss_on": "all"}),
    ({"train_on_inputs": True}, "train_on_inputs", "changed", {f"{SOURCE}.loss_on": "all"}),
    ({"train_on_inputs": False}, "train_on_inputs", "default", {f"{SOURCE}.loss_on": NOTHING}),
    ({"shuffle_merged_datasets": True}, "shuffle_merged_datasets", "default", {"data.shuffle": NOTHING}),
    ({"shuffle_merged_datasets": False}, "shuffle_merged_datasets", "dropped", {"data.shuffle": NOTHING}),
    ({**EVALUATED, "shuffle_merged_datasets": False}, "shuffle_merged_datasets", "dropped", {"data.shuffle": NOTHING}),
    (
        {"shuffle_merged_datasets": False, "curriculum_sampling": True},
        "shuffle_merged_datasets",
        "translated",
        {"data.shuffle": False},
    ),
    ({"curriculum_sampling": True}, "curriculum_sampling", "translated", {"data.shuffle": False}),
    ({**TWO, "curriculum_sampling": True}, "curriculum_sampling", "changed", {"data.shuffle": False}),
    (
        {**TWO, "curriculum_sampling": True, "shuffle_merged_datasets": False},
        "curriculum_sampling",
        "translated",
        {"data.shuffle": False},
    ),
    # adapter
    ({"lora_r": "64"}, "lora_r", "translated", {"adapter.r": 64}),
    ({"lora_r": -1}, "lora_r", "refused", {"adapter.r": 8}),
    ({"lora_r": NOTHING, "lora_alpha": NOTHING}, "adapter", "translated", {"adapter.r": 8, "adapter.alpha": 8}),
    ({"lora_alpha": 16}, "lora_alpha", "translated", {"adapter.alpha": 16}),
    ({"lora_dropout": 0.05}, "lora_dropout", "translated", {"adapter.dropout": 0.05}),
    ({"lora_dropout": 0.0}, "lora_dropout", "default", {"adapter.dropout": NOTHING}),
    ({"lora_dropout": 1.5}, "lora_dropout", "refused", {"adapter.dropout": NOTHING}),
    ({"lora_target_linear": True}, "lora_target_linear", "translated", {"adapter.targets": "all-linear"}),
    (
        {"lora_target_linear": None, "lora_target_modules": ["q_proj", "v_proj"]},
        "lora_target_modules",
        "translated",
        {"adapter.targets": ["q_proj", "v_proj"]},
    ),
    (
        {"lora_target_linear": False, "lora_target_modules": r"model\.layers\.[\d]+\.q_proj"},
        "lora_target_modules",
        "translated",
        {"adapter.targets": r"model\.layers\.[\d]+\.q_proj"},
    ),
    (
        {"lora_target_modules": ["lm_head"]},
        "lora_target_modules",
        "translated",
        {"adapter.targets": ["all-linear", "lm_head"]},
    ),
    (
        {"lora_target_modules": r"layers\.\d+\.q_proj"},
        "lora_target_modules",
        "dropped",
        {"adapter.targets": "all-linear"},
    ),
    ({"lora_target_modules": None}, "lora_target_modules", "default", {"adapter.targets": "all-linear"}),
    (
        {"lora_target_parameters": ["mlp.experts.gate_up_proj"]},
        "lora_target_parameters",
        "translated",
        {"adapter.target_parameters": ["mlp.experts.gate_up_proj"]},
    ),
    (
        {"lora_modules_to_save": ["lm_head"]},
        "lora_modules_to_save",
        "translated",
        {"adapter.modules_to_save": ["lm_head"]},
    ),
    ({"lora_model_dir": "./old"}, "lora_model_dir", "translated", {"adapter.start_from": "./old"}),
    ({"lora_fan_in_fan_out": False}, "lora_fan_in_fan_out", "default", {}),
    ({"lora_fan_in_fan_out": True}, "lora_fan_in_fan_out", "dropped", {}),
    ({"peft_use_dora": True}, "peft_use_dora", "translated", {"adapter.use_dora": True}),
    ({"peft_use_rslora": True}, "peft_use_rslora", "translated", {"adapter.use_rslora": True}),
    ({"peft_init_lora_weights": True}, "peft_init_lora_weights", "default", {"adapter.init": NOTHING}),
    ({"peft_init_lora_weights": "pissa"}, "peft_init_lora_weights", "translated", {"adapter.init": "pissa"}),
    ({"peft_init_lora_weights": "pissa_niter_16"}, "peft_init_lora_weights", "changed", {"adapter.init": "pissa"}),
    ({"peft_init_lora_weights": "eva"}, "peft_init_lora_weights", "refused", {}),
    ({"loraplus_lr_ratio": 16}, "loraplus_lr_ratio", "translated", {"training.loraplus_lr_ratio": 16}),
    (
        {"adapter": "qlora", "load_in_4bit": True, "peft": {"loftq_config": {"loftq_bits": 4}}},
        "peft.loftq_config.loftq_bits",
        "changed",
        {"adapter.init": "loftq"},
    ),
    # training
    ({}, "micro_batch_size", "translated", {"training.micro_batch_size": 2, "training.batch_size": 8}),
    ({"micro_batch_size": NOTHING}, "gradient_accumulation_steps", "translated", {"training.batch_size": 4}),
    ({"micro_batch_size": 0}, "micro_batch_size", "refused", {}),
    (
        {"gradient_accumulation_steps": NOTHING, "batch_size": 6},
        "batch_size",
        "translated",
        {"training.batch_size": 6, "training.micro_batch_size": 2},
    ),
    ({"batch_size": 8}, "batch_size", "refused", {}),
    ({"batch_size": 8}, "gradient_accumulation_steps", "refused", {}),
    ({"learning_rate": "2e-5"}, "learning_rate", "translated", {"training.learning_rate": 2e-5}),
    ({"learning_rate": "fast"}, "learning_rate", "refused", {}),
    ({"learning_rate": 0}, "learning_rate", "refused", {}),
    ({"optimizer": "adamw_torch_fused"}, "optimizer", "translated", {"training.optimizer": "adamw"}),
    ({"optimizer": "adamw_torch"}, "optimizer", "translated", {"training.optimizer": "adamw"}),
    ({"optimizer": "adamw_bnb_8bit"}, "optimizer", "translated", {"training.optimizer": "adamw_8bit"}),
    ({"optimizer": "adamw_8bit"}, "optimizer", "translated", {"training.optimizer": "adamw_8bit"}),
    ({"optimizer": "paged_adamw_8bit"}, "optimizer", "translated", {"training.optimizer": "paged_adamw_8bit"}),
    ({"optimizer": "paged_adamw_32bit"}, "optimizer", "translated", {"training.optimizer": "paged_adamw"}),
    ({"optimizer": "adamw_torch_8bit"}, "optimizer", "changed", {"training.optimizer": "adamw_8bit"}),
    ({"optimizer": "adamw_torch_4bit"}, "optimizer", "changed", {"training.optimizer": "adamw_8bit"}),
    ({"optimizer": "muon"}, "optimizer", "refused", {}),
    ({"optim_args": {"beta3": 0.1}}, "optim_args.beta3", "dropped", {}),
    ({"optim_args": "beta3=0.1"}, "optim_args", "dropped", {}),
    ({"optimizer": "muon", "optim_args": {"x": 1}}, "optim_args.x", "refused", {}),
    (
        {"lr_scheduler": "cosine"},
        "lr_scheduler",
        "translated",
        {"training.schedule": "cosine", "training.warmup_ratio": 0.03},
    ),
    ({"lr_scheduler": "linear"}, "lr_scheduler", "translated", {"training.schedule": "linear"}),
    (
        {"lr_scheduler": "constant", "warmup_ratio": 0.1},
        "warmup_ratio",
        "dropped",
        {"training.schedule": "constant", "training.warmup_steps": 0, "training.warmup_ratio": NOTHING},
    ),
    (
        {"lr_scheduler": "constant_with_warmup", "warmup_ratio": 0.1},
        "warmup_ratio",
        "translated",
        {"training.schedule": "constant", "training.warmup_ratio": 0.1},
    ),
    ({"lr_scheduler": "rex"}, "lr_scheduler", "refused", {}),
    (
        {"warmup_steps": 10},
        "warmup_steps",
        "translated",
        {"training.warmup_steps": 10, "training.warmup_ratio": NOTHING},
    ),
    ({"warmup_steps": 0.1}, "warmup_steps", "refused", {}),
    ({"warmup_steps": 10, "warmup_ratio": 0.1}, "warmup_steps", "refused", {}),
    ({"warmup_steps": 10, "warmup_ratio": 0.1}, "warmup_ratio", "refused", {}),
    ({"warmup_steps": 10, "max_steps": 10}, "warmup_steps", "refused", {}),
    ({"cosine_min_lr_ratio": 0.1}, "cosine_min_lr_ratio", "translated", {"training.min_lr_ratio": 0.1}),
    ({"cosine_min_lr_ratio": 0.1, "lr_scheduler": "linear"}, "cosine_min_lr_ratio", "dropped", {}),
    ({"weight_decay": 0.01}, "weight_decay", "translated", {"training.weight_decay": 0.01}),
    ({"weight_decay": 0}, "weight_decay", "default", {"training.weight_decay": NOTHING}),
    ({"adam_beta1": 0.8}, "adam_beta1", "translated", {"training.beta1": 0.8}),
    ({"adam_beta2": "0.95"}, "adam_beta2", "translated", {"training.beta2": 0.95}),
    ({"adam_epsilon": "1e-5"}, "adam_epsilon", "translated", {"training.eps": 1e-5}),
    ({"num_epochs": 3}, "num_epochs", "translated", {"training.epochs": 3}),
    (
        {"num_epochs": 3, "max_steps": 50},
        "num_epochs",
        "dropped",
        {"training.max_steps": 50, "training.epochs": NOTHING},
    ),
    ({"max_steps": -1}, "max_steps", "default", {"training.max_steps": NOTHING}),
    ({"max_grad_norm": 0.3}, "max_grad_norm", "translated", {"training.max_grad_norm": 0.3}),
    ({"max_grad_norm": 0}, "max_grad_norm", "translated", {"training.max_grad_norm": math.inf}),
    ({"max_grad_norm": 1.0}, "max_grad_norm", "default", {}),
    ({"seed": 7}, "seed", "translated", {"training.seed": 7}),
    ({"seed": 42}, "seed", "default", {}),
    ({"bf16": "auto"}, "bf16", "default", {"training.precision": NOTHING}),
    ({"bf16": True}, "bf16", "translated", {"training.precision": "bf16"}),
    ({"bf16": "full"}, "bf16", "translated", {"training.precision": "bf16"}),
    ({"bf16": False}, "bf16", "translated", {"training.precision": "fp32"}),
    ({"bf16": False, "fp16": True}, "fp16", "changed", {"training.precision": "auto"}),
    ({"bf16": True, "fp16": True}, "fp16", "dropped", {"training.precision": "bf16"}),
    ({"bfloat16": True}, "bfloat16", "translated", {"training.precision": "bf16"}),
    ({"float16": False}, "float16", "default", {}),
    ({"tf32": True}, "tf32", "translated", {"training.tf32": True}),
    ({"tf32": "auto"}, "tf32", "translated", {"training.tf32": True}),
    ({"tf32": False}, "tf32", "default", {"training.tf32": NOTHING}),
    (
        {"gradient_checkpointing": True},
        "gradient_checkpointing",
        "translated",
        {"training.activation_checkpointing": True},
    ),
    ({"gradient_checkpointing": False}, "gradient_checkpointing", "default", {}),
    (
        {"gradient_checkpointing": "offload"},
        "gradient_checkpointing",
        "translated",
        {"training.activation_checkpointing": "offload"},
    ),
    (
        {"gradient_checkpointing": "unsloth"},
        "gradient_checkpointing",
        "translated",
        {"training.activation_checkpointing": "offload"},
    ),
    ({"gradient_checkpointing": "offload_disk"}, "gradient_checkpointing", "refused", {}),
    (
        {"gradient_checkpointing": True, "activation_offloading": True},
        "activation_offloading",
        "changed",
        {"training.activation_checkpointing": "offload"},
    ),
    (
        {"gradient_checkpointing": True, "activation_offloading": "hidden_states"},
        "activation_offloading",
        "translated",
        {"training.activation_checkpointing": "offload"},
    ),
    ({"activation_offloading": False}, "activation_offloading", "default", {}),
    ({"torch_compile": True}, "torch_compile", "translated", {"training.compile": True}),
    ({"torch_compile": "auto"}, "torch_compile", "translated", {"training.compile": True}),
    ({"torch_compile": True, "torch_compile_backend": "inductor"}, "torch_compile_backend", "default", {}),
    ({"torch_compile": True, "torch_compile_backend": "eager"}, "torch_compile_backend", "refused", {}),
    # how often
    (
        {"saves_per_epoch": 4},
        "saves_per_epoch",
        "translated",
        {"checkpoint.per_epoch": 4, "checkpoint.every_steps": NOTHING},
    ),
    (
        {"saves_per_epoch": 2, "num_epochs": 2, "max_steps": 100},
        "saves_per_epoch",
        "translated",
        {"checkpoint.every_steps": 25, "checkpoint.per_epoch": NOTHING},
    ),
    ({"saves_per_epoch": 1, "max_steps": 100}, "saves_per_epoch", "translated", {"checkpoint.per_epoch": 1}),
    ({"saves_per_epoch": 0}, "saves_per_epoch", "dropped", {"checkpoint.per_epoch": 1}),
    ({"save_steps": 50}, "save_steps", "translated", {"checkpoint.every_steps": 50, "checkpoint.per_epoch": NOTHING}),
    ({"save_steps": 0.25, "max_steps": 100}, "save_steps", "translated", {"checkpoint.every_steps": 25}),
    ({"save_steps": 0.25, "num_epochs": 2}, "save_steps", "translated", {"checkpoint.per_epoch": 2}),
    ({"save_steps": 0.3}, "save_steps", "refused", {}),
    ({"save_steps": 50, "saves_per_epoch": 1}, "save_steps", "refused", {}),
    ({"save_steps": 50, "saves_per_epoch": 1}, "saves_per_epoch", "refused", {}),
    ({"save_strategy": "epoch"}, "save_strategy", "translated", {"checkpoint.per_epoch": 1}),
    ({"save_strategy": "no"}, "save_strategy", "default", {"checkpoint.per_epoch": NOTHING}),
    ({"save_strategy": False}, "save_strategy", "default", {"checkpoint.per_epoch": NOTHING}),
    ({"save_strategy": "steps", "save_steps": 5}, "save_strategy", "default", {"checkpoint.every_steps": 5}),
    ({"save_strategy": "best"}, "save_strategy", "refused", {}),
    ({}, "adapter", "translated", {"checkpoint.per_epoch": 1, "checkpoint.keep": 4}),
    ({"save_total_limit": 3}, "save_total_limit", "translated", {"checkpoint.keep": 3}),
    ({"save_total_limit": 1}, "save_total_limit", "changed", {"checkpoint.keep": 2}),
    (
        {**EVALUATED, "evals_per_epoch": 4},
        "evals_per_epoch",
        "translated",
        {"evaluation": {"per_epoch": 4, "at_start": True, "batch_size": 2}},
    ),
    ({"val_set_size": 0, "evals_per_epoch": 4}, "evals_per_epoch", "default", {"evaluation": NOTHING}),
    ({**EVALUATED, "evals_per_epoch": 0}, "evals_per_epoch", "translated", {"evaluation.at_end": False}),
    ({**EVALUATED, "eval_steps": 100}, "eval_steps", "translated", {"evaluation.every_steps": 100}),
    ({**EVALUATED, "eval_steps": 0.1, "max_steps": 50}, "eval_steps", "translated", {"evaluation.every_steps": 5}),
    ({**EVALUATED, "eval_strategy": "epoch"}, "eval_strategy", "translated", {"evaluation.per_epoch": 1}),
    ({**EVALUATED, "eval_strategy": "no"}, "eval_strategy", "translated", {"evaluation.at_end": False}),
    (
        {**EVALUATED, "eval_strategy": "steps", "eval_steps": 9},
        "eval_strategy",
        "default",
        {"evaluation.every_steps": 9},
    ),
    ({**EVALUATED, "evaluation_strategy": "epoch"}, "evaluation_strategy", "translated", {"evaluation.per_epoch": 1}),
    (
        {**EVALUATED, "evaluation_strategy": "epoch", "eval_strategy": "no"},
        "evaluation_strategy",
        "refused",
        {},
    ),
    ({**EVALUATED, "eval_batch_size": 1}, "eval_batch_size", "translated", {"evaluation.batch_size": 1}),
    ({"eval_batch_size": 1}, "eval_batch_size", "default", {"evaluation": NOTHING}),
    ({"logging_steps": 1}, "logging_steps", "translated", {"logging.every_steps": 1}),
    # the run
    ({"output_dir": "./out"}, "output_dir", "translated", {"output.dir": "./out"}),
    ({"resume_from_checkpoint": "./out/c"}, "resume_from_checkpoint", "dropped", {}),
    ({"resume_from_checkpoint": None}, "resume_from_checkpoint", "default", {}),
    ({"auto_resume_from_checkpoints": True}, "auto_resume_from_checkpoints", "dropped", {}),
    ({"save_safetensors": True}, "save_safetensors", "default", {}),
    ({"save_safetensors": False}, "save_safetensors", "dropped", {}),
    (
        {"fsdp_config": {"activation_checkpointing": True}},
        "fsdp_config.activation_checkpointing",
        "translated",
        {"training.activation_checkpointing": True},
    ),
    (
        {"fsdp_config": {"fsdp_activation_checkpointing": True}, "gradient_checkpointing": "offload"},
        "fsdp_config.fsdp_activation_checkpointing",
        "translated",
        {"training.activation_checkpointing": "offload"},
    ),
    ({"fsdp_config": {"offload_params": False}}, "fsdp_config.offload_params", "default", {}),
    (
        {"fsdp_config": {"fsdp_offload_params": True}},
        "fsdp_config.fsdp_offload_params",
        "translated",
        {"distributed.cpu_offload": True},
    ),
    ({"fsdp": "full_shard auto_wrap offload"}, "fsdp", "translated", {"distributed.cpu_offload": True}),
    ({"fsdp": ["full_shard", "offload"]}, "fsdp", "translated", {"distributed.cpu_offload": True}),
    ({"fsdp": ["full_shard", "auto_wrap"]}, "fsdp", "dropped", {}),
    ({"fsdp": []}, "fsdp", "default", {}),
    ({"fsdp_config": {"reshard_after_forward": True}}, "fsdp_config.reshard_after_forward", "default", {}),
    ({"fsdp_config": {"reshard_after_forward": False}}, "fsdp_config.reshard_after_forward", "dropped", {}),
    ({"fsdp_config": {"reshard_after_forward": "FULL_SHARD"}}, "fsdp_config.reshard_after_forward", "dropped", {}),
    ({"fsdp_version": 2}, "fsdp_version", "default", {}),
    ({"fsdp_version": 1}, "fsdp_version", "dropped", {}),
    ({"ddp_timeout": 7200}, "ddp_timeout", "translated", {"distributed.timeout": 7200}),
    ({"ddp_timeout": 0}, "ddp_timeout", "default", {}),
    ({"dp_shard_size": 4}, "dp_shard_size", "dropped", {}),
    ({"world_size": 4}, "world_size", "dropped", {}),
    ({"fsdp_config": {"fsdp_ofload_params": True}}, "fsdp_config.fsdp_ofload_params", "unrecognised", {}),
    ({"fsdp_config": None}, "fsdp_config", "default", {}),
    ({"deepspeed": "zero3_bf16.json"}, "deepspeed", "refused", {}),
    ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed.zero_optimization.stage", "refused", {}),
    ({"deepspeed": None}, "deepspeed", "default", {}),
    ({"tensor_parallel_size": 1}, "tensor_parallel_size", "default", {}),
    ({"context_parallel_size": 2}, "context_parallel_size", "refused", {}),
    ({"expert_parallel_size": 2}, "expert_parallel_size", "refused", {}),
    ({"sequence_parallel_degree": 2}, "sequence_parallel_degree", "refused", {}),
    ({"plugins": ["axolotl.integrations.liger.LigerPlugin"]}, "plugins", "dropped", {}),
    ({"plugins": ["axolotl.integrations.kd.KDPlugin"]}, "plugins", "refused", {}),
]

QUANTIZED = [
    ({"adapter": "qlora"}, "adapter", "changed", {"quantization": {"backend": "bnb", "weight_dtype": "nf4"}}),
    (
        {"adapter": "qlora", "load_in_4bit": True, "load_in_8bit": False},
        "load_in_4bit",
        "changed",
        {"quantization": {"backend": "bnb", "weight_dtype": "nf4"}},
    ),
    ({"adapter": "qlora", "load_in_8bit": False}, "load_in_8bit", "default", {}),
    (
        {"load_in_8bit": "true"},
        "load_in_8bit",
        "changed",
        {"quantization": {"backend": "bnb", "weight_dtype": "int8"}},
    ),
    ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit", "refused", {"quantization": NOTHING}),
    ({"load_in_4bit": False}, "load_in_4bit", "default", {"quantization": NOTHING}),
    (
        {"model_quantization_config": {"backend": "torchao", "weight_dtype": "int4", "group_size": 64}},
        "model_quantization_config.group_size",
        "translated",
        {"quantization": {"backend": "torchao", "weight_dtype": "int4", "group_size": 64}},
    ),
    (
        {"model_quantization_config": {"torchao": {"weight_dtype": "int4"}}},
        "model_quantization_config.torchao.weight_dtype",
        "changed",
        {"quantization": {"backend": "torchao", "weight_dtype": "int4", "group_size": 128}},
    ),
    (
        {"model_quantization_config": {"bnb": {"weight_dtype": None}}},
        "model_quantization_config.bnb.weight_dtype",
        "translated",
        {"quantization": {"backend": "bnb", "weight_dtype": "nf4"}},
    ),
    (
        {"model_quantization_config": {"torchao": {"weight_dtype": "int4", "group_size": None}}},
        "model_quantization_config.torchao.group_size",
        "default",
        {"quantization": {"backend": "torchao", "weight_dtype": "int4", "group_size": 128}},
    ),
    (
        {"model_quantization_config": "Mxfp4Config"},
        "model_quantization_config",
        "translated",
        {"quantization": {"backend": "mxfp4"}},
    ),
    (
        {
            "model_quantization_config": "FineGrainedFP8Config",
            "model_quantization_config_kwargs": {"modules_to_not_convert": ["lm_head"]},
        },
        "model_quantization_config_kwargs.modules_to_not_convert",
        "translated",
        {"quantization": {"backend": "fp8", "skip": ["lm_head"]}},
    ),
    (
        {"peft": {"backend": "torchao", "weight_dtype": "int8"}},
        "peft.weight_dtype",
        "translated",
        {"quantization.backend": "torchao", "quantization.weight_dtype": "int8"},
    ),
    ({"peft": {"backend": "torchao", "weight_dtype": "int4", "group_size": 32}}, "peft.group_size", "translated", {}),
    ({"peft": {"backend": "torchao", "weight_dtype": "int4"}}, "peft.backend", "changed", {}),
    (
        {"adapter": "qlora", "bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}},
        "bnb_config_kwargs.bnb_4bit_use_double_quant",
        "translated",
        {"quantization.double_quant": False},
    ),
    (
        {"load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_compute_dtype": "float32"}},
        "bnb_config_kwargs.bnb_4bit_compute_dtype",
        "translated",
        {"training.precision": "fp32", "quantization": {"backend": "bnb", "weight_dtype": "nf4"}},
    ),
    (
        {"load_in_4bit": True, "bf16": "auto", "bnb_config_kwargs": {"bnb_4bit_compute_dtype": "bfloat16"}},
        "bf16",
        "default",
        {"training.precision": "bf16"},
    ),
    (
        {"load_in_4bit": True, "bnb_config_kwargs": {"llm_int8_threshold": 6.0}},
        "bnb_config_kwargs.llm_int8_threshold",
        "dropped",
        {"quantization": {"backend": "bnb", "weight_dtype": "nf4"}},
    ),
    (
        {"adapter": "qlora", "bnb_config_kwargs": {"bnb_4bit_quant_storage": "bfloat16"}},
        "bnb_config_kwargs.bnb_4bit_quant_storage",
        "dropped",
        {"quantization": {"backend": "bnb", "weight_dtype": "nf4"}},
    ),
    (
        {"bnb_config_kwargs": {"load_in_4bit": True, "load_in_8bit": False}},
        "bnb_config_kwargs.load_in_4bit",
        "changed",
        {"quantization": {"backend": "bnb", "weight_dtype": "nf4"}},
    ),
    (
        {"adapter": "qlora", "quantize_moe_experts": True},
        "quantize_moe_experts",
        "translated",
        {"quantization.experts": True},
    ),
    (
        {"adapter": "qlora", "quantize_moe_experts": False},
        "quantize_moe_experts",
        "translated",
        {"quantization.experts": False},
    ),
    ({"adapter": "qlora", "merge_lora": True}, "merge_lora", "refused", {}),
    ({"merge_lora": False}, "merge_lora", "default", {}),
    ({"adapter": "qlora", "gptq": True}, "gptq", "refused", {}),
    ({"gptq": False}, "gptq", "default", {}),
    ({"fp8": True}, "fp8", "refused", {}),
    ({"relora": True}, "relora", "refused", {}),
    ({"adapter": "qlora", "qat": {"weight_dtype": "int4"}}, "qat.weight_dtype", "refused", {}),
    (
        {"adapter": "lora", "qat": {"weight_dtype": "int4"}},
        "qat.weight_dtype",
        "changed",
        {"quantization.weight_dtype": "int4", "quantization.group_size": 32, "training.qat.fake_quant_after_steps": 0},
    ),
    (
        {"adapter": "lora", "qat": {"weight_dtype": "INT4"}},
        "qat.weight_dtype",
        "changed",
        {"quantization.weight_dtype": "int4", "quantization.group_size": 32},
    ),
    (
        {"adapter": "lora", "lora_dropout": 0.05, "qat": {"weight_dtype": "int4"}},
        "lora_dropout",
        "changed",
        {"adapter.dropout": NOTHING},
    ),
    *(
        ({"adapter": NOTHING, key: value, "qat": {"weight_dtype": "int4"}}, key, "dropped", {to: NOTHING})
        for key, value, to in (
            ("lora_r", 16, "adapter.r"),
            ("lora_dropout", 0.05, "adapter.dropout"),
            ("peft_use_dora", True, "adapter.use_dora"),
            ("loraplus_lr_ratio", 16, "training.loraplus_lr_ratio"),
        )
    ),
    (
        {"adapter": "lora", "peft_init_lora_weights": "loftq", "qat": {"weight_dtype": "int4"}},
        "peft_init_lora_weights",
        "changed",
        {"adapter.init": NOTHING},
    ),
    (
        {"adapter": "lora", "max_steps": 9, "qat": {"weight_dtype": "int4", "fake_quant_after_n_steps": 9}},
        "qat.fake_quant_after_n_steps",
        "refused",
        {},
    ),
    (
        {"adapter": "lora", "torch_compile": True, "qat": {"weight_dtype": "int4"}},
        "torch_compile",
        "changed",
        {"training.compile": NOTHING},
    ),
    (
        {"adapter": NOTHING, "qat": {"weight_dtype": "nvfp4", "group_size": 16, "fake_quant_after_n_steps": 9}},
        "qat.weight_dtype",
        "changed",
        {"adapter.type": "full", "training.qat.fake_quant_after_steps": 9},
    ),
    (
        {"adapter": "lora", "qat": {"weight_dtype": "int8", "activation_dtype": "int8"}},
        "qat.activation_dtype",
        "translated",
        {"training.qat.activation_dtype": "int8"},
    ),
    (
        {"adapter": "lora", "qat": {"weight_dtype": "int4", "activation_dtype": "int8"}},
        "qat.activation_dtype",
        "refused",
        {},
    ),
    ({"adapter": "lora", "qat": {"weight_dtype": "int3"}}, "qat.weight_dtype", "refused", {}),
    (
        {"adapter": "lora", "qat": {"weight_dtype": "int4", "group_size": 64}},
        "qat.group_size",
        "translated",
        {"quantization.group_size": 64},
    ),
    ({"adapter": "lora", "qat": {"weight_dtype": "mxfp4", "group_size": 32}}, "qat.group_size", "dropped", {}),
    (
        {"adapter": "lora", "qat": {"weight_dtype": "int8", "fake_quant_after_n_steps": 5}},
        "qat.fake_quant_after_n_steps",
        "translated",
        {"training.qat.fake_quant_after_steps": 5},
    ),
    (
        {"adapter": "lora", "qat": {"weight_dtype": "int4", "quantize_embedding": True}},
        "qat.quantize_embedding",
        "refused",
        {},
    ),
    ({"quantization": {"weight_dtype": "int4"}}, "quantization.weight_dtype", "refused", {"quantization": NOTHING}),
    ({"adapter": "ia3"}, "adapter", "refused", {}),
]


@pytest.mark.parametrize(("changes", "key", "outcome", "expected"), ROWS + QUANTIZED, ids=lambda one: str(one)[:60])
def test_a_key_becomes_what_it_means(changes, key, outcome, expected):
    migration = migrated(changes)
    entry = entry_of(migration, key)
    assert ("changed" if entry.changed else entry.outcome) == outcome, entry
    found = {where: holds(migration.document, where) for where in expected}
    assert found == expected
    assert bool(entry.to) == (entry.outcome == "translated") or (entry.changed and not entry.to)
    if entry.outcome in ("dropped", "refused") or entry.changed:
        assert entry.note
    if outcome not in ("refused", "unrecognised"):
        assert migration.report.ok, migration.report
        assert tomli.loads(migration.recipe) == migration.document
        recipe, findings = structure_recipe(migration.document, registry.options_of)
        assert not findings and not check(recipe)


TESTED = {re.sub(r"\[\d+\]", "[]", key) for _, key, _, _ in ROWS + QUANTIZED}


@pytest.mark.parametrize(
    "rule", [rule for rule in RULES if rule.treatment == "translate"], ids=lambda rule: rule.keys[0]
)
def test_every_translation_has_a_row(rule):
    below = tuple(key.rstrip("*") for key in rule.keys if key.endswith("*"))
    assert TESTED & set(rule.keys) or any(key.startswith(below) for key in TESTED if below)


def document_for(key, value):
    """The smallest document with a value under a key that is written as in the table."""
    first, *rest = key.replace("[]", ".[]").removesuffix(".**").removesuffix(".*").split(".")
    below = value if not key.endswith("*") else {"anything": value}
    for part in reversed(rest):
        below = [{"path": "org/data", "type": "chat_template", **below}] if part == "[]" else {part: below}
    return {first: below}


def leaf_of(key):
    text = key.replace("[]", "[0]")
    return f"{text.rstrip('*').rstrip('.')}.anything" if key.endswith("*") else text


@pytest.mark.parametrize("key", [key for key, rule in BY_KEY.items() if rule.treatment == "drop"])
def test_what_a_recipe_needs_none_of_is_dropped_with_the_reason(key):
    entry = entry_of(migrated(document_for(key, "x")), leaf_of(key))
    assert (entry.outcome, entry.note, entry.to) == ("dropped", BY_KEY[key].meaning, ())
    assert entry_of(migrated(document_for(key, None)), leaf_of(key)).outcome == "default"


@pytest.mark.parametrize("key", [key for key, rule in BY_KEY.items() if rule.treatment == "refuse"])
def test_what_quantune_has_nothing_for_is_refused_by_name_unless_it_is_off(key):
    migration = migrated(document_for(key, True))
    entry = entry_of(migration, leaf_of(key))
    assert entry.outcome == "refused" and entry.note and not migration.report.ok
    assert entry.key in migration.recipe and "NOT TRANSLATED" in migration.recipe
    for off in (None, False):
        assert entry_of(migrated(document_for(key, off)), leaf_of(key)).outcome == "default"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("load_in_4bits", "load_in_4bit"),
        ("lora_rank", "lora_r"),
        ("learning_rte", "learning_rate"),
        ("sequence_length", "sequence_len"),
        ("dataset", "datasets"),
        ("zzz", None),
    ],
)
def test_an_unknown_key_is_named_with_what_was_probably_meant(key, meant):
    migration = migrated({key: 1})
    entry = entry_of(migration, key)
    assert (entry.outcome, entry.note) == ("unrecognised", f'did you mean "{meant}"?' if meant else None)
    assert not migration.report.ok and key in migration.recipe


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("datasets[0].feild_messages", "field_messages"),
        ("datasets[0].splitt", "split"),
        ("fsdp_config.offload_param", "offload_params"),
        ("special_tokens.pad_tokens", "pad_token"),
    ],
)
def test_an_unknown_key_inside_a_table_is_compared_with_those_beside_it(key, meant):
    above, _, name = key.rpartition(".")
    changes = one(**{name: "x"}) if above == "datasets[0]" else {above: {name: "x"}}
    assert entry_of(migrated(changes), key).note == f'did you mean "{meant}"?'


@pytest.mark.parametrize("key", ["datasets[0].foo", "fsdp_config.x", "special_tokens.what"])
def test_what_an_unknown_key_stands_in_is_not_taken_for_a_likeness(key):
    above, _, name = key.rpartition(".")
    changes = one(**{name: "x"}) if above == "datasets[0]" else {above: {name: "x"}}
    assert entry_of(migrated(changes), key).note is None


@pytest.mark.parametrize(
    ("given", "key", "said"),
    [
        ({"zero_optimization": {"stage": 2}}, "deepspeed.zero_optimization.stage", "ZeRO 2 shards the optimizer and"),
        ({"zero_optimization": {"stage": 3}}, "deepspeed.zero_optimization.stage", "ZeRO 3 shards everything"),
        ({"zero_optimization": {"stage": "1"}, "bf16": True}, "deepspeed.bf16", "ZeRO 1 shards the optimizer;"),
        ({"bf16": True}, "deepspeed.bf16", None),
        ("deepspeed_configs/zero1.json", "deepspeed", "ZeRO 1"),
        ("deepspeed_configs/zero3_bf16.json", "deepspeed", "ZeRO 3"),
        ("examples/deepspeed/ds_z3_config.json", "deepspeed", "ZeRO 3"),
        ("ds.json", "deepspeed", None),
    ],
)
def test_a_stage_of_zero_is_refused_with_what_it_is_beside_quantune(given, key, said):
    entry = entry_of(migrated({"deepspeed": given}), key)
    assert entry.outcome == "refused" and entry.note.startswith("quantune has no DeepSpeed")
    assert said in entry.note if said else "ZeRO" not in entry.note
    assert entry.note.endswith("Leave it out")


def test_what_deepspeed_offloaded_is_offloaded_with_a_key_of_the_recipe():
    zero = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    entry = entry_of(migrated({"deepspeed": zero}), "deepspeed.zero_optimization.stage")
    assert entry.note.endswith("Leave it out, and write [distributed] cpu_offload = true")


def test_a_value_where_keys_belong_and_keys_where_a_value_belongs_are_refused():
    assert entry_of(migrated({"fsdp_config": "full_shard"}), "fsdp_config").outcome == "refused"
    assert entry_of(migrated({"lora_dropout": {"a": 1}}), "lora_dropout.a").outcome == "refused"
    assert entry_of(migrated({"datasets": "org/data"}), "datasets").outcome == "refused"
    assert entry_of(migrated({"datasets": ["org/data"]}), "datasets").outcome == "refused"


@pytest.mark.parametrize(
    ("changes", "key", "part"),
    [
        ({"adapter": NOTHING}, "adapter", "does not train all weights"),
        ({"adapter": None, "load_in_4bit": True}, "adapter", "the quantized base is frozen"),
        ({"lora_target_linear": None}, "lora_target_modules", "something for the adapter to adapt"),
        ({"base_model": NOTHING}, "base_model", "expected base_model"),
        ({"datasets": NOTHING}, "datasets", "expected datasets"),
        ({"datasets": [{"path": "org/data"}]}, "datasets[0].type", "expected type in datasets[0]"),
        ({"learning_rate": NOTHING}, "learning_rate", "expected learning_rate"),
    ],
)
def test_what_a_recipe_can_not_do_without_is_a_problem(changes, key, part):
    report = migrated(changes).report
    (problem,) = report.problems
    assert problem.where == key and part in problem.message and problem.hint
    assert not report.ok


@pytest.mark.parametrize("adapter", [{"adapter": None}, {"adapter": "ia3"}])
def test_what_is_no_lora_adapter_there_has_no_default_rank_there(adapter):
    migration = migrated({**adapter, "lora_r": NOTHING, "lora_alpha": NOTHING})
    assert not {"r", "alpha"} & migration.document["adapter"].keys()
    if adapter["adapter"] is None:
        (problem,) = migration.report.problems
        assert "but a LoRA adapter" in problem.message and "trains a LoRA adapter" in problem.hint


def test_each_key_of_a_prompt_says_what_it_has_a_part_in():
    prompts = {"field_instruction": "q", "field_input": "c", "field_output": "a", "format": "{instruction}: {input}"}
    migration = migrated(prompt(**prompts, no_input_format="{instruction}:"))
    said = {key: entry_of(migration, f"datasets[0].type.{key}") for key in (*prompts, "no_input_format")}
    assert {key: [to.rpartition(".")[2] for to in entry.to] for key, entry in said.items()} == {
        "field_instruction": ["format", "template", "template_no_input"],
        "field_input": ["template", "input_column"],
        "field_output": ["response_column"],
        "format": ["template"],
        "no_input_format": ["template_no_input"],
    }
    assert [key for key, entry in said.items() if entry.note] == ["field_instruction"]
    assert "column system of a row" in said["field_instruction"].note


def test_rows_held_out_without_shuffling_are_others_than_there():
    notes = [
        entry_of(migrated({**evaluated, "shuffle_merged_datasets": False}), "shuffle_merged_datasets").note
        for evaluated in ({}, EVALUATED)
    ]
    assert ["the last rows there" in note for note in notes] == [False, True]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"fsdp_config": {"offload_params": True, "fsdp_offload_params": False}}, "fsdp_config.offload_params"),
        ({"fsdp": "full_shard offload", "fsdp_config": {"offload_params": False}}, "fsdp"),
        ({"fsdp": ["offload"], "fsdp_config": {"offload_params": False}}, "fsdp_config.offload_params"),
    ],
)
def test_offloading_that_is_on_in_one_place_and_off_in_another_is_refused(changes, key):
    entry = entry_of(migrated(changes), key)
    assert entry.outcome == "refused" and "on in one place and off in another" in entry.note


def test_a_duplicate_key_is_a_problem_that_names_both_lines():
    text = yaml.safe_dump(BASE) + "lora_r: 8\n"
    report = migrate(text, "old.yaml").report
    (problem,) = report.problems
    first, second = [n for n, line in enumerate(text.splitlines(), 1) if line.startswith("lora_r:")]
    assert (problem.code, problem.line, problem.column) == ("QT201", second, 1)
    assert problem.message == f"lora_r stands in lines {first} and {second}"
    (twice,) = migrate("{base_model: x, base_model: y}").report.problems[:1]
    assert twice.message == "base_model stands twice in line 1"
    assert not report.ok


@pytest.mark.parametrize("bf16", [True, "auto"])
def test_a_compute_dtype_that_is_not_the_precision_is_refused_by_name(bf16):
    key = "bnb_config_kwargs.bnb_4bit_compute_dtype"
    changes = {"load_in_4bit": True, "bf16": bf16, "bnb_config_kwargs": {"bnb_4bit_compute_dtype": "float32"}}
    migration = migrated(changes)
    for one_key, other in ((key, "bf16"), ("bf16", key)):
        entry = entry_of(migration, one_key)
        assert entry.outcome == "refused" and other in entry.note
    assert entry_of(migration, "load_in_4bit").outcome == "translated"


@pytest.mark.parametrize(
    "changes",
    [
        {"load_in_4bit": True},
        {"adapter": "qlora"},
        {"adapter": "qlora", "load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}},
        {"model_quantization_config": {"torchao": {"weight_dtype": "int4", "group_size": 64}}},
        {"model_quantization_config": {"bnb": {}}},
        {"peft": {"backend": "torchao", "weight_dtype": "int4"}},
        {"load_in_4bit": True, "peft": {"backend": "bnb", "weight_dtype": "nf4"}},
    ],
)
def test_that_experts_are_packed_is_said_once(changes):
    migration = migrated(changes)
    (entry,) = [entry for entry in migration.report.entries if entry.changed]
    assert "fused experts" in entry.note and migration.recipe.count("fused experts") == 1
    assert entry.to and migration.report.ok
    told = migrated({**changes, "quantize_moe_experts": True}).report
    assert told.ok and not any(entry.changed for entry in told.entries)


def test_an_argument_becomes_the_key_that_it_says_and_no_other():
    given = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False, "llm_int8_skip_modules": ["lm_head"]}
    migration = migrated({"load_in_4bit": True, "bnb_config_kwargs": given, "quantize_moe_experts": True})
    assert {e.key.rpartition(".")[2]: e.to for e in migration.report.entries if "quantization" in str(e.to)} == {
        "load_in_4bit": ("quantization.backend",),
        "bnb_4bit_quant_type": ("quantization.weight_dtype",),
        "bnb_4bit_use_double_quant": ("quantization.double_quant",),
        "llm_int8_skip_modules": ("quantization.skip",),
        "quantize_moe_experts": ("quantization.experts",),
    }
    assert "# was: bnb_config_kwargs.bnb_4bit_use_double_quant\n" in migration.recipe


def test_a_key_that_falls_with_another_names_it():
    migration = migrated({"load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_compute_dtype": "float16"}})
    fault = "bnb_config_kwargs.bnb_4bit_compute_dtype"
    assert entry_of(migration, "load_in_4bit").note.startswith(f"{fault} is refused, and without it")
    assert entry_of(migration, fault).note.endswith("as bf16: true or false says where this key is left out")


@pytest.mark.parametrize(
    ("changes", "key", "way_out"),
    [
        ({"adapter": "qlora", "load_in_4bit": False}, "adapter", "or write adapter: lora"),
        ({"adapter": "qlora", "load_in_8bit": True}, "adapter", "write adapter: lora with load_in_8bit: true"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit", "keep one of them: load_in_4bit is nf4"),
        (
            {"adapter": "qlora", "peft": {"backend": "torchao", "weight_dtype": "int4"}},
            "adapter",
            "write adapter: lora",
        ),
        ({"model_quantization_config": "HqqConfig"}, "model_quantization_config", "backend: bnb, weight_dtype: nf4"),
        ({"model_quantization_config": {"x": 1}}, "model_quantization_config.x", "name it with its options"),
        (
            {"bnb_config_kwargs": {"bnb_4bit_use_double_quant": True}},
            "bnb_config_kwargs.bnb_4bit_use_double_quant",
            "add load_in_4bit: true",
        ),
        ({"quantize_moe_experts": True}, "quantize_moe_experts", "add load_in_4bit: true"),
        ({"model_quantization_config_kwargs": {"a": 1}}, "model_quantization_config_kwargs.a", "Mxfp4Config"),
        ({"model_quantization_config": {"bnb": {}, "fp8": {}}}, "model_quantization_config.bnb", "keep the backend"),
        ({"adapter": "qlora", "gptq": True}, "gptq", "with load_in_4bit: true, and remove gptq"),
        ({"adapter": "qlora", "fp8": True}, "fp8", "model_quantization_config: {backend: torchao"),
        ({"adapter": "qlora", "relora": True}, "relora", "a larger lora_r"),
    ],
)
def test_what_to_do_about_the_quantization_is_said_in_the_keys_of_a_yaml(changes, key, way_out):
    note = entry_of(migrated(changes), key).note
    assert way_out in note
    assert not re.search(r"\[(model|quantization|adapter|training)\]| = ", note)


def test_batches_are_counted_for_every_process():
    assert holds(migrated({}, processes=4).document, "training.batch_size") == 32
    given = migrated({"gradient_accumulation_steps": NOTHING, "batch_size": 8}, processes=4)
    assert holds(given.document, "training.batch_size") == 8
    assert entry_of(given, "batch_size").changed


@pytest.mark.parametrize(
    ("changes", "key", "where", "here", "elsewhere"),
    [
        ({"base_model": "./model"}, "base_model", "model.base", "./model", "../model"),
        ({"base_model": "org/model"}, "base_model", "model.base", "org/model", "org/model"),
        ({"tokenizer_config": "../t"}, "tokenizer_config", "model.tokenizer", "../t", "../../t"),
        ({"chat_template_jinja": "c.jinja"}, "chat_template_jinja", "model.chat_template", "c.jinja", "../c.jinja"),
        (
            {"chat_template": "jinja", "chat_template_jinja": "c.jinja"},
            "chat_template_jinja",
            "model.chat_template",
            "c.jinja",
            "../c.jinja",
        ),
        ({"lora_model_dir": "out"}, "lora_model_dir", "adapter.start_from", "out", "../out"),
        (one(path="a/b.jsonl"), "datasets[0].path", f"{SOURCE}.path", "a/b.jsonl", "../a/b.jsonl"),
        (one(path="cfg/b.jsonl"), "datasets[0].path", f"{SOURCE}.path", "cfg/b.jsonl", "./b.jsonl"),
        (one(path="/a/b.jsonl"), "datasets[0].path", f"{SOURCE}.path", "/a/b.jsonl", "/a/b.jsonl"),
        (one(path="~/b.jsonl"), "datasets[0].path", f"{SOURCE}.path", "~/b.jsonl", "~/b.jsonl"),
        (
            one(path="json", data_files=["b.jsonl"]),
            "datasets[0].data_files",
            f"{SOURCE}.path",
            "b.jsonl",
            "../b.jsonl",
        ),
    ],
)
def test_a_path_is_written_relative_to_the_recipe(changes, key, where, here, elsewhere):
    assert holds(migrated(changes).document, where) == here
    moved = migrated(changes, folder=Path.cwd() / "cfg")
    assert holds(moved.document, where) == elsewhere
    assert entry_of(moved, key).outcome == "translated" and bool(entry_of(moved, key).note) == (here != elsewhere)


def test_two_keys_that_write_different_things_to_one_place_are_refused_both():
    migration = migrated({"flash_attention": True, "sdp_attention": True})
    for key, other in (("flash_attention", "sdp_attention"), ("sdp_attention", "flash_attention")):
        entry = entry_of(migration, key)
        assert entry.outcome == "refused" and other in entry.note
    assert holds(migration.document, "model.attn_implementation") is NOTHING


def test_a_contradiction_of_the_recipe_is_reported_at_the_key_it_came_from():
    entry = entry_of(migrated({"lr_scheduler": "cosine", "warmup_ratio": 1.5}), "warmup_ratio")
    assert entry.outcome == "refused" and "training.warmup_ratio: must be at least 0" in entry.note


def test_what_toml_can_not_hold_is_refused():
    text = yaml.safe_dump(BASE) + "model_config:\n  blob: !!binary aGVsbG8=\n  many: !!set {a, b}\n"
    migration = migrate(text)
    assert entry_of(migration, "model_config.blob").outcome == "refused"
    assert entry_of(migration, "model_config.many").outcome == "refused"
    assert "config" not in migration.document["model"]


LLAMAFACTORY = (
    "model_name_or_path: org/model\nstage: sft\nfinetuning_type: lora\nquantization_bit: 4\ntemplate: llama3\n"
)
TORCHTUNE = "model:\n  _component_: torchtune.models.llama3.lora_llama3_8b\n  lora_rank: 8\nbatch_size: 2\n"


@pytest.mark.parametrize(("text", "kind"), [(LLAMAFACTORY, "llamafactory"), (TORCHTUNE, "torchtune")])
def test_another_tools_config_is_recognised_and_never_half_migrated(text, kind):
    migration = migrate(text)
    assert migration.report.kind == kind
    assert migration.document is None and migration.recipe is None
    assert {entry.outcome for entry in migration.report.entries} == {"refused"}
    assert sorted(entry.key for entry in migration.report.entries) == sorted(leaf_keys(yaml.safe_load(text)))
    (problem,) = migration.report.problems
    assert problem.code == "QT205" and "as yet" in problem.message


def test_axolotls_yaml_with_a_key_of_another_tool_is_still_axolotls():
    assert migrated({"finetuning_type": "lora", "quantization_bit": 4}).report.kind == "axolotl"


def test_unreadable_yaml_is_a_report_with_its_place():
    report = migrate("a: [1", "old.yaml").report
    (problem,) = report.problems
    assert (report.kind, report.ok, report.entries) == ("unreadable", False, ())
    assert (problem.code, problem.origin, problem.line) == ("QT200", "old.yaml", 1)


def test_the_recipe_reads_as_if_written_by_hand():
    changes = {
        "adapter": "lora",
        "val_set_size": 0.05,
        "evals_per_epoch": 2,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.1,
        "optimizer": "adamw_torch_8bit",
        "tf32": True,
        "wandb_project": "x",
        "strict": False,
        **one(field_messages="conversations", split="train[:10%]"),
    }
    recipe = migrated(changes, name="old.yaml").recipe
    assert recipe.partition("\n")[2] == (
        """
[model]
base = "org/model"  # was: base_model

[adapter]
type = "lora"           # was: adapter
r = 16                  # was: lora_r
alpha = 32              # was: lora_alpha
targets = "all-linear"  # was: lora_target_linear

[data]
eval_size = 0.05  # was: val_set_size
max_length = 512  # the default there

[[data.train]]
dataset = "org/data"               # was: path
split = "train[:10%]"
format = "chat"                    # was: type
messages_column = "conversations"  # was: field_messages
# the default there
roles = {user = ["human"], assistant = ["gpt"]}

[training]
# micro_batch_size x gradient_accumulation_steps x 1 process; --processes N if it ran in more
batch_size = 8       # was: micro_batch_size, gradient_accumulation_steps
micro_batch_size = 2
learning_rate = 0.0001
schedule = "cosine"  # was: lr_scheduler
warmup_ratio = 0.1
# bitsandbytes' 8-bit AdamW in place of torchao's
optimizer = "adamw_8bit"
tf32 = true

[evaluation]
per_epoch = 2    # was: evals_per_epoch
at_start = true  # the default there
batch_size = 2   # micro_batch_size, the default there

[checkpoint]
per_epoch = 1  # the default there
keep = 4       # the default there

# Left out, because a recipe needs none of it:
# - wandb_project: quantune sends nothing anywhere; metrics.jsonl in the run folder has every step
# - strict: it belongs to that tool's own commands
"""
    )


def test_a_key_that_holds_a_dot_is_no_path():
    for key in ("fsdp_config.version", "datasets[]", "bnb_config_kwargs.**"):
        assert entry_of(migrated({key: 2}), key).outcome == "unrecognised"


def test_nothing_of_the_recipe_imports_the_backends():
    for path in Path(quantune.recipe.__file__).parent.rglob("*.py"):
        assert not re.search(r"^\s*(from|import) quantune\.backends", path.read_text(), re.MULTILINE), path
