"""Migrating a text with the options of the backends there are, as the command does it."""

from __future__ import annotations

from typing import Any

from quantune.backends import registry
from quantune.recipe import migrate as migrating


def migrate(text: str, *arguments: Any, **options: Any) -> migrating.Migration:
    """`quantune.recipe.migrate.migrate` with the registry's options."""
    return migrating.migrate(text, *arguments, options_of=registry.options_of, **options)
