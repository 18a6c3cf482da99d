"""A bar chart of a benchmark table: job time a row, with the floor as a line."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from trilithon.bench.table import Row, Table, show_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BASELINE, _OTHER, _FLOOR, _SPREAD = "#9aa5b1", "#2b6cb0", "#c53030", "#1a202c"


def save_plot(table: Table, path: Path | str) -> Path:
    """Write the chart as a PNG, 150 dots an inch, without a display.

    Each bar is the median, its whisker the fastest and the slowest run; a failed row keeps its place without a bar.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only this function draws
    from matplotlib.figure import Figure

    path = Path(path)
    figure = Figure(figsize=(10, 1.9 + 0.55 * len(table.rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_bars(axes, table)
    _draw_floor(axes, table)
    axes.set_title("\n".join((table.title(), *_subtitle(table))), fontsize=10, loc="left")
    axes.set_xlabel("seconds for the whole job, median; whiskers: fastest and slowest run")
    axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG so that whoever looks finds the old one or all of the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    figure.savefig(part, dpi=150, format="png")
    os.replace(part, path)
    return path


def _draw_bars(axes: Axes, table: Table) -> None:
    medians = [row.timing.median if row.timing else 0.0 for row in table.rows]
    colours = [_BASELINE] + [_OTHER] * (len(table.rows) - 1)
    axes.barh(range(len(medians)), medians, color=colours, height=0.62)
    for place, row in enumerate(table.rows):
        right = row.timing.maximum if row.timing else table.floor.seconds
        if row.timing:
            axes.plot([row.timing.minimum, row.timing.maximum], [place, place], color=_SPREAD, linewidth=1.2)
        axes.annotate(
            _label(row, baseline=place == 0), (right, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_yticks(range(len(medians)), ["\n".join(textwrap.wrap(row.name, 30)) for row in table.rows])
    axes.invert_yaxis()
    longest = max([table.floor.seconds] + [row.timing.maximum for row in table.rows if row.timing])
    axes.set_xlim(0, longest * 1.45)  # room for the labels


def _label(row: Row, baseline: bool) -> str:
    if row.timing is None:
        return "failed"
    parts = [show_seconds(row.timing.median)]
    if baseline:
        parts.append("baseline")
    elif row.ratio_to_baseline is not None:
        parts.append(f"{row.ratio_to_baseline:.2f}x as fast")
    if row.tokens_per_second is not None:
        parts.append(f"{row.tokens_per_second:,.0f} tokens/s")
    return ", ".join(parts)


def _draw_floor(axes: Axes, table: Table) -> None:
    axes.axvline(table.floor.seconds, color=_FLOOR, linestyle="--", linewidth=1.2)
    axes.annotate(
        f"floor {show_seconds(table.floor.seconds)}",
        (table.floor.seconds, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -4),
        textcoords="offset points",
        va="top",
        color=_FLOOR,
        fontsize=9,
    )


def _subtitle(table: Table) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in table.versions.items())
    return [table.footing()[0], *textwrap.wrap(versions, 95)]
