"""Matrix products.

Those of halves are added up in half by TensorRT-RTX, whatever casts stand around them, unless there is one row. Where that is
not good enough (`net.exact`) they are made in parts, short sums of halves, and the parts are added up in float32.

One row times a matrix that is an input is no product of matrices: its columns are multiplied and added up in float32, which
the builder makes one kernel with what stands in front of it and behind it, such as a norm, and which reads the matrix faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from trilithon.lower.tensorrt.converters.arithmetic import calculate
from trilithon.lower.tensorrt.converters.promote import FLOATS, Operand, tensor, wide
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.network import ITensor, Network, Size, is_tensor

aten = torch.ops.aten
PARTS = (0, 1024, 512)  # by `exact`: numbers that are added up in half, at least; the error grows with the root of it
MOST_PARTS = 8
# Of a vector that these make, each program of such a kernel would make all of it anew, which takes longer than a kernel more.
COSTLY = {getattr(aten, name).default for name in ("silu", "gelu", "sigmoid", "tanh", "exp", "mish", "softplus", "elu")}


def multiplied(net: Network, a: ITensor, b: ITensor, *, transpose_b: bool = False) -> ITensor:
    """The product of the last two axes of tensors that have two or more."""
    dtype = net.dtype(a)
    if dtype not in FLOATS or net.dtype(b) != dtype:
        raise net.refuse(f"a matrix product of {dtype} and {net.dtype(b)}")
    if transpose_b and b.name in net.weights and all(size == 1 for size in list(a.shape)[:-1]) and not _is_costly(net):
        return _by_columns(net, a, b)
    length, rows, part = int(a.shape[-1]), int(a.shape[-2]), PARTS[net.exact]
    if not part or dtype != torch.float16 or rows == 1 or length < 2 * part or length % part:
        return net.matmul(a, b, transpose_b=transpose_b)
    parts = min(MOST_PARTS, length // part)
    if b.name in net.weights:
        weight = net.weights[b.name] if transpose_b else net.weights[b.name].T
        return _added_up(net, a, net.bound(weight.unflatten(1, (parts, -1)).transpose(0, 1)), parts)
    return _added_up(net, a, _cut(net, b if transpose_b else _turned(net, b), parts), parts)


def _is_costly(net: Network) -> bool:
    """Is the vector that the node at hand multiplies made by such a function, alone or times something else?"""
    made = [x for x in (net.node.args if net.node is not None else ()) if isinstance(x, Node)]
    near = [*made, *(x for node in made if node.target is aten.mul.Tensor for x in node.all_input_nodes)]
    return any(node.target in COSTLY for node in near)


def _by_columns(net: Network, a: ITensor, b: ITensor) -> ITensor:
    """One row `a [1 .. 1 k]` times `b [n k]`, `[1 .. 1 n]`."""
    sizes, kept = [1] * (len(a.shape) - 1), net.dtype(a)
    columns = net.elementwise("PROD", *(net.cast(x, torch.float32) for x in (net.reshape(a, [1, int(a.shape[-1])]), b)))
    return net.cast(net.reshape(net.reduce("SUM", columns, [1], False), [*sizes, int(b.shape[0])]), kept)


def _added_up(net: Network, a: ITensor, b: ITensor, parts: int) -> ITensor:
    """`a [.. m k]` times `b [.. parts n k/parts]`: one batch of products, and their sum in float32."""
    wide = torch.float32
    cut = net.matmul(_cut(net, a, parts), b, transpose_b=True)
    sizes = net.sizes(cut)
    one = [*sizes[:-3], 1, *sizes[-2:]]
    total: ITensor | None = None
    for i in range(parts):
        starts = [i if axis == len(sizes) - 3 else 0 for axis in range(len(sizes))]
        part = net.cast(net.slice(cut, starts, one, [1] * len(sizes)), wide)
        total = part if total is None else net.elementwise("SUM", total, part)
    assert total is not None
    return net.cast(net.reshape(total, [*sizes[:-3], *sizes[-2:]]), net.dtype(a))


def _cut(net: Network, x: ITensor, parts: int) -> ITensor:
    """`x [.. m k]` as `[.. parts m k/parts]`."""
    sizes = net.sizes(x)
    rank = len(sizes)
    split = net.reshape(x, [*sizes[:-1], parts, int(x.shape[-1]) // parts])
    return net.permute(split, [*range(rank - 2), rank - 1, rank - 2, rank])


def _turned(net: Network, x: ITensor) -> ITensor:
    rank = len(x.shape)
    return net.permute(x, [*range(rank - 2), rank - 1, rank - 2])


@converts(aten.linear.default)
def convert_linear(net: Network, input: ITensor, weight: ITensor, bias: ITensor | None) -> ITensor:
    if len(weight.shape) != 2:
        raise net.refuse("a weight without two axes")
    rows = net.ranked(input, 2)
    product = multiplied(net, rows, weight, transpose_b=True)
    if len(input.shape) == 1:
        product = net.reshape(product, [net.size(weight, 0)])
    return product if bias is None else calculate(net, "SUM", product, bias, net.dtype(input))


@converts(aten.matmul.default)
def convert_matmul(net: Network, self: ITensor, other: ITensor) -> ITensor:
    """A vector on the left is a row, on the right a column; its axis is not in the result."""
    ranks = len(self.shape), len(other.shape)
    a = net.ranked(self, 2)
    b = net.reshape(other, [net.size(other, 0), 1]) if ranks[1] == 1 else other
    product = multiplied(net, a, b)
    sizes = net.sizes(product)
    if 1 not in ranks:
        return product
    if ranks[1] == 1:
        sizes = sizes[:-1]
    if ranks[0] == 1:
        sizes = [*sizes[:-2], *sizes[-1:]] if ranks[1] > 1 else sizes[:-1]
    return net.reshape(product, sizes)


@converts(aten.mm.default, aten.bmm.default)
def convert_mm(net: Network, self: ITensor, mat2: ITensor) -> ITensor:
    return multiplied(net, self, mat2)


@converts(aten.mv.default)
def convert_mv(net: Network, self: ITensor, vec: ITensor) -> ITensor:
    return convert_matmul(net, self, vec)


@converts(aten.dot.default)
def convert_dot(net: Network, self: ITensor, tensor: ITensor) -> ITensor:
    return convert_matmul(net, self, tensor)


@converts(aten.outer.default)
def convert_outer(net: Network, self: ITensor, vec2: ITensor) -> ITensor:
    return calculate(net, "PROD", net.reshape(self, [net.size(self, 0), 1]), vec2)


@converts(aten.addmm.default)
def convert_addmm(net: Network, self: ITensor, mat1: ITensor, mat2: ITensor, beta: Operand, alpha: Operand) -> ITensor:
    return _added(net, self, multiplied(net, mat1, mat2), beta, alpha)


@converts(aten.baddbmm.default)
def convert_baddbmm(net: Network, self: ITensor, batch1: ITensor, batch2: ITensor, beta: Operand, alpha: Operand) -> ITensor:
    return _added(net, self, multiplied(net, batch1, batch2), beta, alpha)


def _added(net: Network, x: ITensor, product: ITensor, beta: Operand, alpha: Operand) -> ITensor:
    """`beta * x + alpha * product`; with beta 0, NaN in `x` does not count."""
    if is_tensor(beta) or is_tensor(alpha):
        raise net.refuse("beta or alpha is known only at run time")
    dtype = net.dtype(product)
    if beta == alpha == 1:
        return calculate(net, "SUM", x, product, dtype)
    inside = wide(dtype)
    scaled = net.elementwise("PROD", tensor(net, product, inside), tensor(net, alpha, inside))
    if beta != 0:
        kept = net.elementwise("PROD", tensor(net, x, inside), tensor(net, beta, inside))
        scaled = net.elementwise("SUM", kept, scaled)
    return net.cast(scaled, dtype)


@converts(aten.einsum.default)
def convert_einsum(net: Network, equation: str, tensors: Sequence[ITensor], path: Sequence[int] | None) -> ITensor:
    """Of two tensors, as one batch of matrix products: [batch, left, summed] by [batch, summed, right]."""
    left, right, out = _letters(net, equation, tensors)
    a, b = tensors
    sizes = {x: net.size(t, i) for letters, t in ((left, a), (right, b)) for i, x in enumerate(letters)}
    _refuse_broadcasting(net, (left, right), tensors)
    both = [x for x in left if x in right]
    batch, summed = [x for x in both if x in out], [x for x in both if x not in out]
    rows, columns = ([x for x in letters if x not in both] for letters in (left, right))
    if [x for x in (*rows, *columns) if x not in out]:
        raise net.refuse(f"einsum {equation!r} sums over an axis of one tensor alone")
    product = multiplied(
        net, _blocked(net, a, left, (batch, rows, summed), sizes), _blocked(net, b, right, (batch, summed, columns), sizes)
    )
    order = [*batch, *rows, *columns]
    full = net.reshape(product, [sizes[x] for x in order])
    return full if order == list(out) else net.permute(full, [order.index(x) for x in out])


def _letters(net: Network, equation: str, tensors: Sequence[ITensor]) -> tuple[str, str, str]:
    """The axes of both inputs and of the output."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    if len(tensors) != 2 or len(names) != 2 or not arrow or "." in equation:
        raise net.refuse(f"einsum {equation!r}: only two inputs and an output without dots")
    if any(len(set(letters)) != len(letters) for letters in (*names, out)):
        raise net.refuse(f"einsum {equation!r} takes a diagonal")
    return names[0], names[1], out


def _refuse_broadcasting(net: Network, letters: tuple[str, str], tensors: Sequence[ITensor]) -> None:
    for axis, letter in enumerate(letters[0]):
        other = letters[1].find(letter)
        sizes = {tensors[0].shape[axis], tensors[1].shape[other]} if other >= 0 else set()
        if len(sizes) == 2 and 1 in sizes:
            raise net.refuse(f"in its einsum the axis {letter} has size 1 in one tensor alone")


def _blocked(
    net: Network, x: ITensor, letters: str, blocks: tuple[list[str], list[str], list[str]], sizes: dict[str, Size]
) -> ITensor:
    """`x` with its axes in the order of these blocks, each block made one axis."""
    order = [letters.index(letter) for block in blocks for letter in block]
    moved = x if order == sorted(order) else net.permute(x, order)
    return net.reshape(moved, [net.product([sizes[letter] for letter in block]) for block in blocks])
