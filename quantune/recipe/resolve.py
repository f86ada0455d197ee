"""A recipe with nothing left open, and a recipe as TOML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import attrs

from quantune.recipe import chat_templates
from quantune.recipe.schema import Recipe


def with_absolute_paths(recipe: Recipe, recipe_path: Path) -> Recipe:
    """The recipe with its inputs as absolute paths and its run folder named.

    Inputs are relative to the recipe's folder. The run folder is relative to the current directory; `auto` is
    `runs/<name of the recipe>`.
    """
    folder = recipe_path.resolve().parent

    def absolute(path: str) -> str:
        return str((folder / os.path.expanduser(path)).resolve())

    def model_path(name: str | None) -> str | None:
        if name is None or name.startswith("builtin:"):
            return name
        expanded = os.path.expanduser(name)
        local = name.startswith((".", "/", "~")) or os.path.isdir(folder / expanded)
        return absolute(name) if local else name

    def sources(part: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(s if s.path is None else attrs.evolve(s, path=absolute(s.path)) for s in part)

    base = model_path(recipe.model.base)
    assert base is not None
    template = recipe.model.chat_template
    directory = f"runs/{recipe_path.stem}" if recipe.output.dir == "auto" else os.path.expanduser(recipe.output.dir)
    start = recipe.adapter.start_from
    return attrs.evolve(
        recipe,
        adapter=attrs.evolve(recipe.adapter, start_from=None if start is None else absolute(start)),
        model=attrs.evolve(
            recipe.model,
            base=base,
            tokenizer=model_path(recipe.model.tokenizer),
            chat_template=template if template is None or template in chat_templates.NAMES else absolute(template),
        ),
        data=attrs.evolve(recipe.data, train=sources(recipe.data.train), eval=sources(recipe.data.eval)),
        output=attrs.evolve(recipe.output, dir=directory),
    )


_NO_TOKENS: dict[str, Any] = {"additional_special_tokens": []}
"""What a table of special tokens holds that changes nothing."""


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dicts and lists in its canonical form; what is unset is left out."""
    document = _plain(recipe)
    document["model"] = {key: value for key, value in document["model"].items() if value not in ({}, _NO_TOKENS)}
    for part in ("train", "eval"):
        rows = document["data"].get(part, [])
        document["data"][part] = [{key: value for key, value in row.items() if value != {}} for row in rows]
    quantization = document.get("quantization")
    if quantization is not None:
        quantization.update(quantization.pop("options", None) or {})
    return document


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML that loads to an equal recipe."""
    import tomlkit

    document = tomlkit.document()
    for section, table in to_dict(recipe).items():
        if section == "data":
            arrays = {key: table.pop(key) for key in ("train", "eval") if key in table}
            document[section] = made = tomlkit.item(table)
            for key, rows in arrays.items():
                array = tomlkit.aot()
                for row in rows:
                    array.append(tomlkit.item(row))
                if rows:
                    made[key] = array  # type: ignore[index]  # a tomlkit table
        else:
            document[section] = table
    return tomlkit.dumps(document)


def _plain(value: Any) -> Any:
    if attrs.has(type(value)):
        fields = ((field.name, getattr(value, field.name)) for field in attrs.fields(type(value)))
        return {name: _plain(item) for name, item in fields if item is not None}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items() if item is not None}
    return value
