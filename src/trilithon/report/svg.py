"""A drawing as an SVG element; its colours are the page's classes."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from trilithon.report.picture import Drawing

CELL = 10  # units
LEFT, TOP = 46, 28  # of the numbers and names of the axes
TICKS = 4  # cells from one number to the next


def svg(drawing: Drawing, name: str) -> str:
    """The picture, with numbered axes and the made-up tables below the keys.

    Args:
        name: what the picture shows, for who cannot see it.
    """
    rows, columns = drawing.cells.shape
    width, height = columns * CELL, rows * CELL
    bottom = height + 12 * len(drawing.below) + (2 if drawing.below else 0)
    box = f"{-LEFT} {-TOP} {max(width, 60) + LEFT + 2} {bottom + TOP + 2}"
    inside = [
        "<text class='axis' x='0' y='-17'>keys →</text>",
        "<text class='axis' x='-3' y='-5' text-anchor='end'>queries ↓</text>",
        *_ticks(drawing),
        f"<rect class='ground' width='{width}' height='{height}'/>",
        f"<g class='allowed'>{''.join(_runs(drawing))}</g>",
        f"<path class='grid' d='{_grid(width, height)}'/><rect class='frame' width='{width}' height='{height}'/>",
        *_marks(drawing),
        *_below(drawing, height),
    ]
    return f"<svg class='mask' viewBox='{box}' role='img' aria-label='{escape(name)}'>{''.join(inside)}</svg>"


def _runs(drawing: Drawing) -> Iterator[str]:
    """One rectangle for each run of allowed cells of a row."""
    for y, row in enumerate(drawing.cells.tolist()):
        start = 0
        for x, cell in enumerate([*row, False]):
            if not cell:
                if x > start:
                    yield f"<rect x='{start * CELL}' y='{y * CELL}' width='{(x - start) * CELL}' height='{CELL}'/>"
                start = x + 1


def _grid(width: int, height: int) -> str:
    lines = [f"M{x} 0V{height}" for x in range(CELL, width, CELL)] + [f"M0 {y}H{width}" for y in range(CELL, height, CELL)]
    return "".join(lines)


def _ticks(drawing: Drawing) -> Iterator[str]:
    """The number of every few queries and keys."""
    rows, columns = drawing.cells.shape
    for x in range(0, columns, TICKS):
        key = drawing.first[1] + x * drawing.every
        yield f"<text class='tick' x='{x * CELL + CELL / 2:g}' y='-5' text-anchor='middle'>{key}</text>"
    for y in range(0, rows, TICKS):
        query = drawing.first[0] + y * drawing.every
        yield f"<text class='tick' x='-3' y='{y * CELL + CELL / 2 + 2.5:g}' text-anchor='end'>{query}</text>"


def _marks(drawing: Drawing) -> Iterator[str]:
    """A dot in each cell where the claim says otherwise, and a frame around the witness."""
    if drawing.differs is not None:
        for y, x in drawing.differs.nonzero().tolist():
            yield f"<circle class='differs' cx='{x * CELL + CELL / 2:g}' cy='{y * CELL + CELL / 2:g}' r='2'/>"
    if drawing.witness is not None:
        y, x = drawing.witness
        yield f"<rect class='witness' x='{x * CELL - 1}' y='{y * CELL - 1}' width='{CELL + 2}' height='{CELL + 2}' rx='1.5'/>"


def _below(drawing: Drawing, height: int) -> Iterator[str]:
    """Each table's numbers below their keys; the caption names the tables in the same order."""
    for line, row in enumerate(drawing.below.values()):
        y = height + 10 + 12 * line
        for x, value in enumerate(row):
            yield f"<text class='value' x='{x * CELL + CELL / 2:g}' y='{y}' text-anchor='middle'>{value}</text>"
