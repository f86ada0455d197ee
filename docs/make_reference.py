"""Write docs/recipe.md from the docstrings of the recipe's fields, and docs/migrate.md from the rules of `migrate`."""

from pathlib import Path

from quantune.backends import registry
from quantune.recipe.migrate.reference import render as render_migrate
from quantune.recipe.reference import render

if __name__ == "__main__":
    docs = Path(__file__).parent
    backends = {name: registry.options_of(name) for name in registry.BUILT_IN}
    (docs / "recipe.md").write_text(render(backends), encoding="utf-8")
    (docs / "migrate.md").write_text(render_migrate(), encoding="utf-8")
