"""The options of the installed backends as pieces of the recipe's JSON Schema."""

from __future__ import annotations

import json
from typing import Any

from quantune.backends import registry
from quantune.backends.discovery import in_words
from quantune.errors import BackendError
from quantune.recipe.json_schema import backend_schema, recipe_schema


def installed_schema() -> tuple[str, list[str]]:
    """The schema of a recipe as JSON, and why backends are left out of it that can't be described.

    Imports the description of every installed backend, and no tensor code.
    """
    backends: dict[str, dict[str, Any]] = {}
    left_out: list[str] = []
    for found in registry.find():
        try:
            described = backend_schema(found.name, registry.load_description(found).options)
            json.dumps(described, allow_nan=False)
        except BackendError as error:
            left_out.append(str(error))
        except Exception as error:  # annotations and defaults are a plugin's code and can be anything
            left_out.append(f'the options of backend "{found.name}" can\'t be read: {in_words(error)}')
        else:
            backends[found.name] = described
    return json.dumps(recipe_schema(backends), indent=2, ensure_ascii=False, allow_nan=False) + "\n", left_out
