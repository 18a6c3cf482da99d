"""Float arithmetic of biases as graph functions: each operation in the dtype that the program has it in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trilithon.spec import float_term


def to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An integer, bool or float tensor as one of `dtype`; an integer dtype cuts the fraction off."""
    return x.to(dtype)


def operation(name: str, dtype: torch.dtype, a: Tensor | float, b: Tensor | float) -> Tensor:
    """`a name b` in `dtype`, a name of `float_term.BINARY`; at most one of the two is a number."""
    first, second = _tensors(dtype, (a, b))
    return float_term.BINARY[name](first, second)


def function(name: str, dtype: torch.dtype, operands: Sequence[Tensor | float]) -> Tensor:
    """A function of `float_term.FUNCTIONS` in `dtype`; at least one operand is a tensor."""
    return float_term.FUNCTIONS[name](*_tensors(dtype, operands))


def compare(name: str, a: Tensor | float, b: Tensor | float) -> Tensor:
    """`a name b` of exact values, a name of `float_term.COMPARE`."""
    first, second = _tensors(torch.float64, (a, b))
    return float_term.COMPARE[name](first, second)


def choose(condition: Tensor, yes: Tensor | float, no: Tensor | float) -> Tensor:
    """`yes` where `condition` holds, else `no`; two numbers give float64, so that none is rounded."""
    if not isinstance(yes, Tensor) and not isinstance(no, Tensor):
        yes = torch.full((), yes, dtype=torch.float64, device=condition.device)
    return torch.where(condition, yes, no)


def _tensors(dtype: torch.dtype, values: Sequence[Tensor | float]) -> list[Tensor]:
    device = next(x.device for x in values if isinstance(x, Tensor))
    return [x.to(dtype) if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=device) for x in values]
