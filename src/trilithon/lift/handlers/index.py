"""Operations that read or write at indices which are data."""

from __future__ import annotations

import torch

from trilithon.lift.handlers.operand import convert, element, is_integral, wrap
from trilithon.lift.handlers.shape import put, slice_start
from trilithon.lift.registry import Call, lifts
from trilithon.lift.symtensor import Idx, SymTensor, is_nonnegative
from trilithon.spec import term as t
from trilithon.spec.term import Index, Term

aten = torch.ops.aten


@lifts(aten.index.Tensor)
def lift_index(call: Call, x: SymTensor, indices: list[SymTensor | None]) -> SymTensor:
    """x[n1, :, n2][i] = x[n1[i], .., n2[i]]; the axes of the indices come first if a None stands between them."""
    slots = indices + [None] * (x.rank - len(indices))
    chosen = {d: n for d, n in enumerate(slots) if n is not None}
    for n in chosen.values():
        if not is_integral(n.dtype) or n.dtype == torch.uint8:
            raise call.refuse(f"an index of {n.dtype} is not modelled: the shape of the result depends on data")
    if not chosen:
        raise call.refuse("it has no index")
    rank = max(n.rank for n in chosen.values())
    first, last = min(chosen), max(chosen)
    at_front = last - first + 1 != len(chosen)
    start = 0 if at_front else first

    def at(index: Idx) -> Term:
        inner = index[start : start + rank]
        rest = iter(index[:start] + index[start + rank :])
        moved = (wrap(chosen[d].broadcast_at(inner), x.shape[d]) if d in chosen else next(rest) for d in range(x.rank))
        return x.at(tuple(moved))

    return call.result(at)


@lifts(aten.gather.default)
def lift_gather(call: Call, x: SymTensor, dim: int, index: SymTensor) -> SymTensor:
    """gather(x, d, n)[.., i, ..] = x[.., n[.., i, ..], ..]; torch forbids negative entries."""
    if x.rank == 0 or index.rank == 0:
        raise call.refuse("gather of scalars is not modelled")
    return call.result(lambda i: x.at(put(i, x.dim(dim), index.at(i))))


@lifts(aten.index_select.default)
def lift_index_select(call: Call, x: SymTensor, dim: int, index: SymTensor) -> SymTensor:
    """index_select(x, d, n)[.., i, ..] = x[.., n[i], ..]; torch forbids negative entries."""
    if x.rank == 0:
        raise call.refuse("index_select of a scalar is not modelled")
    d = x.dim(dim)
    return call.result(lambda i: x.at(put(i, d, index.broadcast_at((i[d],)))))


@lifts(aten.embedding.default)
def lift_embedding(call: Call, weight: SymTensor, indices: SymTensor, padding_idx: Index = -1) -> SymTensor:
    """embedding(w, n)[.., j] = w[n[..], j]; `padding_idx` only matters for gradients."""
    return call.result(lambda i: weight.at((indices.at(i[:-1]), i[-1])))


@lifts(aten.index_put.default)
def lift_index_put(call: Call, x: SymTensor, indices: list[SymTensor | None], values: SymTensor) -> SymTensor:
    """x[m] = v for a bool mask m over the first axes of x, and one value v."""
    mask = indices[0]
    if len(indices) != 1 or mask is None or mask.dtype != torch.bool or values.rank:
        raise call.refuse("index_put is modelled for one bool mask and one value only")
    return call.result(lambda i: t.ite(mask.at(i[: mask.rank]), element(call, values, (), call.dtype), x.at(i)))


@lifts(aten.select_scatter.default)
def lift_select_scatter(call: Call, x: SymTensor, src: SymTensor, dim: int, index: Index) -> SymTensor:
    """select_scatter(x, y, d, n)[.., i, ..] = y[.., ..] if i == n else x[.., i, ..]."""
    d = x.dim(dim)
    row = wrap(t.as_int(index), x.shape[d])

    def at(i: Idx) -> Term:
        return t.ite(i[d].eq(row), convert(call, src.at(i[:d] + i[d + 1 :]), src.dtype, call.dtype), x.at(i))

    return call.result(at)


@lifts(aten.slice_scatter.default)
def lift_slice_scatter(
    call: Call,
    x: SymTensor,
    src: SymTensor,
    dim: int = 0,
    start: Index | None = None,
    end: Index | None = None,
    step: Index = 1,
) -> SymTensor:
    """slice_scatter(x, y)[.., i, ..] = y[.., i - start, ..] where that lies inside y, else x[.., i, ..]."""
    if step != 1:
        raise call.refuse(f"step={step} is not modelled")
    d = x.dim(dim)
    first = slice_start(call, start, end, step, x.shape[d], src.shape[d])
    whole = src.shape[d] is x.shape[d]

    def at(i: Idx) -> Term:
        moved = put(i, d, i[d] - first)
        value = convert(call, src.at(moved), src.dtype, call.dtype)
        inside = (moved[d] < src.shape[d]) & (t.TRUE if is_nonnegative(moved[d]) else moved[d] >= 0)
        return value if whole else t.ite(inside, value, x.at(i))

    return call.result(at)
