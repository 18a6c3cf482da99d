"""Other shapes and orders of the same elements."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trilithon.lower.tensorrt.converters.known import axis_of, fake_shape, known_sizes, same_size
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.network import ITensor, Network, Size, is_tensor

aten = torch.ops.aten


@converts(aten.view.default, aten._unsafe_view.default)
def convert_view(net: Network, self: ITensor, size: Sequence[Size]) -> ITensor:
    return viewed(net, self, size)


@converts(aten.reshape.default)
def convert_reshape(net: Network, self: ITensor, shape: Sequence[Size]) -> ITensor:
    return viewed(net, self, shape)


def viewed(net: Network, x: ITensor, sizes: Sequence[Size]) -> ITensor:
    """`x`, the argument `self` of the node, with the sizes of its result.

    A size that is a number in the export is one here too, such as the number of heads, which attention wants to know. An
    axis that keeps its size is copied (0) and one more follows from the others (-1): the builder then sees both, where it
    sees little in sizes that are computed.
    """
    sizes = known_sizes(net, sizes)
    if list(sizes) == list(x.shape) and -1 not in sizes:
        return x
    copied = {i for i, size in enumerate(sizes) if is_tensor(size) and same_size(net, "self", i)}
    computed = [i for i, size in enumerate(sizes) if i not in copied and (is_tensor(size) or size == -1)]
    if not copied or len(computed) > 1 or any(not is_tensor(size) and size == 0 for size in sizes):
        return net.reshape(x, sizes)
    dims = tuple(0 if i in copied else -1 if i in computed else size for i, size in enumerate(sizes))
    return net.out("shuffle", x, reshape_dims=dims, zero_is_placeholder=True)


@converts(aten.permute.default)
def convert_permute(net: Network, self: ITensor, dims: Sequence[int]) -> ITensor:
    return permuted(net, self, [axis_of(net, self, dim) for dim in dims])


@converts(aten.transpose.int)
def convert_transpose(net: Network, self: ITensor, dim0: int, dim1: int) -> ITensor:
    order = list(range(len(self.shape)))
    if order:
        a, b = axis_of(net, self, dim0), axis_of(net, self, dim1)
        order[a], order[b] = b, a
    return permuted(net, self, order)


@converts(aten.t.default)
def convert_t(net: Network, self: ITensor) -> ITensor:
    return permuted(net, self, list(reversed(range(len(self.shape)))))


def permuted(net: Network, x: ITensor, order: Sequence[int]) -> ITensor:
    """`x` with its axes in this order; itself where that is their own."""
    return x if list(order) == list(range(len(x.shape))) else net.permute(x, order)


@converts(aten.unsqueeze.default)
def convert_unsqueeze(net: Network, self: ITensor, dim: int) -> ITensor:
    return unsqueezed(net, self, dim % (len(self.shape) + 1))


def unsqueezed(net: Network, x: ITensor, axis: int) -> ITensor:
    """`x` with a new axis of size 1 in this place."""
    return net.out("unsqueeze", x, net.constant(torch.tensor([axis])))


@converts(aten.squeeze.default)
def convert_squeeze(net: Network, self: ITensor) -> ITensor:
    return squeezed(net, self, range(len(self.shape)))


@converts(aten.squeeze.dim)
def convert_squeeze_dim(net: Network, self: ITensor, dim: int) -> ITensor:
    return squeezed(net, self, [axis_of(net, self, dim)] if len(self.shape) else [])


@converts(aten.squeeze.dims)
def convert_squeeze_dims(net: Network, self: ITensor, dim: Sequence[int]) -> ITensor:
    return squeezed(net, self, [axis_of(net, self, d) for d in dim] if len(self.shape) else [])


def squeezed(net: Network, x: ITensor, axes: Sequence[int]) -> ITensor:
    """`x`, the argument `self` of the node, without those of the axes that have size 1."""
    known, wanted = fake_shape(net, "self"), fake_shape(net)
    sizes = [x.shape[axis] if known is None or x.shape[axis] >= 0 else known[axis] for axis in range(len(x.shape))]
    dropped = [axis for axis in axes if isinstance(sizes[axis], int) and sizes[axis] == 1]
    unknown = any(not isinstance(sizes[axis], int) or sizes[axis] < 0 for axis in axes)
    if (unknown and wanted is None) or (wanted is not None and len(wanted) != len(x.shape) - len(dropped)):
        raise net.refuse("whether an axis has size 1 is known only at run time")
    return without(net, x, dropped)


def without(net: Network, x: ITensor, axes: Sequence[int]) -> ITensor:
    """`x` without these axes, which have size 1."""
    if not axes:
        return x
    if all(x.shape[axis] == 1 for axis in axes):
        return net.out("squeeze", x, net.constant(torch.tensor(sorted(axes))))
    return net.reshape(x, [size for axis, size in enumerate(net.sizes(x)) if axis not in axes])
