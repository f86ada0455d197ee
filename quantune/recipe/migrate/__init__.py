"""YAML of other tools into recipes, with an account of every key."""

from quantune.recipe.migrate.migrate import Migration, migrate
from quantune.recipe.migrate.reading import leaf_keys

__all__ = ["Migration", "leaf_keys", "migrate"]
