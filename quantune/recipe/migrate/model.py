"""Rules for the base model and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantune.recipe.migrate.rule import (
    Config,
    Leaf,
    Outcome,
    Rule,
    drop,
    dropped,
    path_value,
    refuse,
    refused,
    same,
    translate,
    write,
    write_path,
)
from quantune.recipe.migrate.rule import value as takes
from quantune.recipe.migrate.values import flag, names, text

TOKENIZER_DEFAULT = "tokenizer_default"
TEMPLATES = {
    "alpaca": ("alpaca", False),
    "chatml": ("chatml", False),
    "cohere": ("command_r", True),
    "deepseek_v3": ("deepseek_v3", True),
    "gemma": ("gemma", False),
    "llama3": ("llama3", False),
    "llama4": ("llama4", True),
    "mistral_v1": ("mistral", True),
    "mistral_v2v3": ("mistral_v3", True),
    "mistral_v3_tekken": ("mistral_tekken", True),
    "mistral_v7_tekken": ("mistral_v7", True),
    "phi_3": ("phi3", True),
    "phi_35": ("phi3", True),
    "qwen_25": ("qwen2_5", True),
}
"""Chat templates of that tool, quantune's template of the same format, and whether details may differ."""
OTHER_TEMPLATES = frozenset(
    "aya command_a command_a_rag command_a_tool_use deepseek_v2 exaone exaone4 falcon_h1 gemma3 gemma3n gemma4 "
    "gemma4_unified jamba llama3_2_vision llava metharme nemotron_h pixtral qwen2_vl qwen3 qwen3_5".split()
)
"""Chat templates of that tool for model families whose tokenizers carry their own."""

_ATTENTION = {
    "auto": "auto",
    "eager": "eager",
    "sdpa": "sdpa",
    "flash_attention_2": "flash_attention_2",
    "flash_attention_3": "flash_attention_3",
    "flex_attention": "flex_attention",
}
_ATTENTION_FLAGS = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "flex_attention": "flex_attention",
    "eager_attention": "eager",
    "xformers_attention": "xformers",
    "sage_attention": "sage",
}


def _is_folder(name: str) -> bool:
    """Whether a model or tokenizer is a folder by its name, and not of the hub."""
    return name.startswith(("./", "../"))


def _remote_code(leaf: Leaf) -> Outcome:
    if not flag(leaf.value):
        return same()
    note = "runs only with the flag --trust-remote-code as well"
    return write("model.trust_remote_code", True, note)


def _attention(leaf: Leaf) -> Outcome:
    return _attention_named(text(leaf.value))


def _attention_flag(leaf: Leaf) -> Outcome:
    return _attention_named(_ATTENTION_FLAGS[leaf.name]) if flag(leaf.value) else same()


def _attention_named(name: str) -> Outcome:
    path = "model.attn_implementation"
    if name in _ATTENTION:
        return write(path, _ATTENTION[name])
    if name == "xformers":
        return write(
            path, "sdpa", "PyTorch's attention has the same kernel, and the results are the same", changed=True
        )
    if "flash-attn" in name:
        version = "flash_attention_3" if "attn3" in name else "flash_attention_2"
        return write(path, version, f"the installed package in place of the kernel {name}", changed=True)
    return refuse(f'there is no attention "{name}" in quantune; leave it out, or choose {", ".join(_ATTENTION)}')


def template_of(config: Config, dataset: Mapping[Any, Any]) -> str:
    """The name of the chat template that a dataset is rendered with."""
    return str(dataset.get("chat_template") or config.get("chat_template") or TOKENIZER_DEFAULT)


def chat_template(leaf: Leaf) -> Outcome:
    """The rule for `chat_template`, of the run or of a dataset."""
    name, path = text(leaf.value), "model.chat_template"
    if name == TOKENIZER_DEFAULT:
        return same()
    if name == "jinja":
        return write(path, _jinja_of(leaf))
    if name.startswith("tokenizer_default_fallback_"):
        fallback = TEMPLATES.get(name.removeprefix("tokenizer_default_fallback_"), ("chatml", True))[0]
        note = f'the tokenizer\'s own template; write "{fallback}" if it has none'
        return Outcome(what="translated", note=note, changed=True)
    if name in TEMPLATES:
        ours, differs = TEMPLATES[name]
        own = "quantune's own writing of that format; compare a rendered sample"
        return write(path, ours, own if differs else None, changed=differs)
    if name in OTHER_TEMPLATES:
        note = "the tokenizer's own template, which may differ from that tool's of this name"
        return Outcome(what="translated", note=note, changed=True)
    return refuse(f'no chat template "{name}" is known; give a Jinja file as chat_template_jinja')


def chat_template_jinja(leaf: Leaf) -> Outcome:
    """The rule for `chat_template_jinja`, of the run or of a dataset."""
    given = text(leaf.value)
    if "{{" in given or "{%" in given or "\n" in given:
        return refuse(
            "the template stands in the YAML; put it into a file and name that: chat_template_jinja: chat.jinja"
        )
    return write_path(leaf, "model.chat_template", given)


