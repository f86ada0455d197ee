"""Write docs/recipe.md, from the docstrings of the recipe's fields and of the built-in backends' options, and
docs/errors.md, from the codes of recipe problems."""

from pathlib import Path

from quantune.backends import registry
from quantune.recipe.reference import render, render_codes

if __name__ == "__main__":
    backends = {name: registry.options_of(name) for name in registry.BUILT_IN}
    (Path(__file__).parent / "recipe.md").write_text(render(backends), encoding="utf-8")
    (Path(__file__).parent / "errors.md").write_text(render_codes(), encoding="utf-8")
