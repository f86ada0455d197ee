"""A JSON Schema of the recipe, for editors: made from the same classes, docstrings and checks as the parser.

Draft 7 and its plainest constructs, which is what TOML editors (taplo and those built on it) understand. It says of
each table what may stand in it. Beyond it, and left to `quantune check`, are:

- contradictions between keys, what a backend's `problems()` says of its options, and the files a recipe names;
- what older spellings say together and beside `[quantization]`, and which of their values mean something;
- what JSON can't tell apart: `16.0` is a whole number there, `nan` is in every range, numbers have no 64 bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import attrs

from quantune.recipe.legacy.arguments import UNDERSTOOD
from quantune.recipe.legacy.claims import BACKENDS
from quantune.recipe.legacy.foreign import FOREIGN
from quantune.recipe.legacy.reading import CONFIG_CLASSES, KEYS, SECTIONS, TABLE, TABLE_KWARGS
from quantune.recipe.reference import field_docs_if_any
from quantune.recipe.schema import QuantizationConfig, Recipe, SourceConfig
from quantune.recipe.structure import is_union

Schema = dict[str, Any]

_FALSE = r"^\s*[Ff][Aa][Ll][Ss][Ee]\s*$"
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
    }
    for name in ("train", "eval"):
        properties["data"]["properties"][name]["items"] = {"$ref": "#/definitions/source"}
    older = _older_spellings(properties["quantization"]["properties"], list(backends))
    schema["definitions"].update({f"older.{key}": spelling for key, spelling in older.items()})
    _accept_older_spellings(properties, schema["definitions"])
    # what is required and what a backend has is decided by all spellings together: the parser's business
    any_key: Schema = {key: {} for key in properties["quantization"]["properties"]}
    schema["if"] = _has_older_spellings()
    schema["then"] = _quantization_is({"properties": any_key, "additionalProperties": False})
    schema["else"] = _quantization_is({"required": ["backend"], **_chosen(list(backends))})
    return schema


def _quantization_is(schema: Schema) -> Schema:
    return {"properties": {"quantization": schema}}


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


def _older_spellings(keys: Schema, backends: list[str]) -> dict[str, Schema]:
    """Each key of older tools that is understood, marked as deprecated; `keys` are those of any backend."""
    flat = {"backend": {"type": "string"}, "config_kwargs": _arguments(*CONFIG_CLASSES.values())}
    flat = {**{key: {} for key in keys}, **flat}
    nested = {name: {"type": "object", "properties": flat, "additionalProperties": False} for name in backends}
    table: Schema = {"type": "object", "additionalProperties": False}
    config = {
        "type": ["string", "object"],
        "if": {"type": "string"},
        "then": {"enum": list(CONFIG_CLASSES)},
        "properties": {**flat, **nested},
        "additionalProperties": False,
    }
    nf4 = '[quantization] backend = "bnb", weight_dtype = "nf4"'
    options = "the options of the backend under [quantization]"
    spellings: dict[str, tuple[Schema, str]] = {
        TABLE: (config, "[quantization] backend = ..."),
        TABLE_KWARGS: (_arguments(*CONFIG_CLASSES.values()), options),
        "peft": ({**table, "properties": flat, "required": ["backend"]}, "[quantization] backend = ..."),
        "bnb_config_kwargs": (_arguments("bnb"), options),
        "load_in_4bit": (_flag(), nf4),
        "load_in_8bit": (_flag(), nf4.replace("nf4", "int8")),
        "quantize_moe_experts": (_flag(), "[quantization] experts = true"),
    }
    return {key: {**spellings[key][0], **_deprecated(f"write {spellings[key][1]}")} for key in KEYS}


def _accept_older_spellings(properties: Schema, definitions: Schema) -> None:
    """Take older spellings wherever they are understood: at the head of a recipe and in some of its tables."""
    older = {key: {"$ref": f"#/definitions/older.{key}"} for key in KEYS}
    places = [properties, *(properties[section]["properties"] for section in SECTIONS)]
    for name in BACKENDS:
        branch = definitions.get(f"quantization.{name}")
        if branch is not None:
            places.append(branch["properties"])
    for place in places:
        place.update({key: {} if key in place else spelling for key, spelling in older.items()})
    now = "write the options of the backend, and modules_to_not_convert as skip"
    for name in CONFIG_CLASSES.values():
        if f"quantization.{name}" in definitions:
            kwargs = {**_arguments(name), **_deprecated(now)}
            definitions[f"quantization.{name}"]["properties"]["config_kwargs"] = kwargs
            properties["quantization"]["properties"]["config_kwargs"] = {}
    for key in FOREIGN:
        if key not in properties:
            properties[key] = {**_off(), **_deprecated("leave it out: switched off it says nothing")}
    kind = properties["adapter"]["properties"]["type"]
    kind["enum"] = [*kind["enum"], "qlora"]
    nf4 = '[quantization] backend = "bnb", weight_dtype = "nf4"'
    kind.update({"if": {"enum": ["qlora"]}, "then": _deprecated(f'write [adapter] type = "lora" and {nf4}')})
    properties["adapter"].update(
        {
            "type": ["object", "string"],
            "pattern": "^(lora|qlora)$",
            "if": {"type": "string"},
            "then": _deprecated(f"write [adapter], and for qlora {nf4}"),
        }
    )


def _has_older_spellings() -> Schema:
    """Whether an older key stands anywhere, or the adapter is `qlora`."""
    has_one: Schema = {"type": "object", "anyOf": [{"required": [key]} for key in KEYS]}
    qlora: Schema = {"type": "object", "properties": {"type": {"enum": ["qlora"]}}, "required": ["type"]}
    held = [(section, has_one) for section in SECTIONS] + [("adapter", {"enum": ["qlora"]}), ("adapter", qlora)]
    return {"anyOf": [has_one, *({"properties": {name: what}, "required": [name]} for name, what in held)]}


def _arguments(*backends: str) -> Schema:
    """The arguments of transformers' config classes for these backends."""
    keys: Schema = {key: {} for backend in backends for key in UNDERSTOOD[backend]}
    return {"type": "object", "properties": keys, "additionalProperties": False}


def _flag() -> Schema:
    return {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": _FLAG}]}


def _off() -> Schema:
    false = {"type": "string", "pattern": _FALSE}
    return {"anyOf": [{"type": "boolean", "enum": [False]}, {"type": "object", "maxProperties": 0}, false]}


def _deprecated(now: str) -> Schema:
    return {"deprecated": True, "description": f"DEPRECATED: {now}"}
