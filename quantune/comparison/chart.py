"""A comparison as a picture: bits per weight across, divergence from the unquantized model up, one dot a format."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from quantune.comparison.rows import Comparison

SUFFIXES = (".svg", ".html")
WIDTH, HEIGHT = 760, 480
LEFT, RIGHT, TOP, BOTTOM = 84, 120, 58, 62
SMALLEST_KL = 1e-9
"""What a format is drawn at whose divergence is lost in rounding: a logarithmic axis has no zero."""
RADIUS = 4.5
LINE_HEIGHT, CHARACTER_WIDTH = 15, 7
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#24292f}.title{font-size:15px;font-weight:600}.note{fill:#57606a}"
    ".grid{stroke:#d8dee4}.axis{stroke:#57606a}.dot{fill:#0969da}"
)
NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Box(NamedTuple):
    """A rectangle that is drawn on."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Whether the two share an area."""
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.bottom <= other.top or other.bottom <= self.top)


class Point(NamedTuple):
    """A format in the units of the axes."""

    name: str
    bits: float
    kl: float


def render(comparison: Comparison, suffix: str) -> str:
    """The chart as an SVG document, or as a page that holds it when `suffix` is `.html`."""
    drawing = svg(comparison)
    if suffix == ".svg":
        return f'<?xml version="1.0" encoding="UTF-8"?>\n{drawing}\n'
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>{_text(_title(comparison))}</title>'
        f"</head>\n<body>\n{drawing}\n</body></html>\n"
    )


def svg(comparison: Comparison) -> str:
    """The chart as one `svg` element."""
    points = [
        Point(row.format, row.weights.bits_per_weight, max(row.outputs.kl, SMALLEST_KL))
        for row in comparison.rows
        if row.dequantize and row.weights and row.outputs and math.isfinite(row.outputs.kl)
    ]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img">',
        f"<title>{_text(_title(comparison))}</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text class="title" x="{LEFT}" y="24">{_text(_title(comparison))}</text>',
        f'<text class="note" x="{LEFT}" y="42">{_text(_subtitle(comparison))}</text>',
    ]
    if points:
        parts += _plot(points)
    else:
        parts.append(f'<text x="{LEFT}" y="{HEIGHT // 2}">No format could be measured on this model.</text>')
    return "\n".join([*parts, "</svg>"])


def _plot(points: Sequence[Point]) -> list[str]:
    left, right = math.floor(min(point.bits for point in points)), math.ceil(max(point.bits for point in points))
    left, right = min(left, right - 1), max(right, left + 1)
    low = math.floor(math.log10(min(point.kl for point in points)))
    high = max(low + 1, math.ceil(math.log10(max(point.kl for point in points))))

    def x(bits: float) -> float:
        return LEFT + (bits - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def y(kl: float) -> float:
        return HEIGHT - BOTTOM - (math.log10(kl) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    bottom, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{at:.1f}" x2="{end}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_power_of_ten(power)}</text>')
    for bits in range(left, right + 1, max(1, (right - left) // 10)):
        parts.append(f'<line class="grid" x1="{x(bits):.1f}" y1="{TOP}" x2="{x(bits):.1f}" y2="{bottom}"/>')
        parts.append(f'<text x="{x(bits):.1f}" y="{bottom + 18}" text-anchor="middle">{bits}</text>')
    middle = (TOP + bottom) // 2
    parts += [
        f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{end}" y2="{bottom}"/>',
        f'<line class="axis" x1="{LEFT}" y1="{TOP}" x2="{LEFT}" y2="{bottom}"/>',
        f'<text x="{(LEFT + end) // 2}" y="{HEIGHT - 20}" text-anchor="middle">bits per weight</text>',
        f'<text x="20" y="{middle}" text-anchor="middle" transform="rotate(-90 20 {middle})">'
        "KL from the unquantized model, nats per token</text>",
    ]
    dots = [(x(point.bits), y(point.kl), point.name) for point in points]
    taken = [Box(across - RADIUS, up - RADIUS, across + RADIUS, up + RADIUS) for across, up, _ in dots]
    for across, up, name in sorted(dots, reverse=True):  # from the right, where there is room
        label = _place_label(across, up, name, taken)
        taken.append(label)
        middle_of_label = (label.top + label.bottom) / 2
        parts.append(f'<circle class="dot" cx="{across:.1f}" cy="{up:.1f}" r="{RADIUS}"/>')
        if abs(middle_of_label - up) > LINE_HEIGHT / 2:
            end_of_line = f'x2="{label.left - 2:.1f}" y2="{middle_of_label:.1f}"'
            parts.append(f'<line class="axis" x1="{across:.1f}" y1="{up:.1f}" {end_of_line}/>')
        parts.append(f'<text x="{label.left:.1f}" y="{middle_of_label + 4:.1f}">{_text(name)}</text>')
    return parts


def _place_label(across: float, up: float, name: str, taken: Sequence[Box]) -> Box:
    """The place to the right of a dot, nearest to its height, that is clear of dots and other labels."""
    left, right = across + 2 * RADIUS, across + 2 * RADIUS + CHARACTER_WIDTH * len(name)
    heights = sorted(range(TOP, HEIGHT - BOTTOM), key=lambda height: abs(height - up))
    places = [Box(left, height - LINE_HEIGHT / 2, right, height + LINE_HEIGHT / 2) for height in heights]
    return next((place for place in places if not any(place.overlaps(other) for other in taken)), places[0])


def _title(comparison: Comparison) -> str:
    return f"Formats on {comparison.setting.model}"


def _subtitle(comparison: Comparison) -> str:
    setting = comparison.setting
    return f"{setting.tokens:,} tokens of the {setting.text} text, {setting.precision} on {setting.device}"


def _power_of_ten(power: int) -> str:
    return f"{10**power:g}" if 0 <= power <= 3 else f"1e{power}" if power < -3 or power > 3 else f"{10.0**power:g}"


def _text(text: str) -> str:
    """Text as XML holds it: a third party's name may hold anything."""
    return escape(NOT_IN_XML.sub("�", text))
