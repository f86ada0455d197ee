"""The schema that editors read and the parser accept the same documents."""

from __future__ import annotations

import copy
import json
import random
from typing import Literal, get_args, get_origin, get_type_hints

import attrs
import pytest
import tomlkit
from jsonschema import Draft7Validator

from quantune.backends import registry
from quantune.recipe.json_schema import backend_schema, recipe_schema
from quantune.recipe.legacy import rewrite
from quantune.recipe.legacy.foreign import FOREIGN
from quantune.recipe.legacy.reading import KEYS, SECTIONS
from quantune.recipe.load import load_recipe, structure_recipe
from quantune.recipe.schema import QuantizationConfig, Recipe, SourceConfig, SpecialTokensConfig

SCHEMA = recipe_schema({name: backend_schema(name, registry.options_of(name)) for name in registry.BUILT_IN})
VALIDATOR = Draft7Validator(SCHEMA)
PLAIN = {
    "model": {"base": "builtin:mini"},
    "adapter": {},
    "data": {"train": [{"path": "train.jsonl", "format": "chat"}]},
}
STRINGS = ["", " ", "\u2003", "x", " x ", "auto", "all-linear", "chat", "nf4", "true", "0.5", "é", "a\nb"]
NUMBERS = [-(2**63), -1, 0, 1, 2, 3, 2**63 - 1, -1.5, 0.1, 0.5, 0.99, 1.5, 1e-300, float("inf"), float("-inf")]
LISTS = [[], ["x"], ["x", "y"], [""], ["x", " "], [1], [1, 2], [0.5], [True], [[]], [{}], ["x", 1], [["x"]]]
TABLES = [{}, {"x": "y"}, {"x": 1}, {"x": ["y"]}, {"x": [1]}, {"x": {}}, {"path": "a.csv", "format": "completion"}]
VALUES = [True, False, *STRINGS, *NUMBERS, *LISTS, *TABLES, [TABLES[-1]], [TABLES[-1], TABLES[0]]]


def parser_accepts(document):
    """What the parser says of each table by itself: QT016 is about several options together."""
    _, findings = structure_recipe(document, registry.options_of)
    return not [finding for finding in findings if finding.code != "QT016"]


def tables():
    """Every table of a recipe: where it is in a document that has it, and its class."""
    hints = get_type_hints(Recipe)
    for name, annotation in hints.items():
        cls = next(member for member in (annotation, *get_args(annotation)) if attrs.has(member))
        if cls is not QuantizationConfig:
            yield {**PLAIN, name: PLAIN.get(name, {})}, (name,), cls
    yield {**PLAIN, "model": {"base": "x", "special_tokens": {}}}, ("model", "special_tokens"), SpecialTokensConfig
    yield PLAIN, ("data", "train", 0), SourceConfig
    for backend in registry.BUILT_IN:
        options = registry.options_of(backend)
        required = {"weight_dtype": "int4"} if backend == "torchao" else {}
        for cls in (QuantizationConfig, options) if attrs.fields(options) else (QuantizationConfig,):
            yield {**PLAIN, "quantization": {"backend": backend, **required}}, ("quantization",), cls


def at(document, path):
    for part in path:
        document = document[part]
    return document


def literals(annotation):
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for member in get_args(annotation) for value in literals(member)]


def test_every_key_takes_the_same_values():
    accepted = refused = 0
    for document, path, cls in tables():
        hints = get_type_hints(cls)
        for field in attrs.fields(cls):
            for value in (*VALUES, *literals(hints[field.name])):
                changed = copy.deepcopy(document)
                at(changed, path)[field.name] = value
                verdict = parser_accepts(changed)
                assert VALIDATOR.is_valid(changed) == verdict, (path, field.name, value)
                accepted, refused = accepted + verdict, refused + (not verdict)
    assert accepted > 500 and refused > 3000


def test_the_same_keys_are_required_and_all_others_unknown():
    for document, path, cls in tables():
        assert VALIDATOR.is_valid(document) and parser_accepts(document)
        for field in attrs.fields(cls):
            changed = copy.deepcopy(document)
            at(changed, path).pop(field.name, None)
            assert VALIDATOR.is_valid(changed) == parser_accepts(changed), (path, field.name)
        for key in ("x", "Base", "", "options", "name ", cls.__name__):
            changed = copy.deepcopy(document)
            at(changed, path)[key] = "x"
            assert not VALIDATOR.is_valid(changed) and not parser_accepts(changed), (path, key)


