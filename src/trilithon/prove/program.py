"""Examine every attention site of a program; equal masks are proved once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from trilithon.capture.program import Program
from trilithon.capture.sites import Site, find_sites
from trilithon.errors import CannotLift, InputError
from trilithon.lift.meaning import Meaning, lift_site
from trilithon.lift.sizes import name_of
from trilithon.lift.symtensor import GIVEN, NUMBER
from trilithon.prove.cache import ProofCache, Question
from trilithon.prove.mask_graph import MaskGraph
from trilithon.prove.prove import Finding, Ranges, examine, unguarded
from trilithon.prove.solve import INT64, Prover
from trilithon.prove.validate import Validation, validate
from trilithon.prove.verdict import Proof, Verdict
from trilithon.spec.assumption import Assumption
from trilithon.spec.term import Term

IN_TIME = 0.9  # of the solver's budget: a finding that took longer may be weaker than what more time would give


@dataclass(frozen=True)
class Examined:
    """A site with what was found: a finding, or the refusal that says why nothing could be.

    Attributes:
        validated: how the proved mask compares with the site's own, run by torch; None without a proof or a mask tensor.
        cached: the finding was read from the proof cache; `solver_seconds` is what it cost when it was made.
    """

    site: Site
    meaning: Meaning | None
    finding: Finding | None
    refusal: CannotLift | None
    validated: Validation | None = None
    cached: bool = False

    @property
    def proof(self) -> Proof | None:
        return None if self.finding is None else self.finding.proof

    @property
    def is_proved(self) -> bool:
        return self.proof is not None and self.proof.verdict is Verdict.PROVED


def size_ranges(program: Program) -> dict[str, tuple[int, int | None]]:
    """Size symbol -> lowest and highest value that the export allows (None = no limit).

    An integer that is read from data, or that a caller gives, may be any of 64 bits: export says of the latter that it is
    0 or more, and checks nothing.
    """
    return {name: _range(name, r) for symbol, r in program.range_constraints.items() for name in [name_of(symbol)]}


def every_size(ranges: Ranges) -> dict[str, tuple[int, int | None]]:
    """The ranges for a program that runs where nobody checks the export's bounds: sizes from 1 on, and all numbers."""
    return {name: INT64 if NUMBER.fullmatch(name) else (min(r[0], 1), None) for name, r in ranges.items()}


def _range(name: str, allowed: Any) -> tuple[int, int | None]:
    low, high = _finite(allowed.lower), _finite(allowed.upper)
    if NUMBER.fullmatch(name) is None:
        return low or 0, high
    if low == 0 and name.startswith(GIVEN):
        low = None
    return INT64[0] if low is None else low, INT64[1] if high is None else high


def _finite(bound: Any) -> int | None:
    try:
        value = int(bound)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return None
    return value if abs(value) < 1 << 31 else None


def examine_program(
    program: Program,
    assume: tuple[Assumption, ...] = (),
    seconds: float = 10.0,
    cache: ProofCache | None = None,
    *,
    checked: bool = True,
) -> list[Examined]:
    """Lift and prove every site, in graph order, and compare what was proved with the program's own masks.

    Args:
        program: functional (see `capture`).
        assume: declared facts about inputs.
        seconds: solver budget of one distinct mask.
        cache: where findings of earlier runs are.
        checked: sizes and guards are checked in each call. Else only what holds for all sizes and inputs counts.

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
    ranges = size_ranges(program) if checked else every_size(size_ranges(program))
    examiner = _Examiner(program, ranges, assume if checked else (), seconds, cache, checked)
    return [examiner.examine(site) for site in find_sites(program.graph)]


@dataclass
class _Examiner:
    """Examines the sites of one program; equal masks are proved once, and equal nodes are run once."""

    program: Program
    ranges: Ranges
    assume: tuple[Assumption, ...]
    seconds: float
    cache: ProofCache | None
    checked: bool
    found: dict[tuple[Any, ...], tuple[Finding, bool]] = field(default_factory=dict)
    compared: dict[tuple[Any, ...], Validation] = field(default_factory=dict)

    def examine(self, site: Site) -> Examined:
        try:
            meaning = lift_site(self.program, site)
        except CannotLift as refusal:
            return Examined(site, None, None, refusal)
        obligations = tuple((o.term, o.low, o.high) for o in meaning.obligations)
        key = (meaning.keep, meaning.dims, meaning.needs_key, obligations)
        if key not in self.found:
            found, known = self._find(meaning)
            self.found[key] = found if self.checked else unguarded(found), known
        finding, cached = self.found[key]
        if finding.proof.verdict is not Verdict.PROVED or site.mask is None:
            return Examined(site, meaning, finding, None, cached=cached)
        validated = self._validate(site, meaning, finding.proof)
        if validated.difference:
            finding = _distrust(finding, validated)
        return Examined(site, meaning, finding, None, validated, cached)

    def _find(self, meaning: Meaning) -> tuple[Finding, bool]:
        """The finding, and whether it was read from the cache."""
        relevant = tuple(a for a in self.assume if a.table in meaning.tables)
        question = None if self.cache is None else Question.of(meaning, self.ranges, relevant)
        if self.cache is not None and question is not None:
            known = self.cache.load(question, meaning)
            if known is not None:
                return known, True
        started = time.perf_counter()
        finding = examine(meaning, self.ranges, relevant, self.seconds)
        in_time = time.perf_counter() - started < IN_TIME * self.seconds
        if self.cache is not None and question is not None and in_time:
            self.cache.store(question, finding)
        return finding, False

    def _validate(self, site: Site, meaning: Meaning, proof: Proof) -> Validation:
        graph = MaskGraph.of(site, meaning.tables)
        bias, sinks = (meaning.bias, meaning.position_bias), (site.sinks, meaning.sinks_table)
        added = (meaning.scale, meaning.softcap, bias, sinks, meaning.flat, site.is_causal)
        key = (proof.mask, proof.assumptions, meaning.dims, added, graph.signature())
        if key not in self.compared:
            self.compared[key] = validate(graph, site, meaning, proof, self.ranges)
        return self.compared[key]


def _distrust(finding: Finding, validated: Validation) -> Finding:
    """A proof about a formula that is not the program's own is worth nothing."""
    reason = (
        f"the lifted formula and the program's own mask disagree: {validated.difference}."
        " This is a bug of Trilithon: please report it"
    )
    return Finding(replace(finding.proof, verdict=Verdict.UNKNOWN, reason=reason), (), finding.formula)


def prover_of(program: Program, *, checked: bool = True) -> Callable[[Term, dict[str, Term]], bool]:
    """For passes: `proves(goal, bounds)` asks whether `goal` holds for all indices within the bounds and all sizes.

    Numbers may be any of 64 bits: what export says of one that is read from data holds by the program's own assertions, and
    a pass drops those that are proved.

    Args:
        checked: sizes are checked in each call to be within the export's range. Else all sizes are meant.
    """
    allowed = size_ranges(program)
    every = every_size(allowed)
    ranges = {name: every[name] if not checked or NUMBER.fullmatch(name) else r for name, r in allowed.items()}
    return lambda goal, bounds: Prover(bounds, ranges, {}, seconds=5.0).valid(goal).status == "valid"
