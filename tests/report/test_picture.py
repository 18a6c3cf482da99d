"""Pictures of masks: exact drawings, heads, witnesses, the example tables they stand on, and the SVG."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
import torch

from report.reports import ONE_CELL, ONE_HEAD
from trilithon.report.picture import Drawing, Subject, draw, picture
from trilithon.report.svg import CELL, svg
from trilithon.spec import term as t
from trilithon.spec.masks import B, Causal, Documents, Formula, Full, H, K, Mask, Padding, Q, SlidingWindow


def only(mask: Mask | Subject, s: int = 16, t: int = 16, inputs: dict | None = None) -> Drawing:
    drawings = draw(mask, s, t, inputs)
    assert isinstance(drawings, tuple), drawings
    (drawing,) = drawings
    return drawing


def drawn(mask: Mask | Subject, s: int, t: int) -> str:
    return "\n" + picture(only(mask, s, t)) + "\n"


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

PACKED_WIDE = """
        keys ->
        ┌────────┐
queries │█▄      │
        │▀▀▀▄    │
        │   ██▄  │
        │   ▀███▄│
        └────────┘
         01201234  position_ids / 1024
one cell for 1024 queries and keys
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

CHUNKED = """
        keys ->
        ┌────────┐
queries │█▄      │
        │███▄    │
        │    █▄  │
        │    ███▄│
        └────────┘
one cell for 2048 queries and keys
"""

PREFIX = """
        keys ->
        ┌──────┐
queries │██    │
        │███▄  │
        │█████▄│
        └──────┘
for length = 2
"""

ONE_STEP = """
        keys ->
        ┌──────┐
queries │▀▀▀▀  │
        └──────┘
for cache_position = 3
keys 0 to 5 of 64
"""

WITNESS = """
        keys ->
        ┌──────┐
queries │██████│
        │██████│
        │███▀██│ ◄ q=40
        └──────┘
            ▲ k=3
queries 35 to 40 of 41, keys 0 to 5 of 41
"""

