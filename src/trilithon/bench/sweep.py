"""`trilithon bench --sweep`: how the cost of a token grows with the number of prompts and with the tokens that are cached.

Each batch and context is a table of its own, with the floor of that job. A context counts all tokens of a prompt when the
job ends, so that a context of 32768 fits a model of 32768 positions. Batches and contexts grow in the order they are
measured: what an earlier one left behind is no larger than what a later one needs.

Our program is compiled once a batch, for the largest context that the model has positions for; where that fails, once a
context. The first context of a batch has the building in its row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from rich.console import Console
from torch import nn

from trilithon.bench.candidates import candidates, run_compiled
from trilithon.bench.measure import bench_of, random_ids
from trilithon.bench.roofline import Machine, measure_machine
from trilithon.bench.rows import Bench, Candidate, Run, free, run_rows
from trilithon.bench.sweep_table import Sweep
from trilithon.bench.timing import outside_bytes
from trilithon.capture import hf
from trilithon.compiled import Compiled
from trilithon.errors import InputError
from trilithon.options import Options

SWEPT = ("static", "hf-static")
BATCHES, CONTEXTS = (1, 8, 32), (2048, 8192, 32768)


def measure_sweep(
    model: nn.Module,
    name: str,
    new_tokens: int,
    *,
    batches: Sequence[int] = BATCHES,
    contexts: Sequence[int] = CONTEXTS,
    rows: Sequence[str] = SWEPT[:1],
    repeats: int = 3,
    backend: str = "auto",
    proof_cache: bool = True,
    command: str = "",
    console: Console | None = None,
    after_row: Callable[[Sweep], None] | None = None,
) -> Sweep:
    """Measure each of `rows` at each of `batches` and `contexts`; what does not fit is a row with its error.

    Args:
        new_tokens: of each prompt; the rest of its context is the prompt. At least 2, or there is no time per token.
        rows: names among `SWEPT`.
        after_row: called after each row with all that was measured so far.
        Others: as for `measure_model`.

    Raises:
        InputError: a row, batch or context cannot be swept, or the model is not a causal LM.
    """
    _check(rows, batches, contexts, new_tokens)
    candidates(model, random_ids(model, 1), new_tokens, rows=rows, backend=backend)  # refuses what cannot be measured
    parameter = next(model.parameters())
    machine = measure_machine(parameter.device, parameter.dtype)
    sweep = Sweep(())
    for row in [row for row in SWEPT if row in rows]:
        for batch in sorted(set(batches)):
            swept = _Batch(model, name, machine, row, batch, tuple(sorted(set(contexts))), new_tokens, backend, proof_cache)
            for bench, candidate in swept.jobs(repeats, command):
                table = run_rows([candidate], bench, console=console, release=partial(free, keep_compiled=row == "static"))
                sweep = sweep.adding(table)
                if after_row is not None:
                    after_row(sweep)
            swept.compiled = None
            free()
    return sweep


def _check(rows: Sequence[str], batches: Sequence[int], contexts: Sequence[int], new_tokens: int) -> None:
    others = [row for row in rows if row not in SWEPT]
    if others or not rows:
        raise InputError(
            f"cannot sweep row {others[0]!r}" if others else "no row to sweep", todo=f"the rows are {', '.join(SWEPT)}"
        )
    if not batches or min(batches) < 1:
        raise InputError("a batch must be 1 or more", todo="--batches 1,8,32")
    if new_tokens < 2:
        raise InputError("there is no time per token with one new token", todo="--new-tokens 2 or more")
    if not contexts or min(contexts) <= new_tokens:
        raise InputError(
            f"each context must be larger than {new_tokens}, the number of new tokens",
            why="it counts prompt and new tokens together",
            todo="--contexts 2k,8k,32k, or fewer --new-tokens",
        )


@dataclass
class _Batch:
    """One row at one number of prompts, over all contexts.

    Attributes:
        compiled: our program for all of them, once it was asked for.
        apart: it could not be had, and each context has a program of its own.
    """

    model: nn.Module
    name: str
    machine: Machine
    row: str
    batch: int
    contexts: tuple[int, ...]
    new_tokens: int
    backend: str
    proof_cache: bool
    compiled: Compiled | None = None
    apart: bool = False

    def jobs(self, repeats: int, command: str) -> list[tuple[Bench, Candidate]]:
        outside = outside_bytes(next(self.model.parameters()).device)  # before anything is built
        made = []
        for context in self.contexts:
            bench = bench_of(
                self.model,
                self.name,
                (self.batch, context - self.new_tokens),
                self.new_tokens,
                machine=self.machine,
                repeats=repeats,
                command=command,
            )
            name, make = (
                ("HF static cache", self._hf_static) if self.row == "hf-static" else ("Trilithon static cache", self._static)
            )
            made.append(
                (replace(bench, outside_before=outside), Candidate(name=name, make=partial(self._fitting, make, context)))
            )
        return made

    def _fitting(self, make: Callable[[int], Run], context: int) -> Run:
        positions = hf.max_positions(self.model)
        if context > positions:
            raise InputError(f"a context of {context} tokens does not fit", why=f"the model has {positions} positions")
        return make(context)

    def _hf_static(self, context: int) -> Run:
        fresh = hf.sharing_weights(self.model)  # a model's static cache is as large as the largest that it ever had
        ids = random_ids(self.model, context - self.new_tokens, batch=self.batch)
        (candidate,) = candidates(fresh, ids, self.new_tokens, rows=("hf-static",))
        return candidate.make()

    def _static(self, context: int) -> Run:
        ids = random_ids(self.model, context - self.new_tokens, batch=self.batch)
        return run_compiled(self._program(context), ids)

    def _program(self, context: int) -> Compiled:
        """The program for all contexts; where there is none, one for this context alone."""
        largest = max(c for c in self.contexts if c <= hf.max_positions(self.model))
        if self.compiled is None and not self.apart:
            try:
                self.compiled = self._compile(largest)
            except Exception:
                if context == largest:
                    raise
                self.apart = True
        if self.apart:
            free()  # what the failed attempt left
        return self.compiled or self._compile(context)

    def _compile(self, max_tokens: int) -> Compiled:
        from trilithon.compiler import compile as compile_model

        options = Options(proof_cache=self.proof_cache, max_batch=self.batch)
        return compile_model(self.model, max_tokens=max_tokens, backend=self.backend, options=options)
