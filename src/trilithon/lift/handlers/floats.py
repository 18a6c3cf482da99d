"""Functions of floats, as relative position buckets and ALiBi slopes use them: kept as they are, never computed."""

from __future__ import annotations

import torch

from trilithon.lift.handlers.operand import Operand, element
from trilithon.lift.registry import Call, lifts
from trilithon.lift.symtensor import SymTensor, dtype_name
from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.term import Term

aten = torch.ops.aten


def _function(call: Call, name: str, *operands: Operand) -> SymTensor:
    if not call.dtype.is_floating_point:
        raise call.refuse(f"{name} on {call.dtype} is not modelled")
    dtype = dtype_name(call.dtype)
    return call.result(lambda i: float_term.function(name, dtype, *(element(call, o, i, call.dtype) for o in operands)))


@lifts(aten.log.default)
def lift_log(call: Call, x: SymTensor) -> SymTensor:
    """log(x)[i] = the natural logarithm of x[i]."""
    return _function(call, "log", x)


@lifts(aten.log2.default)
def lift_log2(call: Call, x: SymTensor) -> SymTensor:
    """log2(x)[i] = the binary logarithm of x[i]."""
    return _function(call, "log2", x)


@lifts(aten.exp.default)
def lift_exp(call: Call, x: SymTensor) -> SymTensor:
    """exp(x)[i] = e ** x[i]."""
    return _function(call, "exp", x)


@lifts(aten.exp2.default)
def lift_exp2(call: Call, x: SymTensor) -> SymTensor:
    """exp2(x)[i] = 2 ** x[i]."""
    return _function(call, "exp2", x)


@lifts(aten.sqrt.default)
def lift_sqrt(call: Call, x: SymTensor) -> SymTensor:
    """sqrt(x)[i] = the square root of x[i]."""
    return _function(call, "sqrt", x)


@lifts(aten.rsqrt.default)
def lift_rsqrt(call: Call, x: SymTensor) -> SymTensor:
    """rsqrt(x)[i] = 1 / the square root of x[i]."""
    return _function(call, "rsqrt", x)


@lifts(aten.tanh.default)
def lift_tanh(call: Call, x: SymTensor) -> SymTensor:
    """tanh(x)[i] = the hyperbolic tangent of x[i]."""
    return _function(call, "tanh", x)


@lifts(aten.ceil.default)
def lift_ceil(call: Call, x: SymTensor) -> SymTensor:
    """ceil(x)[i] = the least integer that is no less than x[i]."""
    return call.result(x.at) if not x.dtype.is_floating_point else _function(call, "ceil", x)


@lifts(aten.floor.default)
def lift_floor(call: Call, x: SymTensor) -> SymTensor:
    """floor(x)[i] = the greatest integer that is no greater than x[i]."""
    return call.result(x.at) if not x.dtype.is_floating_point else _function(call, "floor", x)


@lifts(aten.sign.default)
def lift_sign(call: Call, x: SymTensor) -> SymTensor:
    """sign(x)[i] = -1, 0 or 1."""
    if x.dtype.is_floating_point:
        return _function(call, "sign", x)
    return call.result(lambda i: _integer_sign(x.at(i)))


def _integer_sign(value: Term) -> Term:
    return t.ite(value > 0, t.ONE, t.ite(value < 0, t.integer(-1), t.ZERO))


@lifts(aten.pow.Tensor_Tensor, aten.pow.Tensor_Scalar, aten.pow.Scalar)
def lift_pow(call: Call, x: Operand, exponent: Operand) -> SymTensor:
    """pow(x, y)[i] = x[i] ** y[i]."""
    return _function(call, "pow", x, exponent)
