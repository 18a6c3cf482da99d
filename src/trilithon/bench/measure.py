"""Measure one model: its rows on this machine, with the floor of the job."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from torch import Tensor, nn

from trilithon.bench.candidates import ROWS, candidates, decoder_size
from trilithon.bench.roofline import Job, Machine, measure_machine
from trilithon.bench.rows import Bench, run_rows
from trilithon.bench.table import Table
from trilithon.compiled import Compiled
from trilithon.report.versions import versions

CPU_JOB, GPU_JOB = (128, 64), (2048, 128)  # tokens in, tokens out, where the caller does not say


def random_ids(model: nn.Module, tokens: int, seed: int = 0, batch: int = 1) -> Tensor:
    """Prompts `[b s]` of random ids, on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, int(model.config.vocab_size), (batch, tokens), generator=generator)  # type: ignore[union-attr, arg-type]
    return ids.to(next(model.parameters()).device)


def measure_model(
    model: nn.Module,
    name: str,
    ids: Tensor,
    new_tokens: int,
    *,
    repeats: int = 3,
    rows: Sequence[str] = ROWS,
    backend: str = "auto",
    proof_cache: bool = True,
    command: str = "",
    compiled: Compiled | None = None,
    console: Console | None = None,
    after_row: Callable[[Table], None] | None = None,
) -> Table:
    """Run the rows of `candidates` on this machine; see there for the arguments.

    Args:
        name: of the model, for people.
        repeats: timed runs of a row.
        command: the line that repeats the table.
        console: where the progress bar is drawn.
        after_row: called after each row with the table so far.
    """
    chosen = candidates(model, ids, new_tokens, rows=rows, backend=backend, proof_cache=proof_cache, compiled=compiled)
    batch, prompt = ids.shape
    bench = bench_of(model, name, (batch, prompt), new_tokens, repeats=repeats, command=command)
    return run_rows(chosen, bench, console=console, after_row=after_row)


def bench_of(
    model: nn.Module,
    name: str,
    prompts: tuple[int, int],
    new_tokens: int,
    *,
    machine: Machine | None = None,
    repeats: int,
    command: str,
) -> Bench:
    """What the rows of a table share.

    Args:
        prompts: how many, and tokens of each.
        machine: where the model lies; None = it is measured.
        Others: as for `measure_model`.
    """
    parameter = next(model.parameters())
    batch, prompt = prompts
    job = Job(
        size=decoder_size(model),
        value_bytes=parameter.element_size(),
        prompt_tokens=prompt,
        new_tokens=new_tokens,
        batch=batch,
    )
    return Bench(
        model=name,
        job=job,
        machine=machine or measure_machine(parameter.device, parameter.dtype),
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=parameter.device,
        command=command,
        versions={name: version for name, version in versions().items() if name in ("trilithon", "transformers")},
        repeats=repeats,
        warmup=2 if parameter.is_cuda else 1,  # CUDA graphs of prompts are captured in the second run
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
    )
