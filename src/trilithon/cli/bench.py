"""`trilithon bench` and `trilithon demo`."""

from __future__ import annotations

import datetime
import os
import re
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
    from trilithon.bench.sweep_table import Sweep
    from trilithon.bench.table import Table

PRESETS = ("qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b")  # what `bench --all` measures without a model

Models = Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", help="As for generate, one or several.")]
All = Annotated[
    bool, typer.Option("--all", help=f"Every row that can run here, saved in --out; without a model of {', '.join(PRESETS)}.")
]
PromptTokens = Annotated[int | None, typer.Option(min=1, help="Default: 2048 on a GPU, 128 on a CPU.")]
NewTokens = Annotated[int | None, typer.Option(min=1, help="Default: 128 on a GPU, 64 on a CPU.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed runs of each row, after one (on a GPU two) that is not timed.")]
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


SweepOption = Annotated[
    bool,
    typer.Option("--sweep", help="How the cost of a token grows: the row static (or of --rows static,hf-static) in all sizes."),
]
Batches = Annotated[str, typer.Option(help="Prompts at a time, for --sweep.")]
Contexts = Annotated[str, typer.Option(help="Tokens of each prompt, new ones included, for --sweep.")]


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
    batches: tuple[int, ...]
    contexts: tuple[int, ...]


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
    sweep: SweepOption = False,
    batches: Batches = "1,8,32",
    contexts: Contexts = "2k,8k,32k",
    no_cache: NoCache = False,
) -> None:
    """Measure one greedy generation: PyTorch, Hugging Face's caches, Trilithon, and the floor of this machine."""
    from trilithon.bench.rows import free
    from trilithon.bench.save import Saver, device_stem

    chosen = tuple(models or (PRESETS if every else ()))
    files = Saver(json, markdown, png)
    _check(chosen, files, out is not None, every, sweep, prompt_tokens)
    kept = None if rows is None else names(rows)
    sizes = (_sizes(batches), _sizes(contexts))
    asked = _Asked(prompt_tokens, new_tokens, repeats, kept, backend, not no_cache, every, *sizes)
    folder = out or (_dated() if every or (sweep and not files.files) else None)
    failed = False
    for name in chosen:
        module = load(name, dtype, device, layers)
        stem = f"{device_stem(next(module.parameters()).device)}-{Path(name).name}{'-sweep' if sweep else ''}"
        measure = _sweep if sweep else _bench
        failed |= not measure(module, name, asked, Saver.inside(folder, stem) if folder else files)
        del module
        free()  # before the next is loaded
    if failed:
        raise typer.Exit(1)


def _check(models: tuple[str, ...], files: Saver, out: bool, every: bool, sweep: bool, prompt_tokens: int | None) -> None:
    if not models:
        raise InputError("bench needs a model or --all", todo="trilithon bench llama-3.2-1b")
    if files.files and (every or out or len(models) > 1):
        raise InputError(
            "--json, --markdown and --png are the files of one model",
            why="a folder was asked for, or several models",
            todo="give --out DIR instead, which gets all of them",
        )
    if sweep and (every or prompt_tokens is not None):
        raise InputError("--sweep was given with --all or --prompt-tokens", todo="leave these out; --contexts gives the sizes")


def _dated() -> Path:
    return Path(f"benchmark-{datetime.date.today()}")


def _sizes(text: str) -> tuple[int, ...]:
    """Numbers joined by commas; a k behind one stands for 1024."""
    found = [re.fullmatch(r"(\d+)(k?)", name.lower()) for name in names(text)]
    if not found or None in found:
        raise InputError(f"cannot read the sizes {text!r}", todo="join whole numbers by commas, such as 1,8,32 or 2k,8k,32k")
    return tuple(int(match[1]) * (1024 if match[2] else 1) for match in found if match)


def _sweep(module: nn.Module, name: str, asked: _Asked, saver: Saver) -> bool:
    """Measure, print and save one model in all sizes; False if none of them could be measured."""
    from trilithon.bench.measure import CPU_JOB, GPU_JOB
    from trilithon.bench.sweep import SWEPT, measure_sweep

    job = GPU_JOB if next(module.parameters()).is_cuda else CPU_JOB
    sweep = measure_sweep(
        module,
        name,
        asked.new_tokens or job[1],
        batches=asked.batches,
        contexts=asked.contexts,
        rows=asked.rows or SWEPT[:1],
        repeats=asked.repeats,
        backend=asked.backend,
        proof_cache=asked.proof_cache,
        command=_command(),
        after_row=saver.after_row,
    )
    _print(sweep, saver)
    return any(row.timing for table in sweep.tables for row in table.rows)


def _bench(module: nn.Module, name: str, asked: _Asked, saver: Saver) -> bool:
    """Measure, print and save one model; False if a row failed."""
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
        command=_command(),
        after_row=saver.after_row,
    )
    _print(table, saver)
    return not any(row.error for row in table.rows)


def _command() -> str:
    return shlex.join(["trilithon", *map(short, sys.argv[1:])])


def _print(measured: Table | Sweep, saver: Saver) -> None:
    from rich.console import Console

    Console().print(measured.to_rich())
    for path in saver.files:
        print(f"saved {path}")


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