def test_documents_changed_at_random_are_accepted_by_both_or_neither():
    randomly = random.Random(0)
    known = [(document, path, [field.name for field in attrs.fields(cls)]) for document, path, cls in tables()]
    verdicts = []
    for _ in range(3000):
        document, path, keys = randomly.choice(known)
        document = copy.deepcopy(document)
        for _ in range(randomly.randrange(4)):
            table = at(document, path)
            if isinstance(table, dict):
                table[randomly.choice(keys)] = randomly.choice(VALUES)
            if randomly.random() < 0.2:
                document[randomly.choice([*PLAIN, "training", "output", "x"])] = copy.deepcopy(randomly.choice(VALUES))
            if not isinstance(document.get(path[0]), dict) or path[-1] == 0:
                break
        if randomly.random() < 0.1:
            document.pop(randomly.choice(list(document)))
        verdicts.append(parser_accepts(document))
        assert VALIDATOR.is_valid(document) == verdicts[-1], document
    assert 500 < sum(verdicts) < 2500


def with_(section, **keys):
    return {**PLAIN, section: {**PLAIN.get(section, {}), **keys}}


@pytest.mark.parametrize(
    "document",
    [
        with_("adapter", r=16.0),
        with_("adapter", r=2**63),
        with_("training", learning_rate=float("nan")),
        with_("quantization", backend="bnb", block_size=48),
        with_("quantization", backend="torchao", weight_dtype="fp8", group_size=16),
        with_("training", max_steps=1, epochs=1),
        {**PLAIN, "data": {"train": [{"format": "chat"}]}},
    ],
)
def test_what_is_beyond_the_schema_is_left_to_the_parser(document, tmp_path):
    assert VALIDATOR.is_valid(document)
    (tmp_path / "recipe.toml").write_text(tomlkit.dumps(document))
    with pytest.raises(Exception, match="QT0"):
        load_recipe(tmp_path / "recipe.toml", options_of=registry.options_of)


def test_every_key_has_its_documentation_and_its_default():
    for document, path, cls in tables():
        node = SCHEMA
        for part in path:
            node = (
                SCHEMA["definitions"]["source"] if part == "train" else node if part == 0 else node["properties"][part]
            )
        if path == ("quantization",):
            node = SCHEMA["definitions"][f"quantization.{document['quantization']['backend']}"]
        for field in attrs.fields(cls):
            if field.name == "options":
                continue
            key = node["properties"][field.name]
            assert key["description"], (path, field.name)
            if isinstance(field.default, bool | int | float | str):
                assert key["default"] == field.default


OLDER = [
    {"adapter": "qlora"},
    {"adapter": {"type": "qlora"}},
    {"load_in_4bit": True},
    {"load_in_8bit": "False"},
    {"model_quantization_config": "Mxfp4Config", "model_quantization_config_kwargs": {"dequantize": False}},
    {"model_quantization_config": {"torchao": {"weight_dtype": "int4"}}},
    {"peft": {"backend": "bnb", "weight_dtype": "nf4"}},
    {"bnb_config_kwargs": {"bnb_4bit_quant_type": "nf4"}},
    {"quantize_moe_experts": True},
    {"quantization": {"backend": "fp8", "config_kwargs": {"weight_block_size": [128, 128]}}},
    {"load_in_4bit": True, "quantization": {"weight_dtype": "nf4", "skip": ["lm_head"]}},
    {"load_in_4bit": True, "quantization": {}},
    {"adapter": "qlora", "quantization": {"skip": ["lm_head"]}},
    {"adapter": {"load_in_4bit": "true"}, "quantization": {"quantize_moe_experts": True}},
    {"quantization": {"load_in_8bit": True}},
    {"model": {"base": "x", "peft": {"backend": "mxfp4", "weight_dtype": "mxfp4", "config_kwargs": {}}}},
    {"peft": {"backend": "torchao", "weight_dtype": "int4"}, "quantization": {"backend": "torchao"}},
    {"gptq": False, "merge_lora": "False", "qat": {}, "fp8": False, "relora": False},
]


@pytest.mark.parametrize("document", OLDER, ids=str)
def test_older_spellings_are_understood(document, tmp_path):
    document = {**PLAIN, **document}
    if document.get("quantize_moe_experts") or "bnb_config_kwargs" in document:
        document["load_in_4bit"] = True
    assert VALIDATOR.is_valid(document)
    (tmp_path / "recipe.toml").write_text(tomlkit.dumps(document))
    assert load_recipe(tmp_path / "recipe.toml", options_of=registry.options_of).warnings


