"""Two panels of a sweep: seconds of a decode step against the context, and against the batch, with the floors."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trilithon.bench.plot import save_figure
from trilithon.bench.sweep_table import Sweep, context_of, short_name, show_tokens, step_floor
from trilithon.bench.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#2b6cb0", "#dd6b20", "#2f855a", "#b83280", "#744210", "#4a5568")
_STYLES = {"Trilithon static cache": ("o", "-"), "HF static cache": ("s", ":")}  # marker, line
_FLOOR = (0, (6, 3))  # dashes
Size = Callable[[Table], int]


def save_sweep_plot(sweep: Sweep, path: Path | str) -> Path:
    """Write the chart as a PNG, 150 dots an inch, without a display. A row that failed has no point; its floor stands."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = sweep_figure(sweep)
    FigureCanvasAgg(figure)
    return save_figure(figure, Path(path))


def sweep_figure(sweep: Sweep) -> Figure:
    """See `save_sweep_plot`; without a canvas."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw(left, sweep, along=context_of, apart=_batch_of)
    _draw(right, sweep, along=_batch_of, apart=context_of)
    contexts, batches = (sorted({size(table) for table in sweep.tables}) for size in (context_of, _batch_of))
    _finish(left, "context: tokens of each prompt when the job ends", contexts, show_tokens, columns=len(batches))
    _finish(right, "batch: prompts at a time", batches, str, columns=len(contexts))
    left.set_ylabel("ms per decode step (one token of each prompt)")
    footing = sweep.tables[0].footing()
    versions = ", ".join(f"{name} {version}" for name, version in sweep.tables[0].versions.items())
    figure.suptitle("\n".join((sweep.title(), footing[0], *textwrap.wrap(versions, 120))), fontsize=10, x=0.01, ha="left")
    return figure


def _batch_of(table: Table) -> int:
    return table.batch


def _draw(axes: Axes, sweep: Sweep, along: Size, apart: Size) -> None:
    """One colour for each value of `apart`: the rows as lines with points, the floor dashed."""
    rows = list(dict.fromkeys(row.name for table in sweep.tables for row in table.rows))
    for i, value in enumerate(sorted({apart(table) for table in sweep.tables})):
        tables = sorted((table for table in sweep.tables if apart(table) == value), key=along)
        colour = _COLOURS[i % len(_COLOURS)]
        what = f"batch {value}" if apart is _batch_of else f"context {show_tokens(value)}"
        for name in rows:
            marker, line = _STYLES.get(name, ("^", "-."))
            points = [(along(t), seconds * 1e3) for t in tables if (seconds := _step(t, name)) is not None]
            label = f"{what}, {short_name(name)}{'' if points else ': failed'}"
            axes.plot(*_columns(points), marker=marker, linestyle=line, color=colour, linewidth=1.6, markersize=5, label=label)
        floors = [(along(t), step_floor(t) * 1e3) for t in tables]
        axes.plot(*_columns(floors), linestyle=_FLOOR, color=colour, linewidth=1, alpha=0.8, label=f"{what}, floor")


def _step(table: Table, name: str) -> float | None:
    return next((row.seconds_per_token for row in table.rows if row.name == name), None)


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _finish(axes: Axes, label: str, sizes: list[int], show: Callable[[int], str], columns: int) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [show(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(labelleft=True)
    axes.set_xlabel(label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=min(columns, 4), fontsize=8, frameon=False)
