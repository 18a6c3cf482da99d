"""Operands of a handler: tensors that broadcast, Python scalars and symbolic integers, in a wanted dtype."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from trilithon.lift.registry import Call
from trilithon.lift.symtensor import INTEGERS, Idx, SymTensor, cast, dtype_name, integer_range, is_nonnegative, sort_of
from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.term import Term

Scalar = Term | bool | int | float
Operand = SymTensor | Scalar
HALVES = (torch.float16, torch.bfloat16)


def convert(call: Call, value: Term, source: torch.dtype, dtype: torch.dtype) -> Term:
    """`value`, an element of a `source` tensor, as an element of a `dtype` tensor."""
    converted = cast(value, dtype)
    if dtype in INTEGERS and value.sort == "float":
        return truncated(call, value, converted, dtype)
    if dtype in INTEGERS and not _holds(dtype, source):
        return replace(call, dtype=dtype).in_range(converted)
    return converted


def truncated(call: Call, value: Term, converted: Term, dtype: torch.dtype) -> Term:
    """A float as an integer. Only int64 takes one that is not known: what a cast out of range gives, no one defines."""
    if converted.is_literal or dtype == torch.int64:
        return replace(call, dtype=dtype).in_range(converted) if converted.is_literal else converted
    raise call.refuse(f"{value} may not fit {dtype}")


def _holds(dtype: torch.dtype, source: torch.dtype) -> bool:
    """Does the integer type `dtype` hold every value of `source`?"""
    if source == torch.bool:
        return True
    low, high = integer_range(dtype)
    return source in INTEGERS and low <= integer_range(source)[0] and integer_range(source)[1] <= high


def scalar(call: Call, value: Scalar, dtype: torch.dtype) -> Term:
    """A Python number or a symbolic integer as an element of a `dtype` tensor."""
    if isinstance(value, Term):
        return convert(call, value, torch.int64, dtype)
    if not isinstance(value, (bool, int, float)):
        raise call.refuse(f"{value!r} is not a number")
    plain = _literal(value)
    converted = convert(call, plain, torch.bool if isinstance(value, bool) else torch.int64, dtype)
    if dtype in INTEGERS and not integer_range(dtype)[0] <= converted.value <= integer_range(dtype)[1]:
        raise call.refuse(f"{value} does not fit {dtype}")
    return converted


def _literal(value: float) -> Term:
    if isinstance(value, bool):
        return t.boolean(value)
    return t.integer(value) if isinstance(value, int) else t.real(value)


def element(call: Call, operand: Operand, index: Idx, dtype: torch.dtype) -> Term:
    """What broadcasting puts at `index`, converted to `dtype`."""
    if isinstance(operand, SymTensor):
        return convert(call, operand.broadcast_at(index), operand.dtype, dtype)
    return scalar(call, operand, dtype)


def promoted(x: Operand, other: Operand) -> torch.dtype:
    """The dtype in which torch compares or combines the two."""
    return torch.result_type(_stand_in(x), _stand_in(other))


def _stand_in(operand: Operand) -> torch.Tensor | bool | int | float:
    if isinstance(operand, SymTensor):
        return torch.empty((1,) * min(operand.rank, 1), dtype=operand.dtype)
    return 1 if isinstance(operand, Term) else operand


def rounds(operand: Operand, index: Idx, dtype: torch.dtype) -> bool:
    """Does turning the operand into `dtype`, a 16-bit float, lose digits? Arithmetic may then keep them in float32."""
    if dtype not in HALVES or (isinstance(operand, SymTensor) and operand.dtype == dtype):
        return False
    if isinstance(operand, SymTensor):
        value = operand.broadcast_at(index)
    else:
        value = operand if isinstance(operand, Term) else _literal(operand)
    return not _exact(value, dtype_name(dtype))


def _exact(value: Term, dtype: str) -> bool:
    if value.op == "ite":
        return _exact(value.args[1], dtype) and _exact(value.args[2], dtype)
    if value.sort == "bool":
        return True
    if not value.is_literal:
        return False
    number = float(value.value)
    return math.isnan(number) or float_term.rounded(number, dtype) == value.value


def positive(call: Call, divisor: Term) -> Term:
    """`divisor`, with the obligation that it is at least 1."""
    if divisor.is_literal and divisor.value <= 0:
        raise call.refuse(f"division by {divisor} is not modelled")
    call.require(divisor, 1, (1 << 63) - 1)
    return divisor


def wrap(index: Term, size: Term) -> Term:
    """An index that may count from the end, from the front."""
    if is_nonnegative(index):
        return index
    if index.is_literal:
        return size + index
    return t.ite(index < 0, index + size, index)


def is_integral(dtype: torch.dtype) -> bool:
    return sort_of(dtype) == "int"
