"""Operands as PyTorch takes them: numbers and tensors of several types, brought to one type, before a layer calculates.

TensorRT calculates in the type of its operands, in half precision step by step; PyTorch calculates one operation in
float32 and rounds once. So what takes several steps or is not exact is calculated in float32 here too; the casts become
part of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trilithon.lower.tensorrt.network import ITensor, Network, is_tensor

Operand = Any  # a tensor of the network, or a number

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)
CALCULATED = (*FLOATS, torch.int32, torch.int64, torch.bool)


def common(net: Network, *operands: Operand) -> torch.dtype:
    """The type that PyTorch calculates in: that of `torch.result_type`, by which numbers and tensors without axes yield."""
    examples = [_example(net, operand) for operand in operands]
    found = examples[0]
    for example in examples[1:]:
        dtype = torch.result_type(found, example)
        rank = max(x.dim() if isinstance(x, torch.Tensor) else 0 for x in (found, example))
        found = torch.empty([1] * rank, dtype=dtype, device="meta")
    return found.dtype if isinstance(found, torch.Tensor) else torch.tensor(found).dtype


def _example(net: Network, operand: Operand) -> Any:
    if not is_tensor(operand):
        return operand
    return torch.empty([1] * len(operand.shape), dtype=net.dtype(operand), device="meta")


def tensor(net: Network, operand: Operand, dtype: torch.dtype) -> ITensor:
    """`operand` as a tensor of this type; a number as one without axes, infinite where the type does not reach it."""
    if dtype not in CALCULATED:
        raise net.refuse(f"it calculates in {dtype}, which TensorRT does not")
    if is_tensor(operand):
        return cast(net, operand, dtype)
    return net.number(_rounded(operand, dtype), dtype)


def _rounded(value: float, dtype: torch.dtype) -> float:
    exact = torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else torch.tensor(value)
    return exact.to(dtype).item()


def cast(net: Network, x: ITensor, dtype: torch.dtype) -> ITensor:
    """`x` as this type; as a bool it is true where it is not 0, NaN included."""
    if dtype == torch.bool and net.dtype(x) != torch.bool:
        return net.unary("NOT", net.elementwise("EQUAL", x, net.number(0, net.dtype(x))))
    return net.cast(x, dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which PyTorch calculates one operation of this type: float32 for the halves."""
    return torch.float32 if dtype in HALVES else dtype


def floating(dtype: torch.dtype) -> torch.dtype:
    """The type of a function's value, such as a sine's, at arguments of this type: float32 for whole numbers and bools."""
    return dtype if dtype.is_floating_point else torch.float32


def enough(net: Network, dtype: torch.dtype, *operands: Operand) -> torch.dtype:
    """`dtype`, or float32 where that is a half which cannot hold a number: PyTorch uses that number as it is."""
    if dtype not in HALVES:
        return dtype
    return dtype if all(_is_held(net, operand, dtype) for operand in operands) else torch.float32


def _is_held(net: Network, operand: Operand, dtype: torch.dtype) -> bool:
    """Is nothing lost by taking `operand` as this type, or is it a tensor with axes, which PyTorch rounds first too?"""
    if is_tensor(operand):
        return bool(operand.shape) or net.dtype(operand) in (dtype, torch.bool)
    return bool(_rounded(operand, dtype) == operand)


def in_float32(net: Network, x: ITensor, function: Callable[[ITensor], ITensor]) -> ITensor:
    """A function of numbers, calculated in float32 and rounded to the type of `x`; to float32 for whole numbers."""
    dtype = floating(net.dtype(x))
    return net.cast(function(tensor(net, x, torch.float32)), dtype)
