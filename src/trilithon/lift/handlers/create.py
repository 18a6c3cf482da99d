"""Operations that make a tensor out of numbers."""

from __future__ import annotations

import torch

from trilithon.lift.handlers.operand import Scalar, element, scalar
from trilithon.lift.registry import Call, lifts
from trilithon.lift.symtensor import Idx, SymTensor, cast, dtype_name, sort_of
from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.term import Term

aten = torch.ops.aten


def _constant(call: Call, value: Scalar) -> SymTensor:
    filled = scalar(call, value, call.dtype)
    return call.result(lambda _: filled)


def _progression(call: Call, start: Scalar, step: Scalar) -> SymTensor:
    if isinstance(start, float) or isinstance(step, float):
        raise call.refuse("arange of floats is not modelled")

    def at(index: Idx) -> Term:
        value = t.as_int(start) + index[0] * t.as_int(step)
        if sort_of(call.dtype) == "int":
            return call.in_range(value)
        limit = float_term.EXACT_INTEGERS[dtype_name(call.dtype)]
        call.require(value, -limit, limit)
        return float_term.to_float(value, dtype_name(call.dtype))

    return call.result(at)


@lifts(aten.arange.default)
def lift_arange(call: Call, end: Scalar, dtype: torch.dtype | None = None) -> SymTensor:
    """arange(end)[i] = i."""
    if isinstance(end, float):
        raise call.refuse("arange of floats is not modelled")
    return _progression(call, 0, 1)


@lifts(aten.arange.start, aten.arange.start_step)
def lift_arange_start(call: Call, start: Scalar, end: Scalar, step: Scalar = 1, dtype: torch.dtype | None = None) -> SymTensor:
    """arange(start, end, step)[i] = start + i * step."""
    if isinstance(end, float):
        raise call.refuse("arange of floats is not modelled")
    return _progression(call, start, step)


@lifts(aten.full.default)
def lift_full(call: Call, size: list[Scalar], fill_value: Scalar, dtype: torch.dtype | None = None) -> SymTensor:
    """full(size, v)[i] = v."""
    return _constant(call, fill_value)


@lifts(aten.full_like.default)
def lift_full_like(call: Call, x: SymTensor, fill_value: Scalar, dtype: torch.dtype | None = None) -> SymTensor:
    """full_like(x, v)[i] = v."""
    return _constant(call, fill_value)


@lifts(aten.new_full.default)
def lift_new_full(
    call: Call, x: SymTensor, size: list[Scalar], fill_value: Scalar, dtype: torch.dtype | None = None
) -> SymTensor:
    """new_full(x, size, v)[i] = v."""
    return _constant(call, fill_value)


@lifts(aten.ones.default)
def lift_ones(call: Call, size: list[Scalar], dtype: torch.dtype | None = None) -> SymTensor:
    """ones(size)[i] = 1."""
    return _constant(call, 1)


@lifts(aten.zeros.default)
def lift_zeros(call: Call, size: list[Scalar], dtype: torch.dtype | None = None) -> SymTensor:
    """zeros(size)[i] = 0."""
    return _constant(call, 0)


@lifts(aten.ones_like.default)
def lift_ones_like(call: Call, x: SymTensor, dtype: torch.dtype | None = None) -> SymTensor:
    """ones_like(x)[i] = 1."""
    return _constant(call, 1)


@lifts(aten.zeros_like.default)
def lift_zeros_like(call: Call, x: SymTensor, dtype: torch.dtype | None = None) -> SymTensor:
    """zeros_like(x)[i] = 0."""
    return _constant(call, 0)


@lifts(aten.new_ones.default)
def lift_new_ones(call: Call, x: SymTensor, size: list[Scalar], dtype: torch.dtype | None = None) -> SymTensor:
    """new_ones(x, size)[i] = 1."""
    return _constant(call, 1)


@lifts(aten.new_zeros.default)
def lift_new_zeros(call: Call, x: SymTensor, size: list[Scalar], dtype: torch.dtype | None = None) -> SymTensor:
    """new_zeros(x, size)[i] = 0."""
    return _constant(call, 0)


@lifts(aten.scalar_tensor.default)
def lift_scalar_tensor(call: Call, s: Scalar, dtype: torch.dtype | None = None) -> SymTensor:
    """scalar_tensor(s)[] = s."""
    return _constant(call, s)


@lifts(aten.fill.Scalar)
def lift_fill(call: Call, x: SymTensor, value: Scalar) -> SymTensor:
    """fill(x, v)[i] = v."""
    return _constant(call, value)


@lifts(aten.fill.Tensor)
def lift_fill_tensor(call: Call, x: SymTensor, value: SymTensor) -> SymTensor:
    """fill(x, v)[i] = v[]."""
    return call.result(lambda _: element(call, value, (), call.dtype))


@lifts(aten.eye.default, aten.eye.m)
def lift_eye(call: Call, n: Scalar, m: Scalar | None = None, dtype: torch.dtype | None = None) -> SymTensor:
    """eye(n, m)[i, j] = (i == j)."""

    def at(index: Idx) -> Term:
        value = cast(index[0].eq(index[1]), call.dtype)
        assert value is not None
        return value

    return call.result(at)


def _uninitialised(call: Call) -> SymTensor:
    def at(_: Idx) -> Term:
        raise call.refuse("the mask reads memory that was never written")

    return call.result(at)


@lifts(aten.empty.memory_format)
def lift_empty(call: Call, size: list[Scalar], dtype: torch.dtype | None = None) -> SymTensor:
    """empty(size): only its shape may be used."""
    return _uninitialised(call)


@lifts(aten.empty_like.default)
def lift_empty_like(call: Call, x: SymTensor, dtype: torch.dtype | None = None) -> SymTensor:
    """empty_like(x): only its shape may be used."""
    return _uninitialised(call)


@lifts(aten.new_empty.default)
def lift_new_empty(call: Call, x: SymTensor, size: list[Scalar], dtype: torch.dtype | None = None) -> SymTensor:
    """new_empty(x, size): only its shape may be used."""
    return _uninitialised(call)
