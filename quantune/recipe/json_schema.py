"""A JSON Schema of the recipe, for editors: made from the same classes, docstrings and checks as the parser.

Draft 7 and its plainest constructs, which is what TOML editors (taplo and those built on it) understand. It says of
each table what may stand in it. Beyond it, and left to `quantune check`, are:

- contradictions between keys, what a backend's `problems()` says of its options, and the files a recipe names;
- what older spellings say together, which of their values mean something, and those that stand inside a table;
- what JSON can't tell apart: `16.0` is a whole number there, `nan` is in every range, numbers have no 64 bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import attrs

from quantune.recipe.reference import field_docs_if_any
from quantune.recipe.schema import QuantizationConfig, Recipe, SourceConfig
from quantune.recipe.structure import is_union

Schema = dict[str, Any]

_FLAG = r"^\s*([Tt][Rr][Uu][Ee]|[Ff][Aa][Ll][Ss][Ee])\s*$"
"""`true` and `false` as strings, in any case."""
_AND: type = type(attrs.validators.and_())
_OPTIONAL: type = type(attrs.validators.optional(attrs.validators.and_()))
_SCALARS = {int: "integer", float: "number", str: "string", bool: "boolean"}
_ABOUT = {"pattern": ("string",), "items": ("array",), "minItems": ("array",)}
"""Types of the values that a keyword restricts."""


def recipe_schema(backends: Mapping[str, Schema]) -> Schema:
    """The schema of a recipe; `backends` maps the name of each backend to its `backend_schema`."""
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A recipe of quantune",
        "definitions": {
            "source": _table(SourceConfig),
            **{f"quantization.{name}": branch for name, branch in backends.items()},
        },
        **_table(Recipe),
    }
    properties = schema["properties"]
    properties["quantization"] = {
        "description": properties["quantization"]["description"],
        "type": "object",
        "properties": _keys_of_any(backends),
        "required": ["backend"],
        **_chosen(list(backends)),
    }
    for name in ("train", "eval"):
        properties["data"]["properties"][name]["items"] = {"$ref": "#/definitions/source"}
    _add_older_spellings(properties, schema["definitions"])
    return schema


def backend_schema(name: str, options: type) -> Schema:
    """What stands under `[quantization]` with this backend: quantune's own keys and the backend's.

    Raises whatever the class raises when it is looked at: it may come from anyone.
    """
    own, more = _table(QuantizationConfig), _table(options)
    backend = {"type": "string", "enum": [name], "description": own["properties"].pop("backend")["description"]}
    return {
        **more,
        "properties": {"backend": backend, **more["properties"], **own["properties"]},
        "required": ["backend", *more.get("required", ())],
    }


def _keys_of_any(backends: Mapping[str, Schema]) -> Schema:
    """What editors show and complete under `[quantization]`: they don't look into conditions."""
    keys: dict[str, list[tuple[str, Schema]]] = {}
    for name, branch in backends.items():
        for key, schema in branch["properties"].items():
            keys.setdefault(key, []).append((name, schema))
    return {key: _either(owners) for key, owners in keys.items()}


def _either(owners: list[tuple[str, Schema]]) -> Schema:
    """One key of several backends: any of their values, and each one's documentation."""
    schemas = [schema for _, schema in owners]
    if all(schema == schemas[0] for schema in schemas):
        return schemas[0]
    docs = {schema.get("description", ""): None for schema in schemas}
    if len(docs) > 1:
        docs = {f"{name}: {schema.get('description', '')}": None for name, schema in owners}
    plain = [{key: schema[key] for key in schema if key not in ("description", "default")} for schema in schemas]
    if all(schema.keys() == {"type", "enum"} and schema["type"] == "string" for schema in plain):
        values = dict.fromkeys(value for schema in plain for value in schema["enum"])
        return {"type": "string", "enum": list(values), "description": "\n\n".join(docs)}
    different = [schema for index, schema in enumerate(plain) if schema not in plain[:index]]
    either = different[0] if len(different) == 1 else {"anyOf": different}
    return {**either, "description": "\n\n".join(docs)}


def _chosen(names: list[str]) -> Schema:
    """The chosen backend decides: conditions, as what a `oneOf` says when nothing fits names no key."""
    if not names:
        return {}
    first, *others = names
    return {
        "if": {"properties": {"backend": {"enum": [first]}}, "required": ["backend"]},
        "then": {"$ref": f"#/definitions/quantization.{first}"},
        **({"else": _chosen(others)} if others else {}),
    }


# Classes --------------------------------------------------------------------------------------------------------------


def _table(cls: type) -> Schema:
    docs, hints = field_docs_if_any(cls), get_type_hints(cls)
    fields = [field for field in attrs.fields(cls) if not (cls is QuantizationConfig and field.name == "options")]
    required = [field.name for field in fields if field.default is attrs.NOTHING]
    return {
        "type": "object",
        "description": inspect.getdoc(cls) or "",
        "properties": {field.name: _key(field, hints[field.name], docs.get(field.name, "")) for field in fields},
        **({"required": required} if required else {}),
        "additionalProperties": False,
    }


