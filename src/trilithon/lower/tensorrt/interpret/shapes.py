"""Layers that make shapes, or arrange elements anew."""

from __future__ import annotations

import torch
from torch import Tensor

from trilithon.lower.tensorrt.interpret.read import Layer, evaluates
from trilithon.lower.tensorrt.library import torch_dtypes


@evaluates("CONSTANT", "IConstantLayer")
def constant(layer: Layer) -> Tensor:
    data = layer.weights("weights").reshape([int(size) for size in layer.own.shape])
    return data.to(layer.mode.held(data.dtype))


@evaluates("SHAPE", "IShapeLayer")
def shape(layer: Layer) -> Tensor:
    return torch.tensor(layer.x().shape, dtype=torch.int64)


@evaluates("SHUFFLE", "IShuffleLayer")
def shuffle(layer: Layer) -> Tensor:
    """A permutation, a reshape and another permutation. A 0 may keep the size at its place (behind the first permutation)."""
    x = layer.x()
    x = x.permute(layer.order("first_transpose", x.dim()))
    sizes = layer.sizes("reshape_dims", 1)
    if sizes is not None:
        keep = layer.own.zero_is_placeholder
        x = x.reshape([x.shape[i] if size == 0 and keep else size for i, size in enumerate(sizes)])
    return x.permute(layer.order("second_transpose", x.dim()))


@evaluates("SQUEEZE", "ISqueezeLayer")
def squeeze(layer: Layer) -> Tensor:
    x, axes = layer.x(), [int(axis) % layer.x().dim() for axis in layer.x(1).reshape(-1)]
    if any(x.shape[axis] != 1 for axis in axes):
        raise layer.refuse(f"axes {axes} of {list(x.shape)} are not all of size 1", todo="check the inputs")
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in axes])


@evaluates("UNSQUEEZE", "IUnsqueezeLayer")
def unsqueeze(layer: Layer) -> Tensor:
    """New axes of size 1; their places are counted in the result."""
    x, places = layer.x(), layer.x(1).reshape(-1)
    axes = {int(axis) % (x.dim() + len(places)) for axis in places}
    for axis in sorted(axes):
        x = x.unsqueeze(axis)
    return x


@evaluates("CONCATENATION", "IConcatenationLayer")
def concatenation(layer: Layer) -> Tensor:
    return torch.cat([layer.x(slot) for slot in range(len(layer.sources))], layer.own.axis)


@evaluates("PADDING", "IPaddingLayer")
def padding(layer: Layer) -> Tensor:
    """Zeros around the last two axes; less than none cuts off."""
    before, after = layer.own.pre_padding_nd, layer.own.post_padding_nd
    widths = [width for axis in reversed(range(len(before))) for width in (before[axis], after[axis])]
    return torch.nn.functional.pad(layer.x(), widths)


@evaluates("SLICE", "ISliceLayer")
def slice_(layer: Layer) -> Tensor:
    """Along each axis the elements at `start + i * stride`; the mode says what is read outside."""
    x, mode = layer.x(), layer.own.mode.name
    if mode not in OUTSIDE and mode not in ("STRICT_BOUNDS", "FILL"):
        raise layer.refuse(f"the mode {mode} is not modelled")
    starts, sizes, strides = (layer.sizes(name, slot) for name, slot in (("start", 1), ("shape", 2), ("stride", 3)))
    if starts is None or sizes is None or strides is None:
        raise layer.refuse("it has no start, size or stride")
    axes = layer.sizes("axes", 5) or list(range(x.dim()))
    outside = torch.zeros([1] * x.dim(), dtype=torch.bool)
    for axis, start, count, stride in zip(axes, starts, sizes, strides, strict=True):
        axis, size = axis % x.dim(), x.shape[axis]
        index = start + stride * torch.arange(count)
        out = (index < 0) | (index >= size)
        if mode == "STRICT_BOUNDS" and bool(out.any()):
            raise layer.refuse(
                f"it reads {start} + {stride} i, i < {count}, of axis {axis} of {list(x.shape)}", "check the inputs"
            )
        index = OUTSIDE[mode](index, size) if mode in OUTSIDE else index.clamp(0, max(size - 1, 0))
        outside = outside | out.reshape([-1 if i == axis else 1 for i in range(x.dim())])
        x = x.index_select(axis, index)
    fill = layer.maybe(4)
    return x.masked_fill(outside, 0 if fill is None else fill.item()) if mode == "FILL" else x


def reflect(index: Tensor, size: int) -> Tensor:
    """As in a mirror in the middle of the first and of the last element: 0 1 2 1 0 1 ..."""
    period = max(2 * (size - 1), 1)
    index = index % period
    return torch.minimum(index, (period - index) % period) if size > 1 else index * 0


OUTSIDE = {
    "WRAP": lambda index, size: index % size,
    "CLAMP": lambda index, size: index.clamp(0, size - 1),
    "REFLECT": reflect,
}


@evaluates("FILL", "IFillLayer")
def fill(layer: Layer) -> Tensor:
    """`start + sum over the axes of step[axis] * index[axis]`; start and step are inputs or alpha and beta."""
    own, dtype = layer.own, layer.mode.held(torch_dtypes()[layer.own.to_type])
    if own.operation.name != "LINSPACE":
        raise layer.refuse(f"it fills with {own.operation.name}, which is not modelled")
    sizes, start, steps = layer.sizes("shape", 0), layer.maybe(1), layer.maybe(2)
    if sizes is None:
        raise layer.refuse("it has no shape")
    start = torch.tensor(own.alpha) if start is None else start
    steps = torch.tensor([own.beta]) if steps is None else steps
    result = start.reshape([]).to(dtype)
    for axis, (size, step) in enumerate(zip(sizes, steps.reshape(-1).to(dtype), strict=True)):
        index = torch.arange(size, dtype=dtype).reshape([-1 if i == axis else 1 for i in range(len(sizes))])
        result = result + step * index
    return result.expand(sizes)
