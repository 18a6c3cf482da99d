"""Shape operations: they only move the index."""

from __future__ import annotations

import torch

from trilithon.lift.handlers.operand import Scalar, convert, scalar, wrap
from trilithon.lift.registry import Call, lifts
from trilithon.lift.symtensor import Idx, SymTensor, is_nonnegative
from trilithon.spec import term as t
from trilithon.spec.term import Index, Term

aten = torch.ops.aten
TO_THE_END = (1 << 63) - 1  # how a graph writes an open end of a slice


def put(index: Idx, d: int, value: Term) -> Idx:
    """`index` with another entry at axis `d`."""
    return (*index[:d], value, *index[d + 1 :])


@lifts(aten.unsqueeze.default)
def lift_unsqueeze(call: Call, x: SymTensor, dim: int) -> SymTensor:
    """unsqueeze(x)[.., 0, ..] = x[.., ..]: a new axis of size 1 at `dim`."""
    d = dim + len(call.shape) if dim < 0 else dim
    return call.result(lambda i: x.at(i[:d] + i[d + 1 :]))


def _squeezed(call: Call, x: SymTensor, dims: set[int]) -> SymTensor:
    kept = [d for d in range(x.rank) if d not in dims or x.shape[d] is not t.ONE]
    if len(kept) != len(call.shape):
        raise call.refuse(f"it is not known which axes of {list(x.shape)} have size 1")

    def at(index: Idx) -> Term:
        moved = [t.ZERO] * x.rank
        for d, i in zip(kept, index, strict=True):
            moved[d] = i
        return x.at(tuple(moved))

    return call.result(at)


@lifts(aten.squeeze.default)
def lift_squeeze(call: Call, x: SymTensor) -> SymTensor:
    """squeeze(x): all axes of size 1 go."""
    return _squeezed(call, x, set(range(x.rank)))


@lifts(aten.squeeze.dim)
def lift_squeeze_dim(call: Call, x: SymTensor, dim: int) -> SymTensor:
    """squeeze(x, dim): that axis goes if its size is 1."""
    return _squeezed(call, x, {x.dim(dim)})


@lifts(aten.squeeze.dims)
def lift_squeeze_dims(call: Call, x: SymTensor, dim: list[int]) -> SymTensor:
    """squeeze(x, dims): those axes go whose size is 1."""
    return _squeezed(call, x, {x.dim(d) for d in dim})


@lifts(aten.expand.default)
def lift_expand(call: Call, x: SymTensor, size: list[Scalar]) -> SymTensor:
    """expand(x)[i] = x[i, with 0 on axes of size 1]; `size` is restated by the result's own shape."""
    return call.result(x.broadcast_at)


@lifts(aten.permute.default)
def lift_permute(call: Call, x: SymTensor, dims: list[int]) -> SymTensor:
    """permute(x)[i] = x[j] where j[dims[d]] = i[d]."""
    order = [x.dim(d) for d in dims]
    return call.result(lambda i: x.at(tuple(i[order.index(d)] for d in range(x.rank))))


@lifts(aten.transpose.int)
def lift_transpose(call: Call, x: SymTensor, dim0: int, dim1: int) -> SymTensor:
    """transpose(x)[.., i, .., j, ..] = x[.., j, .., i, ..]."""
    a, b = x.dim(dim0), x.dim(dim1)
    return call.result(lambda i: x.at(put(put(i, a, i[b]), b, i[a])) if x.rank else x.at(i))


@lifts(aten.t.default)
def lift_t(call: Call, x: SymTensor) -> SymTensor:
    """t(x)[i, j] = x[j, i]; of fewer axes, x itself."""
    return call.result(lambda i: x.at(i[::-1]))


def slice_start(call: Call, start: Index | None, end: Index | None, step: Index, size: Term, length: Term) -> Term:
    """Where a slice of `length` elements starts, counted from the front. An empty slice may start anywhere."""
    low = t.ZERO if start is None else t.as_int(start)
    if is_nonnegative(low):
        return low
    if low.is_literal and step == 1:
        if end is None or end == TO_THE_END:
            return size - length
        if isinstance(end, int) and end < 0:
            return size + end - length
    clamped = t.maximum(t.ZERO, low + size)
    return clamped if low.is_literal else t.ite(low < 0, clamped, low)


@lifts(aten.slice.Tensor)
def lift_slice(
    call: Call, x: SymTensor, dim: int = 0, start: Index | None = None, end: Index | None = None, step: Index = 1
) -> SymTensor:
    """slice(x)[.., i, ..] = x[.., start + i * step, ..]."""
    d = x.dim(dim)
    first = slice_start(call, start, end, step, x.shape[d], call.shape[d])
    return call.result(lambda i: x.at(put(i, d, first + i[d] * step)))


@lifts(aten.select.int)
def lift_select(call: Call, x: SymTensor, dim: int, index: Index) -> SymTensor:
    """select(x, d, n)[.., ..] = x[.., n, ..]."""
    d = x.dim(dim)
    chosen = wrap(t.as_int(index), x.shape[d])
    return call.result(lambda i: x.at((*i[:d], chosen, *i[d:])))


@lifts(aten.flip.default)
def lift_flip(call: Call, x: SymTensor, dims: list[int]) -> SymTensor:
    """flip(x)[.., i, ..] = x[.., size - 1 - i, ..]."""
    flipped = {x.dim(d) for d in dims}
    return call.result(lambda i: x.at(tuple(x.shape[d] - 1 - n if d in flipped else n for d, n in enumerate(i))))


