"""Write docs/recipe.md from the docstrings of the recipe's fields and of the built-in backends' options."""

from pathlib import Path

from quantune.backends import registry
from quantune.recipe.reference import render

if __name__ == "__main__":
    backends = {name: registry.options_of(name) for name in registry.BUILT_IN}
    (Path(__file__).parent / "recipe.md").write_text(render(backends), encoding="utf-8")
