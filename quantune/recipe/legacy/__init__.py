"""Spellings of older tools, rewritten to the canonical form before structuring.

Each old key is a claim about the one `[quantization]` table (`reading`, `arguments`); claims are held against each
other and against the table itself (`claims`), whatever their order, and made one (`rewriting`). Those that agree are
understood with a warning, those that don't are errors at both places. Keys of methods that quantune does not have are
refused by name (`foreign`).
"""

from quantune.recipe.legacy.rewriting import Rewritten, rewrite

__all__ = ["Rewritten", "rewrite"]
