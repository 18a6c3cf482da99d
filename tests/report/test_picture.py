"""Pictures of masks: exact drawings, the example tables they stand on, and the SVG."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
import torch

from trilithon.report.picture import CELL, draw, picture, svg
from trilithon.spec import term as t
from trilithon.spec.masks import B, Causal, Documents, Formula, Full, H, K, Mask, Padding, Q, SlidingWindow


def drawn(mask: Mask, s: int, t: int) -> str:
    return "\n" + picture(mask, s, t) + "\n"


def documents(name: str = "position_ids") -> Documents:
    """A new document at each position 0."""
    starts = t.ite(t.eq(t.read(name, (B, t.var("#0")), "int"), t.ZERO), t.integer(1), t.ZERO)
    return Documents(t.prefix_sum(starts, Q))


CAUSAL = """
        keys ->
        ┌──────┐
queries │█▄    │
        │███▄  │
        │█████▄│
        └──────┘
"""

WINDOW = """
        keys ->
        ┌────────┐
queries │█▄      │
        │▀██▄    │
        │  ▀██▄  │
        │    ▀██▄│
        └────────┘
"""

PADDING = """
        keys ->
        ┌──────┐
queries │  ████│
        │  ████│
        │  ████│
        └──────┘
         001111  attention_mask
"""

PADDED_CAUSAL = """
        keys ->
        ┌──────┐
queries │      │
        │  █▄  │
        │  ███▄│
        └──────┘
         001111  attention_mask
"""

PACKED = """
        keys ->
        ┌────────┐
queries │█▄      │
        │▀▀▀▄    │
        │   ██▄  │
        │   ████▄│
        └────────┘
         01201234  position_ids
"""

WIDE_WINDOW = """
        keys ->
        ┌────────┐
queries │█▄      │
        │███▄    │
        │ ▀███▄  │
        │   ▀███▄│
        └────────┘
one cell for 1024 queries and keys
"""

LOWER_RIGHT = """
        keys ->
        ┌──────┐
queries │███▄  │
        │█████▄│
        └──────┘
"""

ODD = """
        keys ->
        ┌───┐
queries │█▄ │
        │▀▀▀│
        └───┘
"""


@pytest.mark.parametrize(
    ("mask", "sizes", "expected"),
    [
        (Causal(), (6, 6), CAUSAL),
        (SlidingWindow(3), (8, 8), WINDOW),
        (Padding(), (6, 6), PADDING),
        (Causal() & Padding(), (6, 6), PADDED_CAUSAL),
        (Causal() & documents(), (8, 8), PACKED),
        (SlidingWindow(4096), (8, 8), WIDE_WINDOW),
        (Causal("lower_right"), (4, 6), LOWER_RIGHT),
        (Causal(), (3, 3), ODD),
    ],
    ids=["causal", "window", "padding", "padded causal", "packed", "wide window", "lower right", "odd"],
)
def test_drawing(mask, sizes, expected):
    assert drawn(mask, *sizes) == expected


def test_default_size_is_16():
    lines = picture(Full()).splitlines()
    assert lines[2] == "queries │" + "█" * 16 + "│"
    assert len(lines) == 2 + 8 + 1


def test_given_tables_are_drawn_and_not_described():
    table = torch.tensor([[1, 0, 1, 0]])
    assert picture(Padding(), 2, 4, {"attention_mask": table}).splitlines() == [
        "        keys ->",
        "        ┌────┐",
        "queries │█ █ │",
        "        └────┘",
    ]


@pytest.mark.parametrize("window", [16, 17, 24, 1000])
def test_a_scaled_window_agrees_with_the_mask_itself(window):
    drawing = draw(SlidingWindow(window))
    assert not isinstance(drawing, str)
    n = 16 * drawing.every
    whole = SlidingWindow(window).materialize(1, 1, n, n)[0, 0]
    assert torch.equal(drawing.cells, whole[:: drawing.every, :: drawing.every])
    assert not drawing.cells[-1, 0], "the window's edge shows"


def test_a_mask_whose_tables_mean_nothing_here_says_so():
    mask = Formula(t.read("allowed", (B, H, Q, K), "bool"))
    assert picture(mask) == "no picture: it depends on the values of allowed"
    assert "no picture" in svg(mask)


def test_svg_draws_the_same_cells():
    root = ElementTree.fromstring(svg(Causal() & Padding(), 4, 4))
    group = next(g for g in root.iter("g") if g.get("class") == "allowed")
    cells = torch.zeros(4, 4, dtype=torch.bool)
    for rect in group:
        x, y, width = (int(rect.attrib[name]) // CELL for name in ("x", "y", "width"))
        cells[y, x : x + width] = True
    assert torch.equal(cells, torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]], dtype=torch.bool))
    assert root.get("aria-label") == "causal & padding(attention_mask)"
