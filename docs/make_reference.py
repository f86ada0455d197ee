"""Write the generated pages.

docs/recipe.md    from the docstrings of the recipe's fields and of the built-in backends' options
docs/errors.md    from the codes of recipe problems
docs/migrate.md   from the rules of `quantune migrate`
"""

from pathlib import Path

from quantune.backends import registry
from quantune.recipe.migrate.reference import render as render_migrate
from quantune.recipe.reference import render, render_codes

if __name__ == "__main__":
    docs = Path(__file__).parent
    backends = {name: registry.options_of(name) for name in registry.BUILT_IN}
    (docs / "recipe.md").write_text(render(backends), encoding="utf-8")
    (docs / "errors.md").write_text(render_codes(), encoding="utf-8")
    (docs / "migrate.md").write_text(render_migrate(), encoding="utf-8")
