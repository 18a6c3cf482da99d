"""`trilithon batch`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trilithon.cli.common import (
    Backend,
    CacheDtype,
    Device,
    Dtype,
    Eos,
    Layers,
    MinNewTokens,
    MinP,
    NoCache,
    RepetitionPenalty,
    Stop,
    Temperature,
    TopK,
    TopP,
    app,
    generation,
)
from trilithon.errors import InputError

if TYPE_CHECKING:
    from trilithon.batch.load import Setup
    from trilithon.batch.run import Engine, Files, Progress
    from trilithon.cli.batch_model import BatchModel

ENGINES = ("local", "ray")


@app.command()
def batch(
    model: Annotated[str, typer.Option(help="A folder that trilithon compile wrote; or a model as for generate.")],
    input: Annotated[Path, typer.Option(help='Lines such as {"id": "a", "prompt": "text", "max_new_tokens": 8}.')],
    output: Annotated[Path, typer.Option(help="Gets a line for each that is answered; run again, it is gone on with.")],
    errors: Annotated[Path | None, typer.Option(help="Gets what is refused, and why. Default: OUTPUT.errors.jsonl.")] = None,
    engine: Annotated[str, typer.Option(help="local: in this process. ray: on one machine or many.")] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Processes of Ray's that hold the model, on a GPU each or a core.")] = 1,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster. Default: $RAY_ADDRESS, else this machine.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Lines at once. Default: rows of the cache; of a model, 8.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a line that does not say.")] = 64,
    min_new_tokens: MinNewTokens = 0,
    temperature: Temperature = 0.0,
    top_k: TopK = 50,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Annotated[int, typer.Option(help="Of drawn tokens, with the id of a line; and of random weights.")] = 0,
    eos: Eos = True,
    stop: Stop = [],  # noqa: B006
    backend: Backend = "auto",
    dtype: Dtype = None,
    device: Device = None,
    layers: Layers = None,
    max_tokens: Annotated[int | None, typer.Option(help="Capacity of a row of the cache. Default: 4096.")] = None,
    cache_dtype: CacheDtype = None,
    no_cache: NoCache = False,
) -> None:
    """Answer the lines of a file, on one machine or many. A line that ends makes room for the next at once."""
    from trilithon.batch.load import Setup
    from trilithon.batch.run import Files
    from trilithon.cli.batch_model import BatchModel

    arguments = generation(max_new_tokens, min_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, eos)
    setup = Setup(arguments, tuple(stop), seed, batch_size)
    source = BatchModel(model, backend, dtype, device, layers, seed, max_tokens, cache_dtype, batch_size or 8, not no_cache)
    files = Files(input, output, errors or output.with_name(f"{output.name}.errors.jsonl"))
    chosen = _engine(engine, source, setup, workers, address, output)
    _run(files, {"model": source.identity(), **setup.decides()}, chosen)


def _run(files: Files, settings: dict[str, Any], engine: Engine) -> None:
    from trilithon.batch.run import run

    with _shown() as watch:
        found = run(files, settings, engine, watch)
    print(f"{found.before + found.answered} of {found.total} lines are answered in {files.output}")
    if found.refused:
        print(f"{found.refused} were refused: {files.errors} says why")


def _engine(name: str, source: BatchModel, setup: Setup, workers: int, address: str | None, output: Path) -> Engine:
    from trilithon.batch.local import LocalEngine
    from trilithon.batch.ray import RayEngine

    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}", todo=f"choose one of {', '.join(ENGINES)}")
    if name == "ray":
        return RayEngine(setup, lambda: source.folder(output), source.device, workers, address)
    if workers > 1 or address is not None:
        raise InputError("--workers and --address are of the engine ray", todo="pass --engine ray, or leave them out")
    return LocalEngine(lambda: source.worker(setup))


@contextmanager
def _shown() -> Iterator[Callable[[Progress], None]]:
    """A bar on stderr, and how many tokens a second."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("lines  {task.fields[rate]}"))
    with Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task, began = bar.add_task("", total=None, rate=""), list[tuple[float, int]]()

        def watch(progress: Progress) -> None:
            if progress.tokens and not began:  # to load the model is no part of the speed
                began.append((monotonic(), progress.tokens))
            rate = _rate(monotonic() - began[0][0], progress.tokens - began[0][1]) if began else ""
            bar.update(task, total=progress.total, completed=progress.done, rate=rate)

        yield watch


def _rate(seconds: float, tokens: int) -> str:
    return f"{tokens / seconds:,.0f} tokens/s" if tokens and seconds else ""
