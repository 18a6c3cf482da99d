"""Run the same job in several ways and tabulate what each took, against the first way and against the floor."""

from __future__ import annotations

import datetime
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor

from trilithon.bench.roofline import Floor, Job, Machine, floor_of
from trilithon.bench.table import Row, Table
from trilithon.bench.timing import Timing, measure, outside_bytes, synchronize
from trilithon.errors import InputError, TrilithonError
from trilithon.lower.cuda_graph import free_workspaces

_STAGES = 3  # that progress shows for a candidate besides its timed runs

Run = Callable[[int], Tensor]  # number of new tokens -> ids [batch, prompt_tokens + new tokens]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to do the job.

    Attributes:
        name: of its row.
        make: builds the program (loading, compiling) for the whole job; gives a call that makes as many new tokens as it
            is told, the job's number or fewer, and returns ids `[batch, prompt_tokens + new tokens]`, the prompt included,
            as Hugging Face's `generate` does.
        note: a few words on it for the row.
        details: more words, asked for after the job was timed: what came out of building.
    """

    name: str
    make: Callable[[], Run]
    note: str = ""
    details: Callable[[], str] = str  # none


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all rows of a table share.

    Attributes:
        model: its name, for people.
        dtype: of weights and cache, as text.
        device: where the job runs and is measured.
        command: the line that repeats the table.
        versions: of packages besides those of `Machine`.
        repeats, warmup: runs that are timed and runs before them, a candidate; there is always one before them.
        weight_bytes: of the model as it is loaded; None = the matrices that the floor counts.
        outside_before: see `measure`; None = as it is before each candidate is built.
    """

    model: str
    job: Job
    machine: Machine
    dtype: str
    device: torch.device
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    repeats: int = 3
    warmup: int = 1
    weight_bytes: int | None = None
    outside_before: int | None = None

    @property
    def size_bytes(self) -> tuple[int, int]:
        """Of the weights, and of a KV cache that holds what its layers see of all tokens of the job."""
        return self.job.weight_bytes if self.weight_bytes is None else self.weight_bytes, self.job.cache_bytes


@dataclass(frozen=True)
class _Measured:
    build_seconds: float
    first_run_seconds: float
    timing: Timing
    tokens: Tensor  # [batch, new_tokens] int64, on the CPU
    first_token: Timing | str  # of the prompt and one new token, or the text of what went wrong


def run_rows(
    candidates: Sequence[Candidate],
    bench: Bench,
    *,
    console: Console | None = None,
    after_row: Callable[[Table], None] | None = None,
    release: Callable[[], None] | None = None,
) -> Table:
    """Build, check and time each candidate in turn; the first is the baseline.

    A candidate that fails becomes a row with the error's text; one that fails in making a single token keeps what the
    whole job took. What a candidate holds is freed before the next is
    built, as far as the caller's own objects let it.

    Args:
        console: where the progress bar is drawn; None = standard error. It is redrawn only between timed runs.
        after_row: called after each row with the table so far, so that an interrupted run keeps what it measured.
        release: frees what a candidate held; None = `free`.

    Raises:
        InputError: there is no candidate.
    """
    if not candidates:
        raise InputError("there is nothing to measure", todo="pass at least one Candidate; the first is the baseline")
    table = _empty_table(bench)
    baseline: _Measured | None = None
    with _progress(console) as progress:
        task = progress.add_task("", total=len(candidates) * (bench.repeats + _STAGES))
        for i, candidate in enumerate(candidates):
            progress.update(task, completed=i * (bench.repeats + _STAGES))
            start = time.perf_counter()
            result = _attempt(candidate, bench, lambda stage: _show(progress, task, stage))
            if i == 0 and isinstance(result, _Measured):
                baseline = result
            row = _row(candidate, result, baseline, bench, table.floor)
            row = replace(row, total_seconds=time.perf_counter() - start)
            table = replace(table, rows=(*table.rows, row))
            del result
            (release or free)()
            if after_row is not None:
                after_row(table)
    return table


def _empty_table(bench: Bench) -> Table:
    weights, cache = bench.size_bytes
    return Table(
        model=bench.model,
        machine=bench.machine,
        dtype=bench.dtype,
        batch=bench.job.batch,
        prompt_tokens=bench.job.prompt_tokens,
        new_tokens=bench.job.new_tokens,
        floor=floor_of(bench.job, bench.machine),
        rows=(),
        weight_bytes=weights,
        cache_bytes=cache,
        command=bench.command,
        versions=dict(bench.machine.versions) | dict(bench.versions),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _progress(console: Console | None) -> Progress:
    # No refresh from a thread: it would take the interpreter lock away from the run that is being timed.
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=console or Console(stderr=True), auto_refresh=False, transient=True)


def _show(progress: Progress, task: object, stage: str) -> None:
    progress.update(task, description=stage, advance=1)  # type: ignore[arg-type]
    progress.refresh()


