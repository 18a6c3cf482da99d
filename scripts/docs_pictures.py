"""Draw the pictures of the documentation into docs/pictures: masks as Trilithon means them, and committed measurements."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from torch import Tensor

import trilithon
from trilithon.bench.sweep_plot import sweep_figure
from trilithon.bench.sweep_table import Sweep
from trilithon.bench.table import Table, show_seconds
from trilithon.spec import term as t
from trilithon.spec.masks import B, Q

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"
TOKENS = 16
ALLOWED, WRONG, GROUND, FLOOR, GREY = "#2b6cb0", "#e2a03f", "#f4f5f7", "#c53030", "#9aa5b1"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "trilithon", "font.size": 9, "font.family": "sans-serif"}

KERNELS = ("norm, q, k, v", "rotary, cache, attention", "output projection", "norm, gate, up, SiLU", "down")  # of a layer

PADDED = torch.tensor([[0] * 4 + [1] * 12])
PACKED = torch.tensor([[0] * 5 + [1] * 7 + [2] * 4])
DOCUMENTS = trilithon.Documents(t.read("document", (B, Q), "int"))
MASKS: dict[str, tuple[trilithon.Mask, dict[str, Tensor]]] = {
    "causal": (trilithon.Causal(), {}),
    "window(4)": (trilithon.SlidingWindow(4), {}),
    "causal & chunked(6)": (trilithon.Causal() & trilithon.Chunked(6), {}),
    "causal & padding(attention_mask)": (trilithon.Causal() & trilithon.Padding(), {"attention_mask": PADDED}),
    "causal & documents(position_ids)": (trilithon.Causal() & DOCUMENTS, {"document": PACKED}),
    "full": (trilithon.Full(), {}),
}


def cells(mask: trilithon.Mask, inputs: dict[str, Tensor]) -> Tensor:
    return mask.materialize(1, 1, TOKENS, TOKENS, inputs)[0, 0]


def draw_cells(axes: Axes, allowed: Tensor, colour: str) -> None:
    """One rectangle for each run of cells of a row."""
    for y, row in enumerate(allowed.tolist()):
        runs = [(x, len(list(same))) for x, same in _runs(row)]
        axes.broken_barh(runs, (y, 1), facecolors=colour, edgecolors=colour, linewidth=0.4)


def _runs(row: list[bool]) -> Iterable[tuple[int, list[int]]]:
    for cell, places in groupby(range(len(row)), key=lambda x: row[x]):
        same = list(places)
        if cell:
            yield same[0], same


def frame(axes: Axes, title: str) -> None:
    axes.set(xlim=(0, TOKENS), ylim=(TOKENS, 0), aspect="equal", xticks=[], yticks=[], facecolor=GROUND)
    axes.set_title(title, fontsize=9.5)


def masks() -> Figure:
    """Six masks; in orange what a flag "every mask is causal" would get wrong."""
    figure = Figure(figsize=(8.2, 6.3), layout="constrained")
    causal = cells(trilithon.Causal(), {})
    for axes, (name, (mask, inputs)) in zip(figure.subplots(2, 3).flat, MASKS.items(), strict=True):
        allowed = cells(mask, inputs)
        draw_cells(axes, allowed & causal, ALLOWED)
        draw_cells(axes, allowed ^ causal, WRONG)
        wrong = int((allowed ^ causal).sum())
        frame(axes, name)
        axes.set_xlabel(f"{wrong} of {TOKENS**2} cells wrong as causal" if wrong else "right as causal", fontsize=8.5)
    figure.axes[0].set_ylabel("queries")
    return figure


def seen() -> Figure:
    """One mask twice: the numbers that a compiler is given, and what they are proved to be."""
    figure = Figure(figsize=(8.2, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    window = cells(trilithon.SlidingWindow(4), {})
    frame(left, "what a compiler is given: a tensor of float32")
    for y, row in enumerate(window[:8, :8].tolist()):
        for x, allowed in enumerate(row):
            text = "0" if allowed else "-3e38"
            left.text(2 * x + 1, 2 * y + 1, text, ha="center", va="center", fontsize=6.5)
    left.set_xlabel("made at run time; here 8 by 8 of it", fontsize=8.5)
    frame(right, "what is proved: window(4)")
    draw_cells(right, window, ALLOWED)
    right.set_xlabel("k <= q and k >= q - 3, for every number of tokens", fontsize=8.5)
    return figure


def job(name: str, title: str) -> Figure:
    """The job time of each row of a committed table, and its floor."""
    table = Table.from_json((RESULTS / name).read_text())
    rows = [row for row in table.rows if row.timing is not None]
    figure = Figure(figsize=(8.2, 0.9 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    medians = [row.timing.median * 1e3 for row in rows if row.timing]
    axes.barh(
        range(len(rows)),
        medians,
        height=0.6,
        color=[GREY if row.name.startswith(("PyTorch", "HF")) else ALLOWED for row in rows],
    )
    for y, median in enumerate(medians):
        text = show_seconds(median / 1e3)
        axes.annotate(text, (median, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5)
    floor = table.floor.seconds * 1e3
    axes.axvline(floor, color=FLOOR, linestyle="--", linewidth=1.2, label=f"floor {floor:.3g} ms")
    axes.legend(fontsize=8.5, loc="lower right", frameon=False)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set(xlim=(0, max(medians) * 1.12), xlabel="ms for the whole job, median")
    axes.set_title(f"{title}, {table.prompt_tokens} tokens in, {table.new_tokens} out, {table.machine.name}", fontsize=9.5)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def step() -> Figure:
    """Kernels of a layer in a decode step, against the time that their weights take."""
    models: dict[str, Any] = json.loads((RESULTS / "h200-step-kernels.json").read_text())["models"]
    measured = {name: [k for k in m["kernels"] if k["calls"] > 1] for name, m in models.items() if m.get("kernels")}
    figure = Figure(figsize=(8.2, 3), layout="constrained")
    for axes, (name, kernels) in zip(figure.subplots(1, len(measured), sharey=True), measured.items(), strict=True):
        places = range(len(kernels))
        axes.barh(places, [kernel["us"] for kernel in kernels], height=0.6, color=ALLOWED, label="measured")
        floors = [kernel["floor_us"] or 0 for kernel in kernels]
        axes.barh(places, floors, height=0.25, color=FLOOR, label="its weights at copy bandwidth")
        axes.set_yticks(places, KERNELS)
        axes.set(title=f"{name}, NVIDIA H200", xlabel="us a call")
        axes.title.set_fontsize(9.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    return figure


def sweep(file: str) -> Figure:
    """Time of a decode step against batch and context."""
    return sweep_figure(Sweep.from_json((RESULTS / file).read_text()))


DRAWINGS: dict[str, Callable[[], Figure]] = {
    "masks": masks,
    "seen": seen,
    "job-llama-3.2-1b": lambda: job("h200-llama-3.2-1b.json", "Llama-3.2-1B"),
    "job-qwen3-0.6b": lambda: job("h200-qwen3-0.6b.json", "Qwen3-0.6B"),
    "job-qwen2.5-0.5b": lambda: job("h200-qwen2.5-0.5b.json", "Qwen2.5-0.5B"),
    "rows-llama-3.2-1b": lambda: job("h100-llama-3.2-1b-table.json", "Llama-3.2-1B"),
    "sweep-llama-3.2-1b": lambda: sweep("h200-llama-3.2-1b-sweep.json"),
    "step": step,
}


def main(folder: Path = PICTURES) -> None:
    """Write every picture as SVG; the same data gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWINGS.items():
        with matplotlib.rc_context(STYLE):
            figure = draw()
            FigureCanvasSVG(figure)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None}, facecolor="white")


if __name__ == "__main__":
    main()
