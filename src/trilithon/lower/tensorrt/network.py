"""A TensorRT network under construction: layers with PyTorch's rules for ranks and sizes, named after the graph's nodes.

A size is an `int`, or where it is known only at run time an int64 tensor of shape [1].
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trilithon.lower.tensorrt.layers import ITensor, Layers
from trilithon.lower.tensorrt.library import dtypes, library

__all__ = ["ITensor", "Network", "Size", "bits", "is_tensor"]

Size = int | ITensor


def is_tensor(value: Any) -> bool:
    """Is it a tensor of the network (not a number or a size that is known)?"""
    return isinstance(value, library().ITensor)


class Network(Layers):
    """A network under construction, with PyTorch's rules for ranks and sizes."""

    # ------------------------------------------------------------ elementwise

    def elementwise(self, op: str, a: ITensor, b: ITensor) -> ITensor:
        """`trt.ElementWiseOperation.<op>` of two tensors of one dtype, with PyTorch's broadcasting."""
        rank = max(len(a.shape), len(b.shape))
        return self.out("elementwise", self.ranked(a, rank), self.ranked(b, rank), getattr(library().ElementWiseOperation, op))

    def unary(self, op: str, x: ITensor) -> ITensor:
        """`trt.UnaryOperation.<op>`; a tensor without axes gets one for the time being, which TensorRT asks for."""
        return self.out("unary", x, getattr(library().UnaryOperation, op))

    def activation(self, op: str, x: ITensor) -> ITensor:
        return self.out("activation", x, getattr(library().ActivationType, op))

    def select(self, condition: ITensor, a: ITensor, b: ITensor) -> ITensor:
        """`a` where the condition holds, else `b`; they broadcast."""
        rank = max(len(x.shape) for x in (condition, a, b))
        return self.out("select", *(self.ranked(x, rank) for x in (condition, a, b)))

    def ranked(self, x: ITensor, rank: int) -> ITensor:
        """`x` with axes of size 1 put in front, up to `rank` axes."""
        missing = rank - len(x.shape)
        if missing > 0 and x.name in self._number_of:
            return self.number(*self._number_of[x.name], rank)
        return x if missing <= 0 else self.reshape(x, [1] * missing + self.sizes(x))

    # ------------------------------------------------------------ sizes and shapes

    def sizes(self, x: ITensor) -> list[Size]:
        """The size of each axis."""
        return [self.size(x, axis) for axis in range(len(x.shape))]

    def size(self, x: ITensor, axis: int) -> Size:
        known = x.shape[axis]
        if known >= 0:
            return int(known)
        key = (x.name, axis % len(x.shape))
        if key not in self._sizes:
            index = self.constant(torch.tensor([axis % len(x.shape)]))
            self._sizes[key] = self.out("gather", self.out("shape", x), index, 0)
        return self._sizes[key]

    def shape(self, sizes: Sequence[Size]) -> ITensor:
        """An int64 tensor of sizes, `[n]`."""
        parts = [s if is_tensor(s) else self.constant(torch.tensor([s])) for s in sizes]
        if not parts:
            return self.constant(torch.zeros(0, dtype=torch.int64))
        return parts[0] if len(parts) == 1 else self.concat(parts, 0)

    def reshape(self, x: ITensor, sizes: Sequence[Size]) -> ITensor:
        """`x` with these sizes; one may be -1."""
        dynamic = [i for i, size in enumerate(sizes) if is_tensor(size)]
        if len(dynamic) == 1 and all(size > 0 for i, size in enumerate(sizes) if i not in dynamic):
            sizes, dynamic = [-1 if i in dynamic else size for i, size in enumerate(sizes)], []
        if not dynamic:
            return self.out("shuffle", x, reshape_dims=tuple(sizes), zero_is_placeholder=False)
        layer = self.add("shuffle", x, zero_is_placeholder=False)
        layer.set_input(1, self.shape(sizes))
        return self.checked(layer)

    def permute(self, x: ITensor, order: Sequence[int]) -> ITensor:
        return self.out("shuffle", x, first_transpose=tuple(order))

    def concat(self, parts: Sequence[ITensor], axis: int) -> ITensor:
        return self.out("concatenation", list(parts), axis=axis)

    def expand(self, x: ITensor, sizes: Sequence[Size]) -> ITensor:
        """`x` repeated along its axes of size 1, and along new ones in front, as PyTorch's expand does; -1 keeps a size."""
        x = self.ranked(x, len(sizes))
        own = self.sizes(x)
        sizes = [o if not is_tensor(size) and size == -1 else size for o, size in zip(own, sizes, strict=True)]
        strides: list[Size] = [self._stride(o, size) for o, size in zip(own, sizes, strict=True)]
        return self.slice(x, [0] * len(sizes), sizes, strides)

    def _stride(self, own: Size, size: Size) -> Size:
        """0 along an axis of size 1 that is to be repeated, else 1."""
        if not is_tensor(own):
            return 0 if own == 1 else 1
        return 1 if own is size else self.calculate("MIN", self.calculate("SUB", own, 1), 1)

    def slice(self, x: ITensor, starts: Sequence[Size], sizes: Sequence[Size], strides: Sequence[Size]) -> ITensor:
        """Along each axis `size` elements from `start` on, `stride` apart."""
        known = [tuple(0 if is_tensor(v) else v for v in values) for values in (starts, sizes, strides)]
        layer = self.add("slice", x, *known)
        for place, values in enumerate((starts, sizes, strides), start=1):
            if any(is_tensor(v) for v in values):
                layer.set_input(place, self.shape(values))
        return self.checked(layer)

    def calculate(self, op: str, a: Size, b: Size) -> Size:
        """`trt.ElementWiseOperation.<op>` of two sizes; a number where both are known."""
        if not is_tensor(a) and not is_tensor(b):
            return _CALCULATE[op](a, b)
        return self.elementwise(op, *(x if is_tensor(x) else self.number(x, torch.int64, 1) for x in (a, b)))

    def product(self, sizes: Sequence[Size]) -> Size:
        result: Size = 1
        for size in sizes:
            result = size if not is_tensor(result) and result == 1 else self.calculate("PROD", result, size)
        return result

    def iota(self, size: Size, axis: int = 0, rank: int = 1, dtype: torch.dtype = torch.int64, start: int = 0) -> ITensor:
        """`start, start + 1, ...` along `axis` of `rank` axes, the others of size 1.

        The integer form in which the builder finds the bounds of a mask that is made by comparing indices.
        """
        trt = library()
        shape: list[Size] = [size if i == axis else 1 for i in range(rank)]
        known = tuple(0 if is_tensor(v) else v for v in shape)
        layer = self.add("fill", known, trt.FillOperation.LINSPACE, dtypes()[dtype])
        if is_tensor(size):
            layer.set_input(0, self.shape(shape))
        layer.set_input(1, self.constant(torch.tensor(start, dtype=dtype)))
        layer.set_input(2, self.constant(torch.tensor([int(i == axis) for i in range(rank)], dtype=dtype)))
        return self.checked(layer)

    # ------------------------------------------------------------ the larger layers

    def gather(self, x: ITensor, index: ITensor, axis: int) -> ITensor:
        """`x` at the places `index` of an axis, whose axes take the place of that one."""
        return self.out("gather", x, index, axis % len(x.shape))

    def matmul(self, a: ITensor, b: ITensor, *, transpose_a: bool = False, transpose_b: bool = False) -> ITensor:
        """The matrix product of the last two axes; the axes before broadcast."""
        kind = library().MatrixOperation
        rank = max(len(a.shape), len(b.shape))
        operations = [kind.TRANSPOSE if flag else kind.NONE for flag in (transpose_a, transpose_b)]
        return self.out("matrix_multiply", self.ranked(a, rank), operations[0], self.ranked(b, rank), operations[1])

    def reduce(self, op: str, x: ITensor, axes: Sequence[int], keep: bool) -> ITensor:
        """`trt.ReduceOperation.<op>` over these axes."""
        return self.out("reduce", x, getattr(library().ReduceOperation, op), bits(axes, len(x.shape)), keep)

    def softmax(self, x: ITensor, axis: int = -1) -> ITensor:
        return self.out("softmax", x, axes=bits([axis], len(x.shape)))


def bits(axes: Sequence[int], rank: int) -> int:
    """Axes as TensorRT writes them: bit i for axis i."""
    return sum(1 << (axis % rank) for axis in set(axes))


_CALCULATE: dict[str, Callable[[int, int], int]] = {
    "SUM": operator.add,
    "SUB": operator.sub,
    "PROD": operator.mul,
    "FLOOR_DIV": operator.floordiv,
    "MAX": max,
    "MIN": min,
}
