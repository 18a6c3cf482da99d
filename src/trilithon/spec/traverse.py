"""Walking terms: children, subterms, free variables, and substitution."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.term import Term


def children(term: Term) -> list[Term]:
    if term.op == "sum":
        return [t for t, _ in term.args[0]]
    return [a for a in term.args if isinstance(a, Term)]


def walk(terms: Iterable[Term]) -> Iterator[Term]:
    """Each distinct subterm once, bodies of prefix sums included."""
    seen: set[Term] = set()
    stack = list(terms)
    while stack:
        term = stack.pop()
        if term not in seen:
            seen.add(term)
            yield term
            stack.extend(children(term))


def free_vars(term: Term) -> frozenset[str]:
    """Names of index and size variables (counters of prefix sums excluded)."""
    return frozenset(t.args[0] for t in walk([term]) if t.op == "var" and not t.args[0].startswith("#"))


def tables(term: Term) -> frozenset[str]:
    return frozenset(t.args[0] for t in walk([term]) if t.op == "read")


def scan_depth(term: Term) -> int:
    """How deeply prefix sums are nested in `term`: the counter to use for a sum over it."""
    return max((1 + scan_depth(t.args[0]) for t in walk([term]) if t.op == "prefix_sum"), default=0)


def substitute(term: Term, replacements: Mapping[Term, Term]) -> Term:
    """`term` with every key replaced by its value, renormalised."""
    done: dict[Term, Term] = dict(replacements)

    def go(x: Term) -> Term:
        if x not in done:
            kids = children(x)
            done[x] = rebuild(x, [go(c) for c in kids]) if kids else x
        return done[x]

    return go(term)


def rebuild(term: Term, kids: list[Term]) -> Term:
    """The same operation over other children."""
    if term.op == "sum":
        return t.add(t.integer(term.args[1]), *[t.scale(k, c) for k, (_, c) in zip(kids, term.args[0], strict=True)])
    if term.op == "read":
        return t.read(term.args[0], kids, term.sort)
    return _REBUILD[term.op](term, kids)


def _recounted(old: Term, new: Term) -> Term:
    """A summand with the counter of its own depth: sums inside it may have gone."""
    before, after = scan_depth(old), scan_depth(new)
    return new if before == after else substitute(new, {t.counter(before): t.counter(after)})


_REBUILD: dict[str, Callable[[Term, list[Term]], Term]] = {
    "le0": lambda x, k: t.le(k[0], t.ZERO),
    "eq0": lambda x, k: t.eq(k[0], t.ZERO),
    "and": lambda x, k: t.conj(*k),
    "or": lambda x, k: t.disj(*k),
    "not": lambda x, k: t.negate(k[0]),
    "ite": lambda x, k: t.ite(*k),
    "mul": lambda x, k: t.mul(*k),
    "floor_div": lambda x, k: t.floor_div(*k),
    "mod": lambda x, k: t.mod(*k),
    "prefix_sum": lambda x, k: t.prefix_sum(_recounted(x.args[0], k[0]), k[1]),
    "to_float": lambda x, k: float_term.to_float(k[0], x.args[0]),
    "float_cast": lambda x, k: float_term.cast(k[0], x.args[0]),
    "float_op": lambda x, k: float_term.apply(x.args[0], x.args[1], *k),
    "float_fn": lambda x, k: float_term.function(x.args[0], x.args[1], *k),
    "to_int": lambda x, k: float_term.to_int(k[0]),
    "float_compare": lambda x, k: float_term.compare(x.args[0], *k),
}