def _attempt(candidate: Candidate, bench: Bench, show: Callable[[str], None]) -> _Measured | str:
    """Measure one candidate, or give the text of what went wrong."""
    try:
        return _measure(candidate, bench, show)
    except Exception as error:
        return _text(error)


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, TrilithonError) else f"{type(error).__name__}: {error}"


def _measure(candidate: Candidate, bench: Bench, show: Callable[[str], None]) -> _Measured:
    show(f"{candidate.name}: building")
    outside = outside_bytes(bench.device) if bench.outside_before is None else bench.outside_before
    start = time.perf_counter()
    run = candidate.make()
    synchronize(bench.device)
    build_seconds = time.perf_counter() - start
    show(f"{candidate.name}: first run")
    new_tokens = bench.job.new_tokens
    tokens = _new_tokens(run(new_tokens), bench.job, new_tokens)
    first_run_seconds = time.perf_counter() - start - build_seconds
    timing = measure(
        lambda: run(new_tokens),
        repeats=bench.repeats,
        warmup=max(0, bench.warmup - 1),
        device=bench.device,
        before_run=lambda: show(f"{candidate.name}: timing"),
        outside_before=outside,
    )
    show(f"{candidate.name}: first token")
    first_token = timing if new_tokens == 1 else _time_first_token(run, bench)
    return _Measured(build_seconds, first_run_seconds, timing, tokens, first_token)


def _time_first_token(run: Run, bench: Bench) -> Timing | str:
    try:
        _new_tokens(run(1), bench.job, 1)
        return measure(lambda: run(1), repeats=bench.repeats, warmup=max(0, bench.warmup - 1), device=bench.device)
    except Exception as error:
        return _text(error)


def _new_tokens(ids: Tensor, job: Job, new_tokens: int) -> Tensor:
    expected = (job.batch, job.prompt_tokens + new_tokens)
    if tuple(ids.shape) != expected:
        raise InputError(
            f"the job was not done: the run returned ids {list(ids.shape)}, not {list(expected)}",
            why="rows are comparable only when each makes the same number of tokens",
            todo="generate without an eos_token_id, and return the prompt with the new tokens",
        )
    return ids[:, job.prompt_tokens :].cpu()


def _row(candidate: Candidate, result: _Measured | str, baseline: _Measured | None, bench: Bench, floor: Floor) -> Row:
    tokens = bench.job.batch * bench.job.new_tokens
    if isinstance(result, str):
        return Row(name=candidate.name, tokens=tokens, note=candidate.note, error=result)
    median = result.timing.median
    equal, difference, failure = None, "", ""
    if isinstance(result.first_token, str):
        failure = f"the first token alone was not measured: {result.first_token}"
    if baseline is not None and baseline is not result:
        equal, difference = _compare(result.tokens, baseline.tokens)
    return Row(
        name=candidate.name,
        tokens=tokens,
        timing=result.timing,
        build_seconds=result.build_seconds,
        first_run_seconds=result.first_run_seconds,
        ratio_to_baseline=baseline.timing.median / median if baseline is not None else None,
        ratio_to_floor=median / floor.seconds,
        tokens_per_second=tokens / median,
        peak_ratio_to_size=_peak_ratio(result.timing, bench),
        tokens_equal_baseline=equal,
        note="; ".join(part for part in (candidate.note, candidate.details(), difference, failure) if part),
        **_token_seconds(result, bench.job, floor),
    )


def _peak_ratio(timing: Timing, bench: Bench) -> float | None:
    """None on a CPU, where the peak is that of the whole process."""
    if bench.device.type != "cuda" or timing.peak_bytes is None:
        return None
    return timing.peak_bytes / sum(bench.size_bytes)


def _token_seconds(result: _Measured, job: Job, floor: Floor) -> dict[str, Any]:
    """The fields of a row on the first token and the others, as far as they are known."""
    if isinstance(result.first_token, str):
        return {}
    first = result.first_token.median
    found = {"first_token_seconds": first, "first_token_ratio_to_floor": first / floor.prefill_seconds}
    steps = job.new_tokens - 1
    if steps:
        found["seconds_per_token"] = (result.timing.median - first) / steps
        found["token_ratio_to_floor"] = (result.timing.median - first) / floor.decode_seconds
    return found


def _compare(tokens: Tensor, baseline: Tensor) -> tuple[bool, str]:
    differs = (tokens != baseline).any(0)
    if not bool(differs.any()):
        return True, ""
    first = int(differs.int().argmax()) + 1
    return False, f"tokens differ from the baseline's from new token {first} of {len(differs)} on"


def free(keep_compiled: bool = False) -> None:
    """Give back the memory of what nobody holds any more, and of what torch compiled unless that is kept."""
    if not keep_compiled and "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # drops compiled programs and the memory pools of their CUDA graphs
    gc.collect()
    if torch.cuda.is_initialized():
        free_workspaces()