@lifts(aten.roll.default)
def lift_roll(call: Call, x: SymTensor, shifts: list[Index], dims: list[int]) -> SymTensor:
    """roll(x, n)[.., i, ..] = x[.., (i - n) mod size, ..]."""
    if not dims or len(dims) != len(shifts) or len({x.dim(d) for d in dims}) != len(dims):
        raise call.refuse("roll is modelled with one shift for each of some distinct axes")
    by_axis = {x.dim(d): n for d, n in zip(dims, shifts, strict=True)}
    return call.result(lambda i: x.at(tuple(t.mod(n - by_axis[d], x.shape[d]) if d in by_axis else n for d, n in enumerate(i))))


def _repeated(call: Call, x: SymTensor, repeats: list[Index]) -> SymTensor:
    lead = len(call.shape) - x.rank
    times = [1] * (len(call.shape) - len(repeats)) + repeats

    def at(index: Idx) -> Term:
        return x.at(tuple(i if n == 1 else t.mod(i, s) for i, n, s in zip(index[lead:], times[lead:], x.shape, strict=True)))

    return call.result(at)


@lifts(aten.repeat.default)
def lift_repeat(call: Call, x: SymTensor, repeats: list[Index]) -> SymTensor:
    """repeat(x)[.., i, ..] = x[.., i mod size, ..]."""
    return _repeated(call, x, repeats)


@lifts(aten.tile.default)
def lift_tile(call: Call, x: SymTensor, dims: list[Index]) -> SymTensor:
    """tile(x)[.., i, ..] = x[.., i mod size, ..]."""
    return _repeated(call, x, dims)


@lifts(aten.repeat_interleave.self_int)
def lift_repeat_interleave(
    call: Call, x: SymTensor, repeats: Index, dim: int | None = None, output_size: Index | None = None
) -> SymTensor:
    """repeat_interleave(x, n)[.., i, ..] = x[.., floor(i / n), ..]."""
    if dim is None and x.rank != 1:
        raise call.refuse("repeat_interleave is modelled along one axis")
    d = x.dim(dim or 0)
    return call.result(lambda i: x.at(put(i, d, t.floor_div(i[d], t.as_int(repeats)))))


def joined(call: Call, parts: list[SymTensor], d: int) -> SymTensor:
    """The parts one after the other along axis `d`, in the dtype of the call."""
    starts = [t.ZERO]
    for part in parts[:-1]:
        starts.append(starts[-1] + part.shape[d])

    def at(index: Idx) -> Term:
        def of(part: int) -> Term:
            own = t.ZERO if parts[part].shape[d] is t.ONE else index[d] - starts[part]
            return convert(call, parts[part].at(put(index, d, own)), parts[part].dtype, call.dtype)

        first = max(n for n, start in enumerate(starts) if n == 0 or is_nonnegative(index[d] - start))
        value = of(len(parts) - 1)
        for n in range(len(parts) - 2, first - 1, -1):
            inside = index[d] < starts[n + 1]
            value = value if inside is t.FALSE else t.ite(inside, of(n), value)
        return value

    return call.result(at)


@lifts(aten.cat.default, aten.concat.default, aten.concatenate.default)
def lift_cat(call: Call, tensors: list[SymTensor], dim: int = 0) -> SymTensor:
    """cat(xs)[.., i, ..] = x_n[.., i - start_n, ..] for the part n that holds i."""
    parts = [x for x in tensors if x.shape != (t.ZERO,)]  # torch skips an empty vector, whatever the rank of the others
    if not parts:
        raise call.refuse("all its parts are empty")
    return joined(call, parts, parts[0].dim(dim))


@lifts(aten.stack.default)
def lift_stack(call: Call, tensors: list[SymTensor], dim: int = 0) -> SymTensor:
    """stack(xs)[.., n, ..] = x_n[.., ..]."""
    d = dim + len(call.shape) if dim < 0 else dim

    def at(index: Idx) -> Term:
        rest = index[:d] + index[d + 1 :]
        value = convert(call, tensors[-1].at(rest), tensors[-1].dtype, call.dtype)
        for n in range(len(tensors) - 2, -1, -1):
            value = t.ite(index[d].eq(n), convert(call, tensors[n].at(rest), tensors[n].dtype, call.dtype), value)
        return value

    return call.result(at)


@lifts(aten.constant_pad_nd.default)
def lift_constant_pad(call: Call, x: SymTensor, pad: list[Index], value: Scalar = 0) -> SymTensor:
    """pad(x)[.., i, ..] = x[.., i - before, ..] where that lies inside x, else `value`; last axis first."""
    return _padded(call, x, pad, value)


@lifts(aten.pad.default)
def lift_pad(call: Call, x: SymTensor, pad: list[Index], mode: str = "constant", value: Scalar | None = None) -> SymTensor:
    """pad(x)[.., i, ..] = x[.., i - before, ..] where that lies inside x, else `value`; last axis first."""
    if mode != "constant":
        raise call.refuse(f"padding by {mode} is not modelled")
    return _padded(call, x, pad, 0 if value is None else value)


def _padded(call: Call, x: SymTensor, pad: list[Index], value: Scalar) -> SymTensor:
    filler = scalar(call, value, call.dtype)
    ends = [(x.rank - 1 - n, t.as_int(pad[2 * n]), t.as_int(pad[2 * n + 1])) for n in range(len(pad) // 2)]

    def at(index: Idx) -> Term:
        moved, inside = index, t.TRUE
        for d, before, after in ends:
            moved = put(moved, d, index[d] - before)
            if not is_nonnegative(-before):
                inside = inside & (moved[d] >= 0)
            if not is_nonnegative(-after):
                inside = inside & (moved[d] < x.shape[d])
        return filler if inside is t.FALSE else t.ite(inside, x.at(moved), filler)

    return call.result(at)
