"""Facts about prefix sums, by induction outside the solver: each premise is one quantifier-free query.

Let P(i) = sum of x(0..i).
  closed form   x(0) = c, x(t) = a for 1 <= t <= i              gives  P(i) = c + a*i
  counted       0 <= x(t) <= 1 for 0 <= t <= i                   gives  0 <= P(i) <= i + 1
  monotone      x(t) >= 0 for i < t <= j                         gives  P(i) <= P(j)
  segment       also: x(t) = 0 implies f(t) - f(t-1) = 1         gives  P(i) = P(j) implies f(j) - f(i) = j - i
"""

from __future__ import annotations

from itertools import permutations

from trilithon.prove.solve import Prover
from trilithon.spec import term as t
from trilithon.spec.assumption import Assumption
from trilithon.spec.term import Term
from trilithon.spec.traverse import scan_depth, substitute, walk

STEP = t.var("step")
CLOSED_FORMS = ((0, 0), (1, 1), (1, 0), (0, 1))
Used = tuple[Assumption, ...]


def close_scans(term: Term, prover: Prover, given: tuple[Term, ...] = ()) -> tuple[Term, Used]:
    """`term` with every prefix sum that has a closed form replaced by it, and the assumptions that took."""
    used: Used = ()
    while True:
        for scan in (x for x in walk([term]) if x.op == "prefix_sum"):
            closed = _closed_form(scan, prover, given)
            if closed is not None:
                term = substitute(term, {scan: closed[0]})
                used += closed[1]
                break
        else:
            return term, used


def _closed_form(scan: Term, prover: Prover, given: tuple[Term, ...]) -> tuple[Term, Used] | None:
    upper = scan.args[1]
    in_range = prover.valid(upper >= 0, given)
    if in_range.status != "valid":
        return None
    step_at = t.var(f"step{scan_depth(scan.args[0])}")  # sums inside the summand have a step of their own
    reach = (*given, step_at >= 1, step_at <= upper)
    first, took = close_scans(summand(scan, t.ZERO), prover, given)
    later, used = close_scans(summand(scan, step_at), prover, reach)
    used = (*in_range.used, *took, *used)
    for c, a in CLOSED_FORMS:
        step = prover.valid(later.eq(a), reach)
        if step.status != "valid":
            continue
        base = prover.valid(first.eq(c), given)
        if base.status == "valid":
            return a * upper + c, (*used, *step.used, *base.used)
    return None


def summand(scan: Term, at: Term) -> Term:
    """The term that a prefix sum adds at index `at`."""
    body = scan.args[0]
    return substitute(body, {t.counter(scan_depth(body)): at})


def scan_lemmas(term: Term, prover: Prover) -> tuple[tuple[Term, ...], Used]:
    """True facts about the prefix sums that occur in `term`, alone and in pairs of one body."""
    by_body: dict[Term, list[Term]] = {}
    for scan in walk([term]):
        if scan.op == "prefix_sum":
            by_body.setdefault(scan.args[0], []).append(scan)
    lemmas: list[Term] = []
    used: Used = ()
    for scans in by_body.values():
        for scan in scans:
            at, i = summand(scan, STEP), scan.args[1]
            counted = prover.valid((at >= 0) & (at <= 1), (STEP >= 0, STEP <= i))
            if counted.status == "valid":
                lemmas.append(~(i >= 0) | ((scan >= 0) & (scan <= i + 1)))
                used += counted.used
        for low, high in permutations(scans, 2):
            found, took = _pair_lemmas(low, high, prover)
            lemmas += found
            used += took
    return tuple(lemmas), used


def _pair_lemmas(low: Term, high: Term, prover: Prover) -> tuple[list[Term], Used]:
    """What holds whenever `0 <= i <= j`, for the two upper ends i and j."""
    i, j = low.args[1], high.args[1]
    ordered = (i >= 0) & (i <= j)
    at = summand(high, STEP)
    reach = (STEP >= 1, STEP <= j)
    monotone = prover.valid(at >= 0, reach)
    if monotone.status != "valid":
        return [], ()
    lemmas, used = [~ordered | (low <= high)], monotone.used
    for entry in {x for x in walk([at]) if x.op == "read" and x.sort == "int" and x.args[-1] is STEP}:
        before, at_i, at_j = (t.read(entry.args[0], (*entry.args[1:-1], index), "int") for index in (STEP - 1, i, j))
        climbs = prover.valid((entry - before).eq(1), (*reach, at.eq(0)))
        if climbs.status == "valid":
            lemmas.append(~(ordered & low.eq(high)) | (at_j - at_i).eq(j - i))
            used += climbs.used
    return lemmas, used
