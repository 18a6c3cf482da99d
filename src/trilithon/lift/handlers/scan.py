"""Operations along an axis: differences, running sums, and whole sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from trilithon.lift.handlers.operand import convert, is_integral
from trilithon.lift.handlers.shape import joined, put
from trilithon.lift.registry import Call, lifts
from trilithon.lift.symtensor import Idx, SymTensor
from trilithon.spec import term as t
from trilithon.spec.term import Term
from trilithon.spec.traverse import scan_depth, walk

aten = torch.ops.aten


@lifts(aten.diff.default)
def lift_diff(call: Call, x: SymTensor, n: int = 1, dim: int = -1, prepend: SymTensor | None = None) -> SymTensor:
    """diff(x)[i] = y[i + 1] - y[i], where y = cat([prepend, x], dim); of bools, whether they differ."""
    if n != 1:
        raise call.refuse(f"n={n}: only first differences are modelled")
    d = x.dim(dim)
    whole = x if prepend is None else joined(call, [prepend, x], d)

    def at(index: Idx) -> Term:
        after, before = whole.at(put(index, d, index[d] + 1)), whole.at(index)
        if call.dtype == torch.bool:
            return ~t.eq(after, before)
        if not is_integral(call.dtype):
            raise call.refuse(f"diff of {call.dtype} is not modelled")
        return call.in_range(after - before)

    return call.result(at)


@contextmanager
def _obligations_at(call: Call, variable: Term, size: Term | None) -> Iterator[None]:
    """Obligations made inside that mention `variable` hold for 0 <= variable < size; without a size they go."""
    before = set(call.obligations)
    yield
    for value in [v for v in call.obligations if v not in before and any(x is variable for x in walk([v]))]:
        obligation = call.obligations.pop(value)
        if size is not None:
            inside = (variable >= 0) & (variable < size)
            guarded = t.ite(inside, value, t.integer(obligation.low))
            call.obligations[guarded] = replace(obligation, term=guarded)


def _prefix_sum(call: Call, summand: Callable[[Term], Term], size: Term, last: Term) -> Term:
    """`summand(0) + .. + summand(last)`; what the summand must fulfil is asked at an ordinary index variable."""
    index = t.var(f"{call.node.name}.i")
    with _obligations_at(call, index, size):
        depth = scan_depth(summand(index))
    counter = t.counter(depth)
    with _obligations_at(call, counter, None):
        body = summand(counter)
    return t.prefix_sum(body, last)


@lifts(aten.cumsum.default)
def lift_cumsum(call: Call, x: SymTensor, dim: int, dtype: torch.dtype | None = None) -> SymTensor:
    """cumsum(x)[.., i, ..] = x[.., 0, ..] + .. + x[.., i, ..], of integers or bools."""
    if not is_integral(call.dtype):
        raise call.refuse(f"a running sum in {call.dtype} rounds, which is not modelled")
    if x.rank == 0:
        raise call.refuse("cumsum of a scalar is not modelled")
    d = x.dim(dim)

    def at(index: Idx) -> Term:
        def summand(j: Term) -> Term:
            return convert(call, x.at(put(index, d, j)), x.dtype, call.dtype)

        return call.in_range(_prefix_sum(call, summand, x.shape[d], index[d]))

    return call.result(at)


def _row(index: Idx, d: int, j: Term, keepdim: bool) -> Idx:
    return put(index, d, j) if keepdim else (*index[:d], j, *index[d:])


@lifts(aten.sum.dim_IntList)
def lift_sum(
    call: Call, x: SymTensor, dim: list[int] | None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> SymTensor:
    """sum(x, d)[..] = the sum of x[.., j, ..] over j, of integers or bools."""
    if not is_integral(call.dtype):
        raise call.refuse(f"a sum in {call.dtype} rounds, which is not modelled")
    if dim is None or len(dim) != 1 or x.rank == 0:
        raise call.refuse(f"a sum over dimensions {dim} is not modelled: only over one")
    d = x.dim(dim[0])

    def at(index: Idx) -> Term:
        def summand(j: Term) -> Term:
            return convert(call, x.at(_row(index, d, j, keepdim)), x.dtype, call.dtype)

        return call.in_range(_prefix_sum(call, summand, x.shape[d], x.shape[d] - 1))

    return call.result(at)


def _count(call: Call, x: SymTensor, dim: int, keepdim: bool, wanted: bool) -> Callable[[Idx], Term]:
    """How many elements of a row are `wanted`."""
    if call.dtype != torch.bool or x.rank == 0:
        raise call.refuse(f"any and all of {x.dtype} with rank {x.rank} are not modelled")
    d = x.dim(dim)

    def at(index: Idx) -> Term:
        def summand(j: Term) -> Term:
            value = convert(call, x.at(_row(index, d, j, keepdim)), x.dtype, torch.bool)
            return t.ite(value if wanted else ~value, t.ONE, t.ZERO)

        return _prefix_sum(call, summand, x.shape[d], x.shape[d] - 1)

    return at


@lifts(aten.any.dim)
def lift_any(call: Call, x: SymTensor, dim: int, keepdim: bool = False) -> SymTensor:
    """any(x, d)[..] = the number of true x[.., j, ..] is not 0."""
    count = _count(call, x, dim, keepdim, wanted=True)
    return call.result(lambda i: ~count(i).eq(0))


@lifts(aten.all.dim)
def lift_all(call: Call, x: SymTensor, dim: int, keepdim: bool = False) -> SymTensor:
    """all(x, d)[..] = the number of false x[.., j, ..] is 0."""
    count = _count(call, x, dim, keepdim, wanted=False)
    return call.result(lambda i: count(i).eq(0))
