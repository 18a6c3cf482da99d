"""`trilithon bench` and `trilithon demo`."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trilithon.cli.common import Backend, Device, Dtype, Layers, NoCache, app, load, names
from trilithon.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from trilithon.bench.save import Saver
    from trilithon.bench.table import Table

ALL = ("qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b")  # what `bench --all` measures
RESULTS = Path("benchmarks/results")


@app.command()
def bench(
    model: Annotated[str | None, typer.Argument(help="As for generate. Left out with --all.")] = None,
    every: Annotated[bool, typer.Option("--all", help=f"Measure {', '.join(ALL)}, one after the other.")] = False,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Default: 2048 on a GPU, 128 on a CPU.")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Default: 128 on a GPU, 64 on a CPU.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    layers: Layers = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each row, after one that is not timed.")] = 3,
    backend: Backend = "auto",
    rows: Annotated[
        str, typer.Option(help="Rows to measure, joined by commas; the first is what the others are compared with.")
    ] = "pytorch,hf-dynamic,hf-static,kept,causal,static",
    json: Annotated[
        Path | None,
        typer.Option(help="Save the table as JSON after each row. With --all a folder, by default benchmarks/results."),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Save it as Markdown too; with --all a folder.")] = None,
    png: Annotated[Path | None, typer.Option(help="Save it as a chart too; with --all a folder.")] = None,
    no_cache: NoCache = False,
) -> None:
    """Measure one greedy generation: PyTorch, Hugging Face's caches, Trilithon, and the floor of this machine."""
    from trilithon.bench.rows import free
    from trilithon.bench.save import Saver, device_stem

    if every == (model is not None):
        raise InputError("bench needs a model or --all, one of the two", todo="trilithon bench llama-3.2-1b")
    saver = Saver(json or (RESULTS if every else None), markdown, png)
    failed = False
    for name in ALL if model is None else (model,):
        module = load(name, dtype, device, layers)
        saves = saver.inside(f"{device_stem(next(module.parameters()).device)}-{name}") if every else saver
        table = _bench(module, name, prompt_tokens, new_tokens, repeats, names(rows), backend, saves, not no_cache)
        del module
        free()  # before the next is loaded
        failed |= any(row.error for row in table.rows)
    if failed:
        raise typer.Exit(1)


def _bench(
    module: nn.Module,
    name: str,
    prompt_tokens: int | None,
    new_tokens: int | None,
    repeats: int,
    rows: tuple[str, ...],
    backend: str,
    saver: Saver,
    proof_cache: bool,
) -> Table:
    """Measure, print and save one model."""
    from rich.console import Console

    from trilithon.bench.measure import CPU_JOB, GPU_JOB, measure_model, random_ids

    job = GPU_JOB if next(module.parameters()).is_cuda else CPU_JOB
    table = measure_model(
        module,
        name,
        random_ids(module, prompt_tokens or job[0]),
        new_tokens or job[1],
        repeats=repeats,
        rows=rows,
        backend=backend,
        proof_cache=proof_cache,
        command=shlex.join(["trilithon", *map(short, sys.argv[1:])]),
        after_row=saver.after_row,
    )
    Console().print(table.to_rich())
    for path in saver.finish(table):
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
