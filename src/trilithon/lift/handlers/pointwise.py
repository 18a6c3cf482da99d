"""Arithmetic, element by element. Operands are first converted to the result's dtype, as torch does."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trilithon.lift.handlers.operand import HALVES, Operand, Scalar, element, is_integral, positive, rounds
from trilithon.lift.registry import Call, lifts
from trilithon.lift.symtensor import Idx, SymTensor, dtype_name
from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.term import Term

aten = torch.ops.aten

INTEGER: dict[str, Callable[[Term, Term], Term]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": t.mul,
    "min": t.minimum,
    "max": t.maximum,
}
BOOL: dict[str, Callable[[Term, Term], Term]] = {"add": t.disj, "mul": t.conj, "min": t.conj, "max": t.disj}


def _arithmetic(call: Call, name: str, x: Operand, other: Operand, alpha: Scalar = 1) -> SymTensor:
    """`x name (alpha * other)` in the result's dtype."""

    def at(index: Idx) -> Term:
        if call.dtype in HALVES and name in ("add", "sub", "mul", "div"):
            return _half(call, name, x, _only_one(call, alpha, other), index)
        a, b = (element(call, o, index, call.dtype) for o in (x, other))
        if is_integral(call.dtype) and name in INTEGER:
            return call.in_range(INTEGER[name](a, t.mul(b, t.as_int(_integer(call, alpha)))))
        _only_one(call, alpha, other)
        if call.dtype == torch.bool and name in BOOL:
            return BOOL[name](a, b)
        if not call.dtype.is_floating_point:
            raise call.refuse(f"{name} on {call.dtype} is not modelled")
        return float_term.apply(name, dtype_name(call.dtype), a, b)

    return call.result(at)


def _only_one(call: Call, alpha: Scalar, other: Operand) -> Operand:
    if isinstance(alpha, Term) or alpha != 1:
        raise call.refuse(f"alpha={alpha} is modelled for integers only")
    return other


def _integer(call: Call, alpha: Scalar) -> Term | int:
    if isinstance(alpha, float):
        raise call.refuse(f"alpha={alpha} on integers is not modelled")
    return alpha


def _leaves(value: Term) -> list[Term]:
    """What a value can be, under whatever conditions."""
    if value.op == "ite":
        return [*_leaves(value.args[1]), *_leaves(value.args[2])]
    return [value]


def _half(call: Call, name: str, x: Operand, other: Operand, index: Idx) -> Term:
    """16-bit arithmetic: torch multiplies by a Python scalar in float32, with all digits of the scalar."""
    dtype = dtype_name(call.dtype)
    lossy = [o for o in (x, other) if rounds(o, index, call.dtype)]
    if not lossy:
        return float_term.apply(name, dtype, *(element(call, o, index, call.dtype) for o in (x, other)))
    if name in ("add", "sub") or any(isinstance(o, (SymTensor, Term)) for o in lossy):
        value = float_term.apply(name, dtype, *(element(call, o, index, call.dtype) for o in (x, other)))
        if not any(leaf.is_literal for leaf in _leaves(value)):
            return value  # a bias: it is named, never computed
        raise call.refuse(f"{name} of a number that {call.dtype} cannot hold rounds differently on each device")
    wide = [element(call, o, index, torch.float32) for o in (x, other)]
    return float_term.cast(float_term.apply(name, "float32", *wide), dtype)


@lifts(aten.add.Tensor, aten.add.Scalar)
def lift_add(call: Call, x: SymTensor, other: Operand, alpha: Scalar = 1) -> SymTensor:
    """add(x, y)[i] = x[i] + alpha * y[i]; on bools it is `or`."""
    return _arithmetic(call, "add", x, other, alpha)


@lifts(aten.sub.Tensor, aten.sub.Scalar, aten.subtract.Tensor, aten.subtract.Scalar)
def lift_sub(call: Call, x: SymTensor, other: Operand, alpha: Scalar = 1) -> SymTensor:
    """sub(x, y)[i] = x[i] - alpha * y[i]."""
    return _arithmetic(call, "sub", x, other, alpha)


@lifts(aten.rsub.Tensor, aten.rsub.Scalar)
def lift_rsub(call: Call, x: SymTensor, other: Operand, alpha: Scalar = 1) -> SymTensor:
    """rsub(x, y)[i] = y[i] - alpha * x[i]."""
    return _arithmetic(call, "sub", other, x, alpha)


@lifts(aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor, aten.multiply.Scalar)
def lift_mul(call: Call, x: SymTensor, other: Operand) -> SymTensor:
    """mul(x, y)[i] = x[i] * y[i]; on bools it is `and`."""
    return _arithmetic(call, "mul", x, other)


