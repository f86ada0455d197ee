"""What `quantune merge` prints of its verification, and of the ways of merging side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from quantune.cli.console import out, table, warning

if TYPE_CHECKING:
    from quantune.merge.comparison import WayRow, WaysTable
    from quantune.merge.verify import Verification


def print_verification(verification: Verification, *, way: str, exact: bool) -> None:
    """What was found, on standard output: that an `exact` merge has passed, or how far an approximation is off.

    `way` is the way of merging, as the comparison calls it.
    """
    found = verification.found
    if not exact:
        _print_approximation(verification, way)
        return
    effect = "" if verification.adapter is None else f"; the base alone is {_nats(verification.adapter.kl)} away"
    out.print(
        f"[green]verified[/]: KL {_nats(found.kl)} per token from base + adapter (bound "
        f"{_nats(verification.kl_bound)}), logits within {found.max_difference:.1e} (bound "
        f"{verification.difference_bound:.1e}), {_agreement(verification)}{effect}"
    )
    if not verification.telling:
        name = str(verification.dtype).removeprefix("torch.")
        warning(
            f"the adapter changes the answers less than a rounding of the weights to {name} may: a merge that lost it "
            "would pass as well. A longer training, or --dtype fp32, can be told apart"
        )


def _print_approximation(verification: Verification, way: str) -> None:
    from quantune.merge.comparison import warning as warning_of

    base, kept = verification.base_loss, verification.kept
    share = ""
    if base is not None and kept is not None:
        share = f", {kept:.1%} of the improvement from {base:.4f} to {verification.trained_loss:.4f}"
    out.print(
        f"[yellow]an approximation[/]: loss {verification.loss:.4f} over {verification.targets:,} target tokens{share}"
        f"; KL {_nats(verification.found.kl)} per token from base + adapter, {_agreement(verification)}"
    )
    text = warning_of(way, kept)
    if text is not None:
        warning(text)


def _agreement(verification: Verification) -> str:
    found = verification.found
    return f"same likeliest token in {found.agreement:.2%} of {found.tokens:,} tokens of {escape(verification.prompts)}"


def print_ways(ways: WaysTable) -> None:
    """The comparison as a table, on standard output, and warnings of ways that lose what was trained."""
    from quantune.merge.comparison import warning as warning_of

    shown = table("", ">perplexity", ">loss", ">KL", ">improvement kept")
    for row in ways.rows:
        shown.add_row(escape(row.way), f"{row.perplexity:.3f}", f"{row.loss:.4f}", _nats(row.kl), _kept(row))
    out.print(shown)
    what = "" if ways.held_out else ", which was trained on"
    out.print(
        f"{ways.tokens:,} target tokens of {escape(ways.prompts)}{what}; KL in nats from base + adapter; improvement: "
        "of the loss, from the base to base + adapter"
    )
    for row in ways.rows[2:]:
        text = warning_of(row.way, row.kept)
        if text is not None:
            warning(text)


def _nats(kl: float) -> str:
    return f"{kl:.4f}" if kl >= 1e-2 or kl == 0 else f"{kl:.1e}"


def _kept(row: WayRow) -> str:
    return "-" if row.kept is None else f"{row.kept:.1%}"