def _jinja_of(leaf: Leaf) -> str:
    holder: Any = leaf.config.values
    for step in leaf.path[:-1]:
        holder = holder[step]
    given = holder.get("chat_template_jinja")
    return leaf.config.path(given) if isinstance(given, str) else "chat_template_jinja"


def _special_token(leaf: Leaf) -> Outcome:
    if leaf.name == "additional_special_tokens":
        return write("model.special_tokens.additional_special_tokens", names(leaf.value))
    return write(f"model.special_tokens.{leaf.name}", text(leaf.value))


def _pad_vocabulary(leaf: Leaf) -> Outcome:
    return write("model.pad_vocabulary_to_multiple_of", 32) if flag(leaf.value) else same()


def _new_rows(leaf: Leaf) -> Outcome:
    return same() if flag(leaf.value) else drop("new rows of the embeddings always begin at the mean of the old ones")


def _model_config(leaf: Leaf) -> Outcome:
    """One value; a list in which tables stand is written as a whole by each of them."""
    if leaf.config.given("model_config") and leaf.config.given("overrides_of_model_config"):
        return refuse("model_config and overrides_of_model_config say the same; keep one of them")
    keys, held = [], leaf.config.values[leaf.path[0]]
    for step in leaf.path[1:]:
        if isinstance(held, list):
            break
        keys.append(str(step))
        held = held[step]
    return write(("model", "config", *keys), held)


def _model_type(leaf: Leaf) -> Outcome:
    name = text(leaf.value)
    if "SequenceClassification" in name or "TokenClassification" in name:
        return refuse("quantune trains causal language models only")
    return drop("the class follows from the base's config.json")


def _base_config(leaf: Leaf) -> Outcome:
    if leaf.value == leaf.config.get("base_model"):
        return same()
    return refuse("quantune reads config.json from the base itself; change single values with model_config")


SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")

RULES: tuple[Rule, ...] = (
    path_value("base_model", "model.base", _is_folder),
    takes("revision_of_model", "model.revision", text),
    takes("model_revision", "model.revision", text),
    path_value("tokenizer_config", "model.tokenizer", _is_folder),
    translate("trust_remote_code", to="`model.trust_remote_code`, with a warning", by=_remote_code),
    translate("attn_implementation", to="`model.attn_implementation`", by=_attention),
    translate(*_ATTENTION_FLAGS, to="`model.attn_implementation`", by=_attention_flag),
    translate("chat_template", to="`model.chat_template`, or the tokenizer's own", by=chat_template),
    translate("chat_template_jinja", to="`model.chat_template`, if it is a file", by=chat_template_jinja),
    translate(
        *(f"special_tokens.{name}" for name in (*SPECIAL_TOKENS, "additional_special_tokens")),
        *(f"tokens.{name}" for name in SPECIAL_TOKENS),
        to="`model.special_tokens`",
        by=_special_token,
    ),
    takes("tokens", "model.added_tokens", names),
    translate("resize_token_embeddings_to_32x", to="`model.pad_vocabulary_to_multiple_of = 32`", by=_pad_vocabulary),
    translate("mean_resizing_embeddings", to="what quantune does anyway", by=_new_rows),
    translate("model_config.**", "overrides_of_model_config.**", to="`model.config`", by=_model_config),
    translate("model_type", "type_of_model", to="nothing: quantune trains causal language models", by=_model_type),
    translate("base_model_config", to="nothing, if it is the base", by=_base_config),
    dropped("eot_tokens", because="quantune reads the end of a turn off the chat template"),
    dropped(
        "tokenizer_type",
        "tokenizer_use_fast",
        "tokenizer_legacy",
        "tokenizer_save_jinja_files",
        because="the tokenizer's class follows from its files",
    ),
    dropped(
        "cls_model_config",
        "is_falcon_derived_model",
        "is_llama_derived_model",
        "is_mistral_derived_model",
        "is_qwen_derived_model",
        "base_model_ignore_patterns",
        because="the architecture follows from the base's config.json",
    ),
    refused(
        "added_tokens_overrides.*",
        "added_tokens_overrides",
        because="quantune adds tokens and does not rename reserved ones; list them under tokens",
    ),
    refused("shrink_embeddings", because="quantune never takes rows of the embeddings away"),
    refused("reinit_weights", because="quantune trains an adapter on a trained base"),
    refused("overrides_of_model_kwargs.**", "model_kwargs.**", because="loading has no further arguments in quantune"),
    refused("default_system_message", because="quantune adds no system message; put it into the data"),
    refused("chat_template_kwargs.**", because="quantune passes no further arguments to a chat template"),
    refused("tokenizer_use_mistral_common", because="quantune uses the tokenizer of transformers only"),
    refused(
        "processor_type",
        "processor_config",
        "processor_kwargs.**",
        "is_multimodal",
        "freeze_mm_modules",
        "image_size",
        "image_resize_algorithm",
        because="quantune trains on text only",
    ),
    refused("use_onebitllms", because="1.58-bit models aren't a backend of quantune"),
    refused(
        "scaling_softmax",
        "scaling_softmax_factor",
        "scaling_softmax_bias",
        "s2_attention",
        "rope_scaling",
        "rope_scaling.**",
        because="quantune leaves the attention as the base has it; rope_scaling is a key of model_config",
    ),
)