PADDING_IS_NOT_CAUSAL = """
        keys ->
        ┌────┐
queries │  ██│ ◄ q=0
        │  ██│
        └────┘
         ▲ k=0
         0011  attention_mask
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
        (SlidingWindow(4096) & documents(), (8, 8), PACKED_WIDE),
        (SlidingWindow(4096), (8, 8), WIDE_WINDOW),
        (Formula((K <= Q) & t.eq(t.floor_div(Q, t.integer(8192)), t.floor_div(K, t.integer(8192)))), (8, 8), CHUNKED),
        (Formula((K <= Q) | (K < t.read("length", (B,), "int"))), (6, 6), PREFIX),
        (Subject(K <= t.read("cache_position", (Q,), "int"), (t.integer(1), t.integer(64))), (6, 6), ONE_STEP),
        (Causal("lower_right"), (4, 6), LOWER_RIGHT),
        (Causal(), (3, 3), ODD),
        (
            Subject(ONE_CELL, claim=Causal().term(), witness={"b": 0, "h": 0, "q": 40, "k": 3, "s": 41, "t": 41}),
            (6, 6),
            WITNESS,
        ),
        (
            Subject(Padding().term(), claim=Causal().term(), witness={"b": 0, "h": 0, "q": 0, "k": 0, "s": 2, "t": 2}),
            (4, 4),
            PADDING_IS_NOT_CAUSAL,
        ),
    ],
    ids=[
        *("causal", "window", "padding", "padded causal", "packed", "packed wide", "wide window", "chunked", "prefix"),
        *("one step", "lower right", "odd", "one cell", "data"),
    ],
)
def test_drawing(mask, sizes, expected):
    assert drawn(mask, *sizes) == expected


def test_default_size_is_16():
    lines = picture(only(Full())).splitlines()
    assert lines[2] == "queries │" + "█" * 16 + "│"
    assert len(lines) == 2 + 8 + 1


def test_given_tables_are_drawn_and_not_described():
    table = torch.tensor([[1, 0, 1, 0]])
    assert picture(only(Padding(), 2, 4, {"attention_mask": table})).splitlines() == [
        "        keys ->",
        "        ┌────┐",
        "queries │█ █ │",
        "        └────┘",
    ]


@pytest.mark.parametrize("window", [16, 17, 24, 1000])
def test_a_scaled_window_agrees_with_the_mask_itself(window):
    drawing = only(SlidingWindow(window))
    n = 16 * drawing.every
    whole = SlidingWindow(window).materialize(1, 1, n, n)[0, 0]
    assert torch.equal(drawing.cells, whole[:: drawing.every, :: drawing.every])
    assert not drawing.cells[-1, 0], "the window's edge shows"


def test_heads_that_differ_are_drawn_once_each():
    drawings = draw(Subject(ONE_HEAD, heads=8), 8, 8)
    assert [d.heads for d in drawings] == ["heads 0..1,3..7", "head 2"]
    assert torch.equal(drawings[0].cells, Causal().materialize(1, 1, 8, 8)[0, 0])
    assert torch.equal(drawings[1].cells, SlidingWindow(4).materialize(1, 1, 8, 8)[0, 0])
    assert [d.heads for d in draw(Subject((K <= Q) | (H >= 0), heads=8), 8, 8)] == [""]
    windows = draw(Subject(K > Q - t.read("windows", (H,), "int"), heads=8, tables={"windows": torch.arange(8)}), 8, 8)
    assert len(windows) == 4
    assert windows[-1].notes == ("4 more kinds of heads are not drawn",)


def test_the_witness_is_of_its_own_head():
    at = {"b": 0, "h": 2, "q": 4, "k": 0, "s": 5, "t": 5}
    drawing = only(Subject(ONE_HEAD, heads=8, claim=Causal().term(), witness=at), 8, 8)
    assert (drawing.heads, drawing.witness) == ("head 2", (4, 0))
    assert drawing.differs is not None
    assert drawing.differs.sum() == 10 and drawing.differs[4, 0]


def test_tables_in_which_the_witness_shows_are_looked_for():
    at = {"b": 0, "h": 0, "q": 3, "k": 2, "s": 4, "t": 4}  # with the usual example, key 2 is no padding
    drawing = only(Subject((Causal() & Padding()).term(), claim=Causal().term(), witness=at), 4, 4)
    assert drawing.witness == (3, 2)
    assert drawing.below["attention_mask"][2] == 0


def test_sizes_of_the_program_follow_from_each_other():
    size = t.var("s7")
    assert only(Subject(K <= Q + size - 2, (size, size + 2)), 4, 8).cells.shape == (4, 6)
    assert "no picture" not in str(draw(Formula(K <= t.var("u9"))))


@pytest.mark.parametrize(
    "term",
    [
        t.read("allowed", (B, H, Q, K), "bool"),
        t.read("allowed", (Q, K), "bool"),
        t.eq(t.read("order", (B, t.read("index", (K,), "int")), "int"), Q),
        t.read("tokens", (B, K), "int").eq(50256),
        t.eq(t.read("segments", (B, Q), "int"), t.read("segments", (B, K), "int")),
        t.read("starts", (B, Q, K), "int") < 1,
        t.read("limit", (), "int") >= K,
        t.read("some_heads", (H,), "bool"),
    ],
    ids=str,
)
def test_every_mask_has_a_picture(term):
    drawings = draw(Formula(term))
    assert isinstance(drawings, tuple), drawings
    assert any(0 < int(d.cells.sum()) < d.cells.numel() for d in drawings) or len(drawings) > 1, "both kinds of cells show"
    for drawing in drawings:
        ElementTree.fromstring(svg(drawing, "x"))
        assert "keys ->" in picture(drawing)


def test_a_picture_that_cannot_be_made_says_so():
    assert str(draw(Formula(t.floor_div(K, B).eq(0)))).startswith("no picture: ")


def test_svg_draws_the_same_cells():
    drawing = only(Causal() & Padding(), 4, 4)
    root = ElementTree.fromstring(svg(drawing, str(Causal() & Padding())))
    group = next(g for g in root.iter("g") if g.get("class") == "allowed")
    cells = torch.zeros(4, 4, dtype=torch.bool)
    for rect in group:
        x, y, width = (int(rect.attrib[name]) // CELL for name in ("x", "y", "width"))
        cells[y, x : x + width] = True
    assert torch.equal(cells, torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]], dtype=torch.bool))
    assert root.get("aria-label") == "causal & padding(attention_mask)"
    assert [e.text for e in root.iter("text") if e.get("class") == "value"] == list("0011")
    assert [e.text for e in root.iter("text") if e.get("class") in ("axis", "tick")] == ["keys →", "queries ↓", "0", "0"]


def test_svg_marks_the_witness():
    at = {"b": 0, "h": 0, "q": 40, "k": 3, "s": 41, "t": 41}
    root = ElementTree.fromstring(svg(only(Subject(ONE_CELL, claim=Causal().term(), witness=at), 8, 8), "x"))
    (mark,) = (e for e in root.iter("rect") if e.get("class") == "witness")
    (dot,) = (e for e in root.iter("circle") if e.get("class") == "differs")
    assert (mark.get("x"), mark.get("y")) == ("29", "69")
    assert (dot.get("cx"), dot.get("cy")) == ("35", "75")
    assert [e.text for e in root.iter("text") if e.get("class") == "tick"] == ["0", "4", "33", "37"]