def _key(field: Any, annotation: Any, doc: str) -> Schema:
    schema = _type(annotation)
    for keywords in _checks(field.validator):
        schema = _and(schema, keywords)
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    if isinstance(default, bool | int | float | str | list):
        schema["default"] = default
    if schema.get("type") == "number" and not schema.keys() & {"maximum", "exclusiveMaximum", "anyOf"}:
        schema["type"] = ["number", "null"]  # taplo's editors see `inf` as null, which nothing else is in TOML
    return {**schema, "description": doc} if doc else schema


def _type(annotation: Any) -> Schema:
    """A type; one that is none of a recipe's accepts anything."""
    if annotation in _SCALARS:
        return {"type": _SCALARS[annotation]}
    if get_origin(annotation) is Literal:
        values = list(get_args(annotation))
        strings = all(isinstance(value, str) for value in values)
        return {"type": "string", "enum": values} if strings else {"enum": values}
    if get_origin(annotation) in (tuple, list):
        return {"type": "array", "items": _type(get_args(annotation)[0])}
    if get_origin(annotation) is dict:
        return {"type": "object", "additionalProperties": _type(get_args(annotation)[1])}
    if is_union(annotation):
        members = [_type(member) for member in get_args(annotation) if member is not type(None)]
        if {"type": "number"} in members:
            members = [member for member in members if member != {"type": "integer"}]
        return members[0] if len(members) == 1 else {"anyOf": members}
    return _table(annotation) if attrs.has(annotation) else {}


def _checks(validator: Any) -> Iterator[Schema]:
    """What the validators of a field accept; attrs' own combinators hold those they are made of."""
    if hasattr(validator, "json_schema"):
        yield validator.json_schema
    elif type(validator) in (_AND, _OPTIONAL):
        for held in attrs.astuple(validator, recurse=False):
            for one in held if isinstance(held, tuple | list) else (held,):
                yield from _checks(one)


def _and(schema: Schema, keywords: Mapping[str, Any]) -> Schema:
    """The schema with those more keywords that are about its type; those that it has already hold as well."""
    merged, beside = dict(schema), {}
    for keyword, value in keywords.items():
        if "type" in schema and schema["type"] not in _ABOUT.get(keyword, (schema["type"],)):
            continue
        if keyword == "items" and "items" in schema:
            merged["items"] = _and(schema["items"], value)
        elif keyword == "minimum" and keyword in schema:
            merged[keyword] = max(schema[keyword], value)
        elif keyword in schema:
            beside[keyword] = value
        else:
            merged[keyword] = value
    return {**merged, "allOf": [*schema.get("allOf", ()), beside]} if beside else merged


# Older spellings, which `quantune.recipe.legacy` rewrites -------------------------------------------------------------


def _add_older_spellings(properties: Schema, definitions: Schema) -> None:
    """Accept what is understood and should be written otherwise, marked as deprecated."""
    nf4 = '[quantization] backend = "bnb", weight_dtype = "nf4"'
    flag = {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": _FLAG}]}
    table = {"type": "object"}
    kind = properties["adapter"]["properties"]["type"]
    kind["enum"] = [*kind["enum"], "qlora"]
    kind.update({"if": {"enum": ["qlora"]}, "then": _deprecated(f'[adapter] type = "lora" and {nf4}')})
    properties["adapter"].update(
        {
            "type": ["object", "string"],
            "pattern": "^(lora|qlora)$",
            "if": {"type": "string"},
            "then": _deprecated(f"[adapter], and for qlora {nf4}"),
        }
    )
    config = {"anyOf": [{"type": "string", "enum": ["Mxfp4Config", "FineGrainedFP8Config"]}, table]}
    for key, schema, now in (
        ("load_in_4bit", flag, nf4),
        ("load_in_8bit", flag, nf4.replace("nf4", "int8")),
        ("model_quantization_config", config, "[quantization] backend = ..."),
        ("model_quantization_config_kwargs", table, "the options of the backend under [quantization]"),
        ("peft", table, "[quantization] backend = ..., weight_dtype = ..."),
        ("bnb_config_kwargs", table, "the options of the backend under [quantization]"),
        ("quantize_moe_experts", flag, "[quantization] experts = true"),
    ):
        properties[key] = {**schema, **_deprecated(now)}
    now = "the options of the backend, and modules_to_not_convert as skip"
    for name in ("mxfp4", "fp8"):
        if f"quantization.{name}" in definitions:
            definitions[f"quantization.{name}"]["properties"]["config_kwargs"] = {**table, **_deprecated(now)}


def _deprecated(now: str) -> Schema:
    return {"deprecated": True, "description": f"DEPRECATED: write {now}"}
