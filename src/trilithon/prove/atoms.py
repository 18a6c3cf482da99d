"""Named masks worth trying for a formula, read off its constants, tables and comparisons. A guess: the proof decides."""

from __future__ import annotations

from trilithon.lift.meaning import Meaning
from trilithon.spec import term as t
from trilithon.spec.masks import (
    Align,
    B,
    CacheLength,
    Causal,
    Chunked,
    Documents,
    K,
    LocalWindow,
    Mask,
    Padding,
    PrefixLM,
    Q,
    S,
    SlidingWindow,
    T,
)
from trilithon.spec.term import Term
from trilithon.spec.traverse import free_vars, substitute, tables, walk


def in_own_sizes(keep: Term, meaning: Meaning) -> Term:
    """`keep` with the site's lengths as `s` and `t`, as masks have them."""
    s, total = meaning.dims[2], meaning.dims[3]
    return substitute(keep, {size: own for size, own in ((total, T), (s, S)) if size.op == "var"})


def propose_atoms(keep: Term, meaning: Meaning) -> list[Mask]:
    """Named masks worth trying, simplest first."""
    s, total = meaning.dims[2], meaning.dims[3]
    keep = in_own_sizes(keep, meaning)
    aligns: list[Align] = ["upper_left"] if s is total else ["upper_left", "lower_right"]
    widths = _widths(keep)
    atoms: list[Mask] = [Causal(a) for a in aligns]
    atoms += [SlidingWindow(w, a) for a in aligns for w in widths if w > 0]
    atoms += [Chunked(c, a) for a in aligns for c in _divisors(keep)]
    atoms += [LocalWindow(w, w) for w in widths]
    atoms += _paddings(keep)
    atoms += _documents(keep)
    atoms += _cache_lengths(keep)
    atoms += _prefixes(keep)
    return atoms


def _widths(keep: Term) -> list[int]:
    """Constants of the formula, and their neighbours: `k > q - w` is `q - k + 1 - w <= 0`."""
    sums = {abs(x.args[1]) for x in walk([keep]) if x.op == "sum" and {"q", "k"} <= free_vars(x)}
    literals = {abs(x.value) for x in walk([keep]) if x.op == "int"}
    return sorted({w for c in sums | literals | {0} for w in (c - 1, c, c + 1) if w >= 0})


def _divisors(keep: Term) -> list[int]:
    return sorted({x.args[1].value for x in walk([keep]) if x.op in ("floor_div", "mod") and x.args[1].op == "int"})


def _paddings(keep: Term) -> list[Mask]:
    entries = {x for x in walk([keep]) if x.op == "read" and x.args[1:] == (B, K) and x.sort in ("int", "bool")}
    return [Padding(x.args[0], x.sort) for x in sorted(entries, key=lambda x: x.serial)]


def _documents(keep: Term) -> list[Mask]:
    """`f(q) == f(k)` for some f that a table decides: segment numbers, a prefix sum of breaks, or chunks of positions."""
    found: list[Mask] = []
    for x in walk([keep]):
        if x.op != "eq0":
            continue
        coefficients, constant = t.linear(x.args[0])
        of_q = [y for y in coefficients if "q" in free_vars(y) and "k" not in free_vars(y)]
        if (
            constant == 0
            and len(coefficients) == 2
            and len(of_q) == 1
            and tables(of_q[0])
            and substitute(of_q[0], {Q: K}) in coefficients
        ):
            own = of_q[0]
            by_number = own.op == "floor_div" and own.args[1].op == "int"
            found.append(Chunked(own.args[1].value, position=own.args[0]) if by_number else Documents(own))
    return found


def _bounds_of_key(keep: Term, sign: int) -> list[Term]:
    """`p` of every `k <= p` (sign 1) or `p <= k` (sign -1) whose p an input decides."""
    found = []
    for x in walk([keep]):
        if x.op != "le0":
            continue
        coefficients, constant = t.linear(x.args[0])
        if coefficients.pop(K, 0) != sign:
            continue
        rest = t.from_linear(coefficients, constant)
        if tables(rest) and "k" not in free_vars(rest):
            found.append(t.scale(rest, -sign))
    return sorted(set(found), key=lambda x: x.serial)


def _cache_lengths(keep: Term) -> list[Mask]:
    positions = _bounds_of_key(keep, 1)
    found: list[Mask] = [CacheLength(p) for p in positions]
    for p in positions:
        for first in _bounds_of_key(keep, -1):
            window = p - first + 1
            if window.op == "int" and window.value > 0:
                found.append(CacheLength(p, window.value))
    return found


def _prefixes(keep: Term) -> list[Mask]:
    """`k < p`, beside the causal part, for a number or for what an input or a size says."""
    found = [p + 1 for p in _bounds_of_key(keep, 1) if "q" not in free_vars(p)]
    for x in walk([keep]):
        if x.op != "le0":
            continue
        coefficients, constant = t.linear(x.args[0])
        if coefficients == {K: 1} and constant < 0:
            found.append(t.integer(1 - constant))
    return [PrefixLM(p) for p in found]
