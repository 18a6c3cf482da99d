"""Float arithmetic of biases inside a network: each operation in the type that the program has it in."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from trilithon.lower.tensorrt.network import ITensor, Network, is_tensor
from trilithon.spec import float_term
from trilithon.spec.term import Term

if TYPE_CHECKING:
    from trilithon.lower.tensorrt.masks import MaskEmitter

Value = Any  # a number that is known, or a tensor of rank 4
OPERATIONS = {"add": "SUM", "sub": "SUB", "mul": "PROD", "div": "DIV", "min": "MIN", "max": "MAX"}
UNARY = {"log": "LOG", "exp": "EXP", "sqrt": "SQRT", "floor": "FLOOR", "ceil": "CEIL"}


def to_dtype(net: Network, value: Value, dtype: str) -> Value:
    """An integer or float as one of this type; a number is rounded at once."""
    kind = _type(net, dtype)
    return net.cast(value, kind) if is_tensor(value) else float_term.rounded(float(value), dtype)


def operation(e: MaskEmitter, term: Term) -> Value:
    name, dtype, *operands = term.args
    a, b = (e.emit(x) for x in operands)
    if not is_tensor(a) and not is_tensor(b):
        return float_term.fold(name, dtype, float(a), float(b))
    a, b = (_tensor(e.net, x, _type(e.net, dtype)) for x in (a, b))
    return e.net.elementwise(OPERATIONS[name], a, b)


def function(e: MaskEmitter, term: Term) -> Value:
    """Computed in float32 and rounded once, as PyTorch does."""
    name, dtype, *operands = term.args
    values = [e.emit(x) for x in operands]
    if not any(map(is_tensor, values)):
        known = [torch.tensor(float(x), dtype=float_term.DTYPES[dtype]) for x in values]
        return float(float_term.FUNCTIONS[name](*known))
    wide = [_tensor(e.net, x, torch.float32) for x in values]
    if name in UNARY:
        found = e.net.unary(UNARY[name], *wide)
    elif name == "pow":
        found = e.net.elementwise("POW", *wide)
    elif name == "tanh":
        found = e.net.activation("TANH", *wide)
    else:
        raise e.net.refuse(f"{name} in a bias has no TensorRT form")
    return e.net.cast(found, _type(e.net, dtype))


def to_int(e: MaskEmitter, term: Term) -> Value:
    """What stands in front of the point."""
    value = e.emit(term.args[0])
    if not is_tensor(value):
        return int(value)
    is_negative = e.net.elementwise("LESS", value, e.net.number(0.0, e.net.dtype(value), 4))
    whole = e.net.select(is_negative, e.net.unary("CEIL", value), e.net.unary("FLOOR", value))
    return e.net.cast(whole, torch.int64)


def choose(net: Network, condition: ITensor, yes: Value, no: Value) -> ITensor:
    """`yes` where the condition holds, else `no`, in the wider of their types."""
    own = [net.dtype(x) for x in (yes, no) if is_tensor(x)]
    dtype = torch.float32 if not own else own[0] if len(own) == 1 else torch.promote_types(*own)
    return net.select(condition, _tensor(net, yes, dtype), _tensor(net, no, dtype))


def _tensor(net: Network, value: Value, dtype: torch.dtype) -> ITensor:
    if is_tensor(value):
        return net.cast(value, dtype)
    return net.number(float(torch.tensor(value, dtype=torch.float64).to(dtype)), dtype, 4)


def _type(net: Network, dtype: str) -> torch.dtype:
    if dtype == "float64":
        raise net.refuse("a bias in float64 has no TensorRT form")
    return float_term.DTYPES[dtype]


EMIT: dict[str, Callable[[MaskEmitter, Term], Value]] = {
    "float": lambda e, x: x.args[0],
    "to_float": lambda e, x: to_dtype(e.net, e.emit(x.args[1]), x.args[0]),
    "float_cast": lambda e, x: to_dtype(e.net, e.emit(x.args[1]), x.args[0]),
    "float_op": operation,
    "float_fn": function,
    "to_int": to_int,
}
