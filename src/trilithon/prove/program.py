"""Examine every attention site of a program; equal masks are proved once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.export import ExportedProgram

from trilithon.capture.sites import Site, find_sites
from trilithon.errors import CannotLift, InputError
from trilithon.lift.meaning import Meaning, lift_site
from trilithon.prove.prove import Finding, Ranges, examine
from trilithon.prove.solve import Prover
from trilithon.prove.verdict import Proof, Verdict
from trilithon.spec.assumption import Assumption
from trilithon.spec.term import Term


@dataclass(frozen=True)
class Examined:
    """A site with what was found: a finding, or the refusal that says why nothing could be."""

    site: Site
    meaning: Meaning | None
    finding: Finding | None
    refusal: CannotLift | None

    @property
    def proof(self) -> Proof | None:
        return None if self.finding is None else self.finding.proof

    @property
    def is_proved(self) -> bool:
        return self.proof is not None and self.proof.verdict is Verdict.PROVED


def size_ranges(program: ExportedProgram) -> dict[str, tuple[int, int | None]]:
    """Size symbol -> lowest and highest value that the export allows (None = no limit)."""
    return {str(symbol): (_finite(r.lower) or 0, _finite(r.upper)) for symbol, r in program.range_constraints.items()}


def _finite(bound: Any) -> int | None:
    try:
        value = int(bound)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return None
    return value if abs(value) < 1 << 31 else None


def examine_program(program: ExportedProgram, assume: tuple[Assumption, ...] = (), seconds: float = 10.0) -> list[Examined]:
    """Lift and prove every site, in graph order.

    Args:
        program: functional (see `capture`).
        assume: declared facts about inputs.
        seconds: solver budget of one distinct mask.

    Raises:
        InputError: a fact is declared about something that is not an input.
    """
    names = {n.name for n in program.graph.nodes if n.op == "placeholder"}
    for a in assume:
        if a.table not in names:
            raise InputError(
                f"cannot assume {a.text!r}",
                why=f"this program has no input {a.table}",
                todo=f"its inputs are {', '.join(n for n in sorted(names) if not n.startswith(('p_', 'b_', 'c_')))}",
            )
    ranges = size_ranges(program)
    done: dict[tuple[Any, ...], Finding] = {}
    return [_examine(program, site, ranges, assume, seconds, done) for site in find_sites(program.graph)]


def _examine(
    program: ExportedProgram,
    site: Site,
    ranges: Ranges,
    assume: tuple[Assumption, ...],
    seconds: float,
    done: dict[tuple[Any, ...], Finding],
) -> Examined:
    try:
        meaning = lift_site(program, site)
    except CannotLift as refusal:
        return Examined(site, None, None, refusal)
    obligations = tuple((o.term, o.low, o.high) for o in meaning.obligations)
    key = (meaning.keep, meaning.dims, meaning.needs_key, obligations)
    if key not in done:
        relevant = tuple(a for a in assume if a.table in meaning.tables)
        done[key] = examine(meaning, ranges, relevant, seconds)
    return Examined(site, meaning, done[key], None)


def prover_of(program: ExportedProgram) -> Callable[[Term, dict[str, Term]], bool]:
    """For passes: `proves(goal, bounds)` asks whether `goal` holds for all indices within the bounds and all sizes."""
    ranges = size_ranges(program)
    return lambda goal, bounds: Prover(bounds, ranges, {}, seconds=5.0).valid(goal).status == "valid"
