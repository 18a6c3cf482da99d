"""`trilithon bench` and `trilithon demo`."""

from __future__ import annotations

import datetime
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trilithon.cli.common import Backend, Device, Dtype, Layers, NoCache, app, load, names
from trilithon.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from trilithon.bench.save import Saver
    from trilithon.bench.table import Table

PRESETS = ("qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b")  # what `bench --all` measures without a model

Models = Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", help="As for generate, one or several.")]
All = Annotated[
    bool, typer.Option("--all", help=f"Every row that can run here, saved in --out; without a model of {', '.join(PRESETS)}.")
]
PromptTokens = Annotated[int | None, typer.Option(min=1, help="Default: 2048 on a GPU, 128 on a CPU.")]
NewTokens = Annotated[int | None, typer.Option(min=1, help="Default: 128 on a GPU, 64 on a CPU.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed runs of each row, after one that is not timed.")]
Rows = Annotated[
    str | None,
    typer.Option(
        help="Rows to measure, joined by commas; the first is what the others are compared with. "
        "Default: pytorch,hf-dynamic,hf-static,kept,causal,static, or with --all what can run."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for JSON, Markdown and PNG of each model, saved after each row. With --all: benchmark-<date>."),
]
Json = Annotated[Path | None, typer.Option(help="Save the table of one model as JSON after each row.")]
Markdown = Annotated[Path | None, typer.Option(help="Save it as Markdown too.")]
Png = Annotated[Path | None, typer.Option(help="Save it as a chart too.")]


@dataclass(frozen=True)
class _Asked:
    """What to measure of each model; None = the default there."""

    prompt_tokens: int | None
    new_tokens: int | None
    repeats: int
    rows: tuple[str, ...] | None
    backend: str
    proof_cache: bool
    every: bool


@app.command()
def bench(
    models: Models = None,
    every: All = False,
    prompt_tokens: PromptTokens = None,
    new_tokens: NewTokens = None,
    dtype: Dtype = None,
    device: Device = None,
    layers: Layers = None,
    repeats: Repeats = 3,
    backend: Backend = "auto",
    rows: Rows = None,
    out: Out = None,
    json: Json = None,
    markdown: Markdown = None,
    png: Png = None,
    no_cache: NoCache = False,
) -> None:
    """Measure one greedy generation: PyTorch, Hugging Face's caches, Trilithon, and the floor of this machine."""
    from trilithon.bench.rows import free
    from trilithon.bench.save import Saver, device_stem

    chosen = tuple(models or (PRESETS if every else ()))
    files = Saver(json, markdown, png)
    _check(chosen, files, several=every or out is not None or len(chosen) > 1)
    asked = _Asked(prompt_tokens, new_tokens, repeats, None if rows is None else names(rows), backend, not no_cache, every)
    folder = out or (Path(f"benchmark-{datetime.date.today()}") if every else None)
    failed = False
    for name in chosen:
        module = load(name, dtype, device, layers)
        stem = f"{device_stem(next(module.parameters()).device)}-{Path(name).name}"
        table = _bench(module, name, asked, Saver.inside(folder, stem) if folder else files)
        del module
        free()  # before the next is loaded
        failed |= any(row.error for row in table.rows)
    if failed:
        raise typer.Exit(1)


def _check(models: tuple[str, ...], files: Saver, several: bool) -> None:
    if not models:
        raise InputError("bench needs a model or --all", todo="trilithon bench llama-3.2-1b")
    if several and files.files:
        raise InputError(
            "--json, --markdown and --png are the files of one model",
            why="a folder was asked for, or several models",
            todo="give --out DIR instead, which gets all of them",
        )


def _bench(module: nn.Module, name: str, asked: _Asked, saver: Saver) -> Table:
    """Measure, print and save one model."""
    from rich.console import Console

    from trilithon.bench.candidates import ROWS, runnable
    from trilithon.bench.measure import CPU_JOB, GPU_JOB, measure_model, random_ids

    device = next(module.parameters()).device
    job = GPU_JOB if device.type == "cuda" else CPU_JOB
    table = measure_model(
        module,
        name,
        random_ids(module, asked.prompt_tokens or job[0]),
        asked.new_tokens or job[1],
        repeats=asked.repeats,
        rows=(runnable(device) if asked.every else ROWS) if asked.rows is None else asked.rows,
        backend=asked.backend,
        proof_cache=asked.proof_cache,
        command=shlex.join(["trilithon", *map(short, sys.argv[1:])]),
        after_row=saver.after_row,
    )
    Console().print(table.to_rich())
    for path in saver.files:
        print(f"saved {path}")
    return table


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the reports, the table and the chart.")] = Path("out"),
) -> None:
    """Explain, compile, generate and measure small models on this machine, in a few minutes and without a GPU."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # all that is loaded lies here, and loads in a blink
    from rich.console import Console

    from trilithon.bench.demo import run_demo

    if not run_demo(out, Console()):
        raise typer.Exit(1)


def short(argument: str) -> str:
    """A folder of this machine says nothing to who reads the results: an absolute path is cut to its name."""
    return Path(argument).name if Path(argument).is_absolute() else argument