def spelling(randomly):
    """An old key and a value that means something, or nearly so."""
    table = randomly.choice([{"backend": "bnb"}, {"backend": "torchao", "weight_dtype": "int4"}, {"backend": "fp8"}])
    classes = ["Mxfp4Config", "FineGrainedFP8Config"]
    values = {
        "load_in_4bit": [True, False, "true", " FALSE ", "no", 1],
        "load_in_8bit": [True, False],
        "quantize_moe_experts": [True, "false"],
        "peft": [table, {**table, "skip": ["x"]}, {"backend": "mxfp4", "weight_dtype": "mxfp4"}, {}],
        "bnb_config_kwargs": [{}, {"bnb_4bit_use_double_quant": True}, {"load_in_4bit": True}],
        "model_quantization_config": [*classes, table, {"torchao": {"weight_dtype": "int8"}}, {"mxfp4": {}}],
        "model_quantization_config_kwargs": [{}, {"dequantize": False}, {"weight_block_size": [64, 64]}],
    }
    assert values.keys() == set(KEYS)
    key = randomly.choice([*KEYS, "qlora", "off"])
    if key == "qlora":
        return randomly.choice([{"adapter": "qlora"}, {"adapter": {"type": "qlora"}}])
    if key == "off":
        return {randomly.choice(sorted(FOREIGN.keys() - {"quantization"})): randomly.choice([False, {}, "False", True])}
    place = randomly.choice([None, *SECTIONS])
    value = {key: randomly.choice(values[key])}
    return value if place is None else {place: {**PLAIN.get(place, {}), **value}}


def test_no_older_spelling_that_is_understood_is_refused():
    randomly = random.Random(0)
    quantizations = [{}, {"skip": ["x"]}, {"weight_dtype": "nf4"}, {"backend": "bnb"}, {"backend": "torchao"}]
    quantizations += [{"backend": "fp8", "config_kwargs": {}}, {"backend": "mxfp4"}, {"block_size": 64}]
    verdicts = []
    for _ in range(3000):
        document = copy.deepcopy(PLAIN)
        if randomly.random() < 0.5:
            document["quantization"] = dict(randomly.choice(quantizations))
        for _ in range(randomly.choice([1, 1, 2, 3])):
            for key, value in spelling(randomly).items():
                held = document.get(key)
                document[key] = {**held, **value} if isinstance(held, dict) and isinstance(value, dict) else value
        rewritten = rewrite(document)
        verdicts.append(not rewritten.findings and parser_accepts(rewritten.document))
        assert VALIDATOR.is_valid(document) or not verdicts[-1], document
    assert 1000 < sum(verdicts) < 2500


@pytest.mark.parametrize(
    "document",
    [
        {"bnb_config_kwargs": {"bnb_4bit_quant_typo": "nf4"}},
        {"peft": {"backend": "bnb", "weight_dtipe": "nf4"}},
        {"peft": {"weight_dtype": "nf4"}},
        {"model_quantization_config": {"torchoa": {"weight_dtype": "int4"}}},
        {"model_quantization_config": {"torchao": {"weight_dtipe": "int4"}}},
        {"model_quantization_config": "Mxfp4Configs"},
        {"model_quantization_config_kwargs": {"dequantise": False}},
        {"quantization": {"backend": "fp8", "config_kwargs": {"block": 1}}},
        {"load_in_4bit": True, "quantization": {"weight_dtipe": "nf4"}},
        {"training": {"load_in_4bit": True}},
        {"gptq": True},
    ],
    ids=str,
)
def test_typos_in_older_spellings_are_refused_by_both(document):
    document = {**PLAIN, **document}
    rewritten = rewrite(document)
    assert not VALIDATOR.is_valid(document)
    assert rewritten.findings or not parser_accepts(rewritten.document)


def test_older_spellings_are_marked_with_what_to_write():
    marked = [node for node in nodes(SCHEMA) if isinstance(node, dict) and node.get("deprecated")]
    assert len(marked) == len(KEYS) + len(FOREIGN) - 1 + len(("config_kwargs of mxfp4", "of fp8", "qlora", "as a type"))
    assert all(node["description"].startswith(("DEPRECATED: write ", "DEPRECATED: leave it out")) for node in marked)
    assert not any("DEPRECATED" in node.get("description", "") for node in nodes(SCHEMA) if node not in marked)


def nodes(node):
    if isinstance(node, dict):
        yield node
    for member in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from nodes(member)


def test_the_schema_is_one_and_is_plain_json():
    Draft7Validator.check_schema(SCHEMA)
    json.dumps(SCHEMA, allow_nan=False)
