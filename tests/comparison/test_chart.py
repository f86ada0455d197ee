"""The chart is valid XML, whatever a format is called, and no label hides another."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import pytest

from quantune.comparison.chart import CHARACTER_WIDTH, LINE_HEIGHT, Box, render
from quantune.comparison.rows import (
    UNQUANTIZED,
    Comparison,
    DequantizeFigures,
    FormatRow,
    LayerFigures,
    OutputFigures,
    Setting,
)

SVG = "{http://www.w3.org/2000/svg}"
SETTING = Setting(
    model="a <b> & c",
    device="cpu",
    precision="fp32",
    torch="2",
    threads=1,
    text="built-in",
    text_tokens=100,
    tokens=99,
    window=512,
    batch=(4, 128),
)


def row(name, bits=4.0, kl=0.03, reference=False):
    return FormatRow(
        format=name,
        weights=LayerFigures(kind="all", layers=1, weights=8000, nbytes=int(1000 * bits), relative_error=0.1),
        outputs=OutputFigures(loss=1.0, kl=kl),
        dequantize=None if reference else DequantizeFigures(ms_per_million=1.0, memcpys=2.0),
    )


def drawn(*rows, suffix=".svg"):
    reference = row(UNQUANTIZED, 32.0, 0.0, reference=True)
    return ElementTree.fromstring(render(Comparison(setting=SETTING, rows=(reference, *rows)), suffix))


def labels(root):
    return {text.text: text for text in root.iter(f"{SVG}text")}


def test_there_is_a_dot_and_a_label_for_each_format_and_none_for_the_reference():
    root = drawn(row("bnb:nf4"), row("fp8", 8.0, 0.002), FormatRow(format="mxfp4", problem="can't"))
    dots = list(root.iter(f"{SVG}circle"))
    assert len(dots) == 2
    assert {"bnb:nf4", "fp8"} < labels(root).keys() and not {UNQUANTIZED, "mxfp4"} & labels(root).keys()


def test_more_bits_are_to_the_right_and_more_divergence_is_above():
    root = drawn(row("low", 4.0, 0.1), row("high", 8.0, 0.001))
    right, left = sorted(root.iter(f"{SVG}circle"), key=lambda dot: -float(dot.get("cx")))
    assert float(left.get("cy")) < float(right.get("cy"))


def test_labels_of_formats_that_are_alike_do_not_overlap():
    root = drawn(*(row(f"torchao:number{index}", 4.0 + index / 100, 0.03) for index in range(9)))
    boxes = []
    for name, text in labels(root).items():
        if name.startswith("torchao"):
            left, middle = float(text.get("x")), float(text.get("y"))
            boxes.append(Box(left, middle - LINE_HEIGHT + 1, left + CHARACTER_WIDTH * len(name), middle))
    assert len(boxes) == 9
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


@pytest.mark.parametrize("suffix", [".svg", ".html"])
@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a&b", "\x00\x1b[31m", '"]]>', "\ud800"])
def test_a_hostile_name_is_text(name, suffix):
    root = drawn(row(name), suffix=suffix)
    assert not list(root.iter("script")) and not list(root.iter(f"{SVG}script"))


@pytest.mark.parametrize("kl", [0.0, 5.0, float("inf")])
def test_any_divergence_can_be_drawn(kl):
    assert drawn(row("one", 4.0, kl)) is not None


def test_without_a_format_it_says_so():
    assert "No format could be measured on this model." in labels(drawn())
