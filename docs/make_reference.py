"""Write the pages of docs/ that are generated: recipe.md from the docstrings of the recipe's fields and of the built-in
backends' options, errors.md from the explanations of the codes."""

from pathlib import Path

from quantune.backends import registry
from quantune.recipe import explanations
from quantune.recipe.reference import render

if __name__ == "__main__":
    backends = {name: registry.options_of(name) for name in registry.BUILT_IN}
    folder = Path(__file__).parent
    (folder / "recipe.md").write_text(render(backends), encoding="utf-8")
    (folder / "errors.md").write_text(explanations.page(), encoding="utf-8")
