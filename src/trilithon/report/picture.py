"""Draw a mask small: with half blocks for a terminal, as SVG for a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor

from trilithon.spec.masks import Documents, Formula, K, Mask, Padding, Q, S, SlidingWindow, T, parts
from trilithon.spec.term import Term
from trilithon.spec.traverse import substitute, tables, walk

LEFT_PADDING = 2  # zeros at the head of an example padding table
CELL = 10  # units of a cell in SVG


@dataclass(frozen=True)
class Drawing:
    """What a picture shows.

    Attributes:
        cells: bool `[queries, keys]`, True = may attend.
        every: one cell stands for the first of so many queries and keys.
        example: name -> one value a key, of the tables that were put in where the caller gave none.
    """

    cells: Tensor
    every: int
    example: dict[str, list[int]]

    @property
    def scale(self) -> str:
        """What one cell stands for, where that is more than one query and key."""
        return f"one cell for {self.every} queries and keys" if self.every > 1 else ""

    @property
    def caption(self) -> str:
        """All that has to be said with the picture, or ""."""
        tables = [f"for {name} = {' '.join(map(str, row))}" for name, row in self.example.items()]
        return "; ".join([self.scale, *tables] if self.scale else tables)


def draw(mask: Mask, s: int = 16, t: int = 16, inputs: Mapping[str, Tensor] | None = None) -> Drawing | str:
    """The cells of a picture of `s` queries and `t` keys, or why there is none.

    A window that would not show at that size is sampled at every n-th query and key.

    Args:
        inputs: the tables the mask reads, `[1, n]` each; for those left out a telling example is made.
    """
    every = _stride(mask, min(s, t))
    given = dict(inputs or {})
    missing = sorted(tables(mask.term()) - given.keys())
    examples = {name: _example(mask, name, t, every) for name in missing}
    unknown = [name for name, table in examples.items() if table is None]
    if unknown:
        return f"no picture: it depends on the values of {', '.join(unknown)}"
    known = {name: table for name, table in examples.items() if table is not None}
    spread = substitute(mask.term(), {Q: every * Q, K: every * K, S: every * S, T: every * T})
    cells = Formula(spread).materialize(1, 1, s, t, {**given, **known})[0, 0]
    return Drawing(cells, every, {name: table[0, ::every].tolist() for name, table in known.items()})


def picture(mask: Mask, s: int = 16, t: int = 16, inputs: Mapping[str, Tensor] | None = None) -> str:
    """A drawing of a mask in half blocks, two queries a line; see `draw` for the arguments.

    Below it stand the tables that were made up for it, the last digit of each value below its key.

            keys ->
            ┌────┐
    queries │█▄  │
            │███▄│
            └────┘
    """
    drawing = draw(mask, s, t, inputs)
    if isinstance(drawing, str):
        return drawing
    rows = drawing.cells.tolist()
    pairs = zip(rows[::2], [*rows[1::2], [False] * t], strict=False)
    bars = ["".join(_BLOCKS[bool(upper), bool(lower)] for upper, lower in zip(*pair, strict=True)) for pair in pairs]
    margins = ["queries ", *[" " * 8] * len(bars)]
    body = [f"{margin}│{bar}│" for margin, bar in zip(margins, bars, strict=False)]
    edge = "─" * t
    lines = [f"{'':8}keys ->", f"{'':8}┌{edge}┐", *body, f"{'':8}└{edge}┘"]
    lines += [f"{'':9}{_digits(row)}  {name}" for name, row in drawing.example.items()]
    return "\n".join([*lines, *([drawing.scale] if drawing.scale else [])])


_BLOCKS = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}


def svg(mask: Mask, s: int = 16, t: int = 16, inputs: Mapping[str, Tensor] | None = None) -> str:
    """The same picture as an SVG element; its colours are the page's classes `frame` and `allowed`.

    A mask that cannot be drawn gives a paragraph that says why.
    """
    drawing = draw(mask, s, t, inputs)
    if isinstance(drawing, str):
        return f'<p class="caption">{escape(drawing)}</p>'
    width, height = t * CELL, s * CELL
    runs = "".join(
        f'<rect x="{start * CELL}" y="{row * CELL}" width="{length * CELL}" height="{CELL}"/>'
        for row, cells in enumerate(drawing.cells.tolist())
        for start, length in _runs(cells)
    )
    grid = "".join(f"M{x} 0V{height}" for x in range(CELL, width, CELL)) + "".join(
        f"M0 {y}H{width}" for y in range(CELL, height, CELL)
    )
    return (
        f'<svg class="mask" viewBox="-16 -18 {width + 18} {height + 20}" role="img" aria-label="{escape(str(mask))}">'
        f'<text x="0" y="-6">keys →</text><text transform="translate(-6 {height}) rotate(-90)">← queries</text>'
        f'<rect class="ground" width="{width}" height="{height}"/><g class="allowed">{runs}</g>'
        f'<path class="grid" d="{grid}"/><rect class="frame" width="{width}" height="{height}"/></svg>'
    )


def _runs(cells: list[bool]) -> list[tuple[int, int]]:
    """Start and length of each run of True."""
    starts = [i for i, cell in enumerate(cells) if cell and (i == 0 or not cells[i - 1])]
    return [(i, next((j - i for j in range(i, len(cells)) if not cells[j]), len(cells) - i)) for i in starts]


def _stride(mask: Mask, cells: int) -> int:
    """1, or what makes twice the widest window fit the cells."""
    widths = [part.window_keys for part in parts(mask) if isinstance(part, SlidingWindow) and part.window_keys >= cells]
    return -(-2 * max(widths) // cells) if widths else 1


def _example(mask: Mask, name: str, t: int, every: int) -> Tensor | None:
    """A table `[1, t * every]` that shows what the mask does with it; None if the mask reads it in another way."""
    length = t * every
    for part in parts(mask):
        if isinstance(part, Padding) and part.table == name:
            return (torch.arange(length) >= LEFT_PADDING * every).long()[None]
        if isinstance(part, Documents) and _is_row_table(part.segment, name):
            restart = 3 * t // 8 * every
            positions = torch.cat([torch.arange(restart), torch.arange(length - restart)])
            return (positions if "position" in name else (torch.arange(length) >= restart).long())[None]
    return None


def _is_row_table(segment: Term, name: str) -> bool:
    reads = [x for x in walk([segment]) if x.op == "read" and x.args[0] == name]
    return all(len(x.args) == 3 and x.sort != "float" for x in reads)


def _digits(row: list[int]) -> str:
    """The last digit of each value, so that each stands below its key."""
    return "".join(str(value % 10) for value in row)
