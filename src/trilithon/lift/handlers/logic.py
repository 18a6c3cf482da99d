"""Comparisons, boolean logic, and choices between two values."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trilithon.lift.handlers.operand import Operand, Scalar, element, promoted
from trilithon.lift.registry import Call, lifts
from trilithon.lift.symtensor import Idx, SymTensor, cast, sort_of
from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.term import Term

aten = torch.ops.aten


def _less(a: Term, b: Term) -> Term:
    if a.sort == "bool":
        return ~a & b
    return float_term.compare("lt", a, b) if a.sort == "float" else a < b


def _at_most(a: Term, b: Term) -> Term:
    if a.sort == "bool":
        return ~a | b
    return float_term.compare("le", a, b) if a.sort == "float" else a <= b


def _equal(a: Term, b: Term) -> Term:
    return float_term.compare("eq", a, b) if a.sort == "float" else t.eq(a, b)


def _comparison(call: Call, x: SymTensor, other: Operand, holds: Callable[[Term, Term], Term]) -> SymTensor:
    """Both sides are compared in the dtype they promote to."""
    dtype = promoted(x, other)
    return call.result(lambda i: holds(element(call, x, i, dtype), element(call, other, i, dtype)))


@lifts(aten.eq.Tensor, aten.eq.Scalar)
def lift_eq(call: Call, x: SymTensor, other: Operand) -> SymTensor:
    """eq(x, y)[i] = x[i] == y[i]."""
    return _comparison(call, x, other, _equal)


@lifts(aten.ne.Tensor, aten.ne.Scalar, aten.not_equal.Tensor, aten.not_equal.Scalar)
def lift_ne(call: Call, x: SymTensor, other: Operand) -> SymTensor:
    """ne(x, y)[i] = not x[i] == y[i]."""
    return _comparison(call, x, other, lambda a, b: ~_equal(a, b))


@lifts(aten.lt.Tensor, aten.lt.Scalar, aten.less.Tensor, aten.less.Scalar)
def lift_lt(call: Call, x: SymTensor, other: Operand) -> SymTensor:
    """lt(x, y)[i] = x[i] < y[i]."""
    return _comparison(call, x, other, _less)


@lifts(aten.le.Tensor, aten.le.Scalar, aten.less_equal.Tensor, aten.less_equal.Scalar)
def lift_le(call: Call, x: SymTensor, other: Operand) -> SymTensor:
    """le(x, y)[i] = x[i] <= y[i]."""
    return _comparison(call, x, other, _at_most)


@lifts(aten.gt.Tensor, aten.gt.Scalar, aten.greater.Tensor, aten.greater.Scalar)
def lift_gt(call: Call, x: SymTensor, other: Operand) -> SymTensor:
    """gt(x, y)[i] = y[i] < x[i]."""
    return _comparison(call, x, other, lambda a, b: _less(b, a))


@lifts(aten.ge.Tensor, aten.ge.Scalar, aten.greater_equal.Tensor, aten.greater_equal.Scalar)
def lift_ge(call: Call, x: SymTensor, other: Operand) -> SymTensor:
    """ge(x, y)[i] = y[i] <= x[i]."""
    return _comparison(call, x, other, lambda a, b: _at_most(b, a))


def _logic(call: Call, x: SymTensor, other: Operand, op: Callable[[Term, Term], Term]) -> SymTensor:
    """Each side counts as whether it is not 0."""
    return call.result(lambda i: op(element(call, x, i, torch.bool), element(call, other, i, torch.bool)))


def _bitwise(call: Call, x: Operand, other: Operand, op: Callable[[Term, Term], Term]) -> SymTensor:
    if call.dtype != torch.bool:
        raise call.refuse(f"bitwise operations on {call.dtype} are not modelled")
    return call.result(lambda i: op(element(call, x, i, torch.bool), element(call, other, i, torch.bool)))


def _differ(a: Term, b: Term) -> Term:
    return ~t.eq(a, b)


@lifts(aten.logical_and.default)
def lift_logical_and(call: Call, x: SymTensor, other: SymTensor) -> SymTensor:
    """logical_and(x, y)[i] = x[i] != 0 and y[i] != 0."""
    return _logic(call, x, other, t.conj)


@lifts(aten.logical_or.default)
def lift_logical_or(call: Call, x: SymTensor, other: SymTensor) -> SymTensor:
    """logical_or(x, y)[i] = x[i] != 0 or y[i] != 0."""
    return _logic(call, x, other, t.disj)


@lifts(aten.logical_xor.default)
def lift_logical_xor(call: Call, x: SymTensor, other: SymTensor) -> SymTensor:
    """logical_xor(x, y)[i] = (x[i] != 0) differs from (y[i] != 0)."""
    return _logic(call, x, other, _differ)


@lifts(aten.logical_not.default)
def lift_logical_not(call: Call, x: SymTensor) -> SymTensor:
    """logical_not(x)[i] = x[i] == 0."""
    return call.result(lambda i: ~element(call, x, i, torch.bool))


@lifts(
    aten.bitwise_and.Tensor,
    aten.bitwise_and.Scalar,
    aten.bitwise_and.Scalar_Tensor,
    aten.__and__.Tensor,
    aten.__and__.Scalar,
)
def lift_and(call: Call, x: Operand, other: Operand) -> SymTensor:
    """and(x, y)[i] = x[i] and y[i], of bools."""
    return _bitwise(call, x, other, t.conj)


@lifts(
    aten.bitwise_or.Tensor,
    aten.bitwise_or.Scalar,
    aten.bitwise_or.Scalar_Tensor,
    aten.__or__.Tensor,
    aten.__or__.Scalar,
)
def lift_or(call: Call, x: Operand, other: Operand) -> SymTensor:
    """or(x, y)[i] = x[i] or y[i], of bools."""
    return _bitwise(call, x, other, t.disj)


@lifts(
    aten.bitwise_xor.Tensor,
    aten.bitwise_xor.Scalar,
    aten.bitwise_xor.Scalar_Tensor,
    aten.__xor__.Tensor,
    aten.__xor__.Scalar,
)
def lift_xor(call: Call, x: Operand, other: Operand) -> SymTensor:
    """xor(x, y)[i] = x[i] differs from y[i], of bools."""
    return _bitwise(call, x, other, _differ)


@lifts(aten.bitwise_not.default)
def lift_not(call: Call, x: SymTensor) -> SymTensor:
    """not(x)[i] = not x[i], of bools."""
    return _bitwise(call, x, True, _differ)


def _condition(call: Call, condition: SymTensor, index: Idx) -> Term:
    if condition.dtype not in (torch.bool, torch.uint8):
        raise call.refuse(f"a condition of {condition.dtype} is not modelled")
    return element(call, condition, index, torch.bool)


def _choice(call: Call, condition: SymTensor, yes: Operand, no: Operand) -> SymTensor:
    def at(index: Idx) -> Term:
        chosen, other = element(call, yes, index, call.dtype), element(call, no, index, call.dtype)
        return t.ite(_condition(call, condition, index), chosen, other)

    return call.result(at)


@lifts(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def lift_where(call: Call, condition: SymTensor, x: Operand, other: Operand) -> SymTensor:
    """where(c, x, y)[i] = x[i] if c[i] else y[i]."""
    return _choice(call, condition, x, other)


@lifts(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def lift_masked_fill(call: Call, x: SymTensor, mask: SymTensor, value: Operand) -> SymTensor:
    """masked_fill(x, m, v)[i] = v if m[i] else x[i]."""
    return _choice(call, mask, value, x)


def _triangle(call: Call, x: SymTensor, diagonal: Scalar, keeps: Callable[[Term, Term], Term]) -> SymTensor:
    zero = cast(t.FALSE, call.dtype) if sort_of(call.dtype) != "bool" else t.FALSE
    assert zero is not None and not isinstance(diagonal, float)
    edge = t.as_int(diagonal)
    return call.result(lambda i: t.ite(keeps(i[-1] - i[-2], edge), x.at(i), zero))


@lifts(aten.tril.default)
def lift_tril(call: Call, x: SymTensor, diagonal: Scalar = 0) -> SymTensor:
    """tril(x)[.., i, j] = x[.., i, j] if j - i <= diagonal else 0."""
    return _triangle(call, x, diagonal, lambda offset, edge: offset <= edge)


@lifts(aten.triu.default)
def lift_triu(call: Call, x: SymTensor, diagonal: Scalar = 0) -> SymTensor:
    """triu(x)[.., i, j] = x[.., i, j] if j - i >= diagonal else 0."""
    return _triangle(call, x, diagonal, lambda offset, edge: offset >= edge)
