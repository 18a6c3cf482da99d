"""Ask z3 whether a goal holds at every index and size: quantifier-free, with facts put in where they apply."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import z3

from trilithon.prove.encode import Encoder
from trilithon.spec import term as t
from trilithon.spec.assumption import Assumption, Source
from trilithon.spec.term import Term
from trilithon.spec.traverse import free_vars, walk

# Where z3 looked for its library in vain: errors, which keep the frames of whoever imported it first, and all they hold.
getattr(z3.z3core, "_failures", []).clear()

UNBOUNDED = (1 << 31) - 1  # taken as the largest size where the export gives none
INT64 = (-(1 << 63), (1 << 63) - 1)
MOST_ROUNDS = 4  # of putting facts in: each may mention new elements


@dataclass(frozen=True)
class Answer:
    """What z3 said about a goal.

    Attributes:
        status: "valid", "invalid" or "unknown".
        used: the assumptions in the unsat core (valid only).
        model: name -> value of every integer variable (invalid only), and `table` looks into the tables.
    """

    status: Literal["valid", "invalid", "unknown"]
    used: tuple[Assumption, ...] = ()
    model: dict[str, int] = field(default_factory=dict)
    reading: z3.ModelRef | None = None
    why: str = ""


@dataclass
class Prover:
    """Proves goals over one set of index bounds, size ranges and assumptions.

    Args:
        bounds: index variable -> exclusive upper bound, e.g. `q -> s70`.
        ranges: size symbol -> lowest and highest value (None = no upper bound was exported).
        tables: table -> its shape. A fact about an entry holds only inside the table.
        assumptions: facts about tables.
        seconds: time budget of all queries together.
    """

    bounds: Mapping[str, Term]
    ranges: Mapping[str, tuple[int, int | None]]
    tables: Mapping[str, tuple[Term, ...]]
    assumptions: tuple[Assumption, ...] = ()
    seconds: float = 10.0
    spent: float = 0.0

    def valid(
        self, goal: Term, given: tuple[Term, ...] = (), extra: tuple[Term, ...] = (), about: tuple[Term, ...] = ()
    ) -> Answer:
        """Does `goal` hold wherever `given` does? `extra` are lemmas, proved before; facts are put in at `about` too."""
        if goal is t.TRUE:
            return Answer("valid")
        encode = Encoder()
        solver = z3.Solver()
        negated = t.conj(t.negate(goal), *given)
        facts = list(self._facts((negated, *extra, *about)))
        for term in (negated, *extra):
            solver.add(encode(term))
        every = [negated, *extra, *(fact for fact, _ in facts)]
        for term in self._domain(every):
            solver.add(encode(term))
        labels: dict[str, Assumption] = {}
        for fact, assumption in [*facts, *self._upper_bounds(every)]:
            label = f"use!{assumption.table}!{assumption.kind}"
            labels[label] = assumption
            solver.add(z3.Implies(z3.Bool(label), encode(fact)))
        return self._check(solver, labels)

    def satisfiable(self) -> Answer:
        """ "invalid" when some input meets every assumption: then proofs are not vacuous."""
        entries = [
            t.read(a.table, tuple(t.var(f"{a.table}@{i}") for i in range(len(shape))), "int")
            for a in self.assumptions
            if (shape := self.tables.get(a.table)) is not None
        ]
        inside = [bound for e in entries for bound in self._inside(e)]
        return self.valid(t.FALSE, given=tuple(inside), about=tuple(entries))

    def _check(self, solver: z3.Solver, labels: Mapping[str, Assumption]) -> Answer:
        left = self.seconds - self.spent
        if left <= 0:
            return Answer("unknown", why=f"the time budget of {self.seconds:g} s is spent")
        solver.set("timeout", max(1, int(left * 1000)))
        started = time.perf_counter()
        result = solver.check(*[z3.Bool(label) for label in labels])
        self.spent += time.perf_counter() - started
        if result == z3.unsat:
            return Answer("valid", used=tuple(labels[str(c)] for c in solver.unsat_core()))
        if result == z3.unknown:
            return Answer("unknown", why=f"z3 gave up ({solver.reason_unknown()})")
        model = solver.model()
        values = {str(d): model[d].as_long() for d in model.decls() if d.arity() == 0 and z3.is_int_value(model[d])}
        return Answer("invalid", model=values, reading=model)

    def _domain(self, terms: list[Term]) -> Iterator[Term]:
        """Indices lie inside their axes, sizes are at least their lowest value."""
        names = set().union(*(free_vars(x) for x in terms))
        for name in list(names & self.bounds.keys()):
            names |= free_vars(self.bounds[name])
        for name in sorted(names):
            if name in self.bounds:
                yield t.ZERO <= t.var(name)
                yield t.var(name) < self.bounds[name]
            elif name in self.ranges:
                yield t.integer(self.ranges[name][0]) <= t.var(name)

    def _upper_bounds(self, terms: list[Term]) -> Iterator[tuple[Term, Assumption]]:
        """The export's upper bounds, tracked: a proof may hold only because of one."""
        names = set().union(*(free_vars(x) for x in terms), *(free_vars(b) for b in self.bounds.values()))
        for name in sorted(names & self.ranges.keys()):
            high = self.ranges[name][1]
            if high is None:
                text = f"{name} <= {UNBOUNDED}: a larger mask cannot exist"
                yield t.var(name) <= UNBOUNDED, Assumption(name, "range", "op contract", text)
            else:
                source: Source = "op contract" if high == INT64[1] else "export range"
                yield t.var(name) <= high, Assumption(name, "range", source, f"{name} <= {high}")

    def _inside(self, entry: Term) -> list[Term]:
        shape = self.tables.get(entry.args[0])
        if shape is None:
            return []
        return [c for i, size in zip(entry.args[1:], shape, strict=True) for c in (t.ZERO <= i, i < size)]

    def _length(self, entry: Term) -> Term:
        """Of the rows of the table that an entry stands in."""
        return self.tables[entry.args[0]][-1] if self.tables.get(entry.args[0]) else t.ONE

    def _facts(self, terms: tuple[Term, ...]) -> Iterator[tuple[Term, Assumption]]:
        """Each assumption at each entry that occurs, and at those its own facts mention."""
        by_table: dict[str, list[Assumption]] = {}
        for assumption in self.assumptions:
            by_table.setdefault(assumption.table, []).append(assumption)
        seen: set[Term] = set()
        fresh = list(terms)
        for _ in range(MOST_ROUNDS):
            entries = [e for e in walk(fresh) if e.op == "read" and e not in seen and not _has_counter(e)]
            seen.update(entries)
            fresh = []
            for entry in entries:
                for assumption in by_table.get(entry.args[0], ()):
                    fact = t.disj(~t.conj(*self._inside(entry)), assumption.fact(entry, self._length(entry)))
                    fresh.append(fact)
                    yield fact, assumption
            if not fresh:
                return


def _has_counter(term: Term) -> bool:
    """Entries inside the body of a prefix sum stand for many elements; facts about them are put in by lemmas."""
    return any(x.op == "var" and x.args[0].startswith("#") for x in walk([term]))