@lifts(
    aten.div.Tensor,
    aten.div.Scalar,
    aten.divide.Tensor,
    aten.divide.Scalar,
    aten.true_divide.Tensor,
    aten.true_divide.Scalar,
)
def lift_div(call: Call, x: SymTensor, other: Operand) -> SymTensor:
    """div(x, y)[i] = x[i] / y[i], in floating point."""
    return _arithmetic(call, "div", x, other)


@lifts(aten.reciprocal.default)
def lift_reciprocal(call: Call, x: SymTensor) -> SymTensor:
    """reciprocal(x)[i] = 1 / x[i]."""
    return _arithmetic(call, "div", 1, x)


@lifts(aten.minimum.default, aten.min.other)
def lift_minimum(call: Call, x: SymTensor, other: SymTensor) -> SymTensor:
    """minimum(x, y)[i] = min(x[i], y[i]); NaN if either is."""
    return _arithmetic(call, "min", x, other)


@lifts(aten.maximum.default, aten.max.other)
def lift_maximum(call: Call, x: SymTensor, other: SymTensor) -> SymTensor:
    """maximum(x, y)[i] = max(x[i], y[i]); NaN if either is."""
    return _arithmetic(call, "max", x, other)


@lifts(aten.clamp.default, aten.clamp.Tensor, aten.clip.default, aten.clip.Tensor)
def lift_clamp(call: Call, x: SymTensor, min: Operand | None = None, max: Operand | None = None) -> SymTensor:
    """clamp(x)[i] = min(max(x[i], low), high)."""
    raised = x if min is None else _arithmetic(call, "max", x, min)
    return call.result(raised.at) if max is None else _arithmetic(call, "min", raised, max)


@lifts(aten.clamp_min.default, aten.clamp_min.Tensor)
def lift_clamp_min(call: Call, x: SymTensor, min: Operand) -> SymTensor:
    """clamp_min(x)[i] = max(x[i], low)."""
    return _arithmetic(call, "max", x, min)


@lifts(aten.clamp_max.default, aten.clamp_max.Tensor)
def lift_clamp_max(call: Call, x: SymTensor, max: Operand) -> SymTensor:
    """clamp_max(x)[i] = min(x[i], high)."""
    return _arithmetic(call, "min", x, max)


@lifts(aten.relu.default)
def lift_relu(call: Call, x: SymTensor) -> SymTensor:
    """relu(x)[i] = max(x[i], 0)."""
    return _arithmetic(call, "max", x, 0)


@lifts(aten.neg.default, aten.negative.default)
def lift_neg(call: Call, x: SymTensor) -> SymTensor:
    """neg(x)[i] = -x[i]."""
    return _arithmetic(call, "mul", x, -1)


@lifts(aten.abs.default, aten.absolute.default)
def lift_abs(call: Call, x: SymTensor) -> SymTensor:
    """abs(x)[i] = max(x[i], -x[i])."""
    return _arithmetic(call, "max", x, lift_neg(call, x))


def _division(call: Call, x: Operand, other: Operand, rounding: str) -> SymTensor:
    """Division of integers by a positive divisor, or its remainder."""
    if not is_integral(call.dtype):
        raise call.refuse(f"rounded division on {call.dtype} is not modelled")

    def at(index: Idx) -> Term:
        a, b = (element(call, o, index, call.dtype) for o in (x, other))
        b = positive(call, b)
        if rounding == "remainder":
            return t.mod(a, b)
        if rounding == "floor":
            return t.floor_div(a, b)
        return t.ite(a >= 0, t.floor_div(a, b), -t.floor_div(-a, b))

    return call.result(at)


@lifts(aten.div.Tensor_mode, aten.div.Scalar_mode, aten.divide.Tensor_mode, aten.divide.Scalar_mode)
def lift_div_mode(call: Call, x: SymTensor, other: Operand, rounding_mode: str | None = None) -> SymTensor:
    """div(x, y)[i] = x[i] / y[i], rounded down (`floor`) or towards zero (`trunc`)."""
    return _arithmetic(call, "div", x, other) if rounding_mode is None else _division(call, x, other, rounding_mode)


@lifts(aten.floor_divide.default, aten.floor_divide.Scalar)
def lift_floor_divide(call: Call, x: SymTensor, other: Operand) -> SymTensor:
    """floor_divide(x, y)[i] = floor(x[i] / y[i])."""
    return _division(call, x, other, "floor")


@lifts(aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor)
def lift_remainder(call: Call, x: Operand, other: Operand) -> SymTensor:
    """remainder(x, y)[i] = x[i] - y[i] * floor(x[i] / y[i])."""
    return _division(call, x, other, "remainder")
