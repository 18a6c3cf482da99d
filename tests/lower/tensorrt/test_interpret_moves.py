"""Each layer that moves elements agrees with PyTorch on random data, and differs from its neighbour."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from one_layer import F32, I32, I64, Emit, Row, check, check_row, flags, integers, run, trt
from trilithon.errors import CannotLower
from trilithon.lower.tensorrt.interpret import interpret
from trilithon.lower.tensorrt.network import Network

# ------------------------------------------------------------ shapes


def shuffled(**settings: Any) -> Emit:
    return lambda net, x: net.out("shuffle", x, **settings)


def reshaped_by_tensor(net: Network, x: Any) -> Any:
    return net.reshape(x, [net.size(x, 2), 3, net.size(x, 0), net.size(x, 1)])


def sliced(starts: Any, sizes: Any, strides: Any, mode: str = "STRICT_BOUNDS", **settings: Any) -> Emit:
    def emit(net: Network, x: Any) -> Any:
        return net.out("slice", x, starts, sizes, strides, mode=getattr(trt.SampleMode, mode), **settings)

    return emit


def sliced_by_tensors(slots: dict[int, list[int]], filled: float | None = None, **settings: Any) -> Emit:
    def emit(net: Network, x: Any) -> Any:
        layer = net.add("slice", x, (1, 0, 1), (2, 2, 2), (1, 2, 1), **settings)
        for slot, values in slots.items():
            layer.set_input(slot, net.constant(torch.tensor(values)))
        if filled is not None:
            layer.set_input(4, net.constant(torch.tensor(filled)))
        return net.checked(layer)

    return emit


def squeezed(kind: str, axes: list[int]) -> Emit:
    return lambda net, x: net.out(kind, x, net.constant(torch.tensor(axes)))


X = ([4, 5, 6],)
SHAPES = {
    "permute": Row(
        shuffled(first_transpose=(2, 0, 1)), lambda x: x.permute(2, 0, 1), ([4, 4, 4],), lambda x: x.permute(1, 2, 0)
    ),
    "reshape": Row(shuffled(reshape_dims=(2, 5, -1)), lambda x: x.reshape(2, 5, 12), X),
    "reshape_keeping_zeros": Row(shuffled(reshape_dims=(0, 0, 2, -1)), lambda x: x.reshape(4, 5, 2, 3), X),
    "reshape_to_nothing": Row(
        shuffled(reshape_dims=(3, 0), zero_is_placeholder=False), lambda x: x.reshape(3, 0), (torch.zeros(0, 4),)
    ),
    "shuffle_in_its_order": Row(
        shuffled(first_transpose=(1, 0, 2), reshape_dims=(0, -1, 3), second_transpose=(2, 0, 1)),
        lambda x: x.permute(1, 0, 2).reshape(5, 8, 3).permute(2, 0, 1),
        X,
    ),
    "reshape_by_tensor": Row(lambda net, x: reshaped_by_tensor(net, x), lambda x: x.reshape(6, 3, 4, 5), ([4, 5, 6, 3],)),
    "squeeze": Row(squeezed("squeeze", [-1, 1]), lambda x: x[:, 0, :, 0], ([4, 1, 5, 1],)),
    "unsqueeze": Row(squeezed("unsqueeze", [3, 1]), lambda x: x[:, None, :, None], ([4, 5],)),
    "unsqueeze_from_the_end": Row(squeezed("unsqueeze", [-1, 0]), lambda x: x[None, ..., None], ([4, 5],)),
    "concatenation": Row(
        lambda net, a, b, c: net.concat([a, b, c], 1), lambda *xs: torch.cat(xs, 1), ([2, 3, 4], [2, 1, 4], [2, 2, 4])
    ),
    "padding": Row(
        lambda net, x: net.out("padding_nd", x, (1, -1), (0, 2)),
        lambda x: functional.pad(x, (-1, 2, 1, 0)),
        ([2, 3, 4, 5],),
        free=False,
    ),
    "identity": Row(lambda net, x: net.out("identity", x), lambda x: x, X),
    "shape": Row(lambda net, x: net.out("shape", x), lambda x: torch.tensor(x.shape), X),
    "slice": Row(sliced((1, 0, 2), (2, 3, 2), (1, 2, 3)), lambda x: x[1:3, ::2, 2::3], X),
    "slice_backwards": Row(sliced((3, 0, 5), (4, 5, 3), (-1, 1, -2)), lambda x: x.flip(0)[:, :, [5, 3, 1]], X),
    "slice_repeating": Row(sliced((0, 0, 0), (3, 5, 6), (0, 1, 1)), lambda x: x.expand(3, 5, 6), ([1, 5, 6],)),
    "slice_of_axes": Row(sliced((2, 1), (3, 2), (1, 2), axes=(2, 0)), lambda x: x[1::2, :, 2:5], X),
    "slice_by_tensors": Row(sliced_by_tensors({1: [2, 1, 0], 2: [1, 3, 2], 3: [1, 1, 3]}), lambda x: x[2:3, 1:4, :4:3], X),
    "slice_by_some_tensors": Row(sliced_by_tensors({2: [3, 1, 4]}), lambda x: x[1:4, :1, 1:5], X),
    "slice_fill": Row(sliced((-2, 0, -1), (5, 5, 9), (1, 1, 1), "FILL"), lambda x: functional.pad(x, (1, 2, 0, 0, 2, -1)), X),
    "slice_fill_with": Row(
        sliced_by_tensors({1: [0, 0, -1], 2: [4, 5, 9], 3: [1, 1, 1]}, 7.5, mode=trt.SampleMode.FILL),
        lambda x: functional.pad(x, (1, 2), value=7.5),
        (FLOAT_X := torch.randn(4, 5, 6),),
    ),
    "slice_clamp": Row(
        sliced((0, 0, -2), (4, 5, 9), (1, 1, 1), "CLAMP"), lambda x: functional.pad(x, (2, 1), mode="replicate"), X
    ),
    "slice_wrap": Row(
        sliced((0, 0, -2), (4, 5, 9), (1, 1, 1), "WRAP"), lambda x: functional.pad(x, (2, 1), mode="circular"), X
    ),
    "slice_reflect": Row(
        sliced((0, 0, -4), (4, 5, 13), (1, 1, 1), "REFLECT"),
        lambda x: functional.pad(x, (4, 3), mode="reflect"),
        X,
        lambda x: functional.pad(x, (4, 3), mode="replicate"),
    ),
}


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
def test_shape(row, dtype):
    check_row(row, dtype)


def test_axes_of_a_slice_as_a_tensor():
    def emit(net: Network, x: Any) -> Any:
        layer = net.definition.add_slice(x, (2, 1), (3, 2), (1, 2))
        layer.set_input(5, net.constant(torch.tensor([2, 0])))
        return layer.get_output(0)

    assert torch.equal(run(emit, [FLOAT_X])[0], FLOAT_X[1::2, :, 2:5])


@pytest.mark.parametrize("dtype", [F32, torch.float16, torch.bfloat16, I32, I64, torch.bool], ids=str)
def test_constant(dtype):
    value = (torch.randn(3, 4) * 5).to(dtype)
    check(
        lambda net, x: [net.constant(value), net.constant(value[0, 0]), net.out("identity", x)],
        lambda x: [
            value.to(x.dtype) if dtype.is_floating_point else value,
            value[0, 0].to(x.dtype) if dtype.is_floating_point else value[0, 0],
            x,
        ],
        torch.zeros(1, dtype=dtype if dtype.is_floating_point else F32),
    )


def test_constants_without_data_are_read_back_but_for_bfloat16():
    net, value = Network(), torch.randn(3, 4)
    net.output(net.constant(value), "y")
    held = dict(net.data)
    net.data.clear()
    assert torch.equal(interpret(net, {})["y"], value)
    net, value = Network(), value.bfloat16()
    net.output(net.constant(value), "y")
    held.update(net.data)  # TensorRT holds pointers
    net.data.clear()
    with pytest.raises(CannotLower, match=r"its weights are DataType\.BF16, which Python cannot read back"):
        interpret(net, {})


def test_weights_of_a_convolution_are_read_back():
    kernel, bias, x = torch.randn(4, 3, 2, 2), torch.randn(4), torch.randn(1, 3, 5, 5)

    def emit(net: Network, x: Any) -> Any:
        weights = (trt.Weights(trt.float32, w.data_ptr(), w.numel()) for w in (kernel, bias))
        return net.out("convolution_nd", x, 4, (2, 2), *weights, padding_nd=(1, 0))

    assert torch.allclose(run(emit, [x])[0], functional.conv2d(x, kernel, bias, padding=(1, 0)), atol=1e-6)


def test_fill():
    def emit(net: Network, x: Any) -> Any:
        ramp = net.add("fill", (3,), trt.FillOperation.LINSPACE, trt.float32, alpha=0.5, beta=2.0)
        whole = net.add("fill", (4,), trt.FillOperation.LINSPACE, trt.int64, alpha=3, beta=-2)
        plane = net.add("fill", (2, 3), trt.FillOperation.LINSPACE, trt.int32)
        plane.set_input(1, net.constant(torch.tensor(10, dtype=I32)))
        plane.set_input(2, net.constant(torch.tensor([100, 1], dtype=I32)))
        known = [ramp.get_output(0), whole.get_output(0), plane.get_output(0)]
        return [*known, net.iota(net.size(x, 1), axis=1, rank=3, start=2), net.iota(net.size(x, 0), dtype=I32)]

    def meaning(x: Tensor) -> list[Tensor]:
        known = [torch.tensor([0.5, 2.5, 4.5], dtype=x.dtype), torch.tensor([3, 1, -1, -3])]
        plane = torch.tensor([[10, 11, 12], [110, 111, 112]], dtype=I32)
        return [*known, plane, torch.arange(2, 7)[None, :, None], torch.arange(4, dtype=I32)]

    check(emit, meaning, torch.randn(4, 5), free=True)


# ------------------------------------------------------------ places that are data


def gathered(mode: str, axis: int = 0, batch: int = 0) -> Emit:
    def emit(net: Network, x: Any, index: Any) -> Any:
        settings = {} if mode == "ND" else {"axis": axis}
        return net.out("gather_v2", x, index, getattr(trt.GatherMode, mode), num_elementwise_dims=batch, **settings)

    return emit


def scattered(mode: str, axis: int = 0) -> Emit:
    settings = {} if mode == "ND" else {"axis": axis}
    return lambda net, x, index, new: net.out("scatter", x, index, new, getattr(trt.ScatterMode, mode), **settings)


def scatter_nd(x: Tensor, index: Tensor, new: Tensor) -> Tensor:
    x = x.clone()
    for place, value in zip(index.tolist(), new, strict=True):
        x[tuple(place)] = value
    return x


def gather_nd_in_rows(x: Tensor, index: Tensor) -> Tensor:
    return torch.stack(
        [torch.stack([row[tuple(place)] for place in places]) for row, places in zip(x, index.tolist(), strict=True)]
    )


PLACES = torch.stack(
    [torch.randperm(5, generator=torch.Generator().manual_seed(i))[:3] for i in range(4)]
)  # no two alike in a row
TIES = torch.tensor([[3.0, 1, 3, 2, 1], [0, 0, 0, 5, 5]])


def topk(op: str, k: int, axis: int, indices: Any) -> Emit:
    def emit(net: Network, x: Any) -> Any:
        layer = net.add("topk", x, getattr(trt.TopKOperation, op), k, 1 << axis, indices)
        return [layer.get_output(0), layer.get_output(1)]

    return emit


def one_hot(axis: int) -> Emit:
    depth = torch.tensor(5, dtype=I32)
    return lambda net, index, values: net.out("one_hot", index, values, net.constant(depth), axis)


def hot(index: Tensor, values: Tensor) -> Tensor:
    return torch.where(functional.one_hot(index.long() % 5, 5).bool(), values[1], values[0])


INDICES = {
    "gather": Row(gathered("DEFAULT", 1), lambda x, i: x[:, i % 5], ([4, 5, 6], integers(2, 3, low=-5, high=5))),
    "gather_one": Row(gathered("DEFAULT", 0), lambda x, i: x[i], ([4, 5], torch.tensor(2, dtype=I32))),
    "gather_in_rows": Row(
        gathered("DEFAULT", 1, 1),
        lambda x, i: torch.stack([a[b] for a, b in zip(x, i, strict=True)]),
        ([4, 5, 6], PLACES),
        lambda x, i: x[0][i],
    ),
    "gather_elements": Row(
        gathered("ELEMENT", 1), lambda x, i: torch.gather(x, 1, i % 5), ([4, 5], integers(4, 7, low=-5, high=5))
    ),
    "gather_coordinates": Row(
        gathered("ND"),
        lambda x, i: x[i[..., 0], i[..., 1]],
        ([4, 5, 6], integers(2, 3, 2, low=-4, high=4)),
        lambda x, i: x[i[..., 1], i[..., 0]],
        free=False,
    ),
    "gather_coordinates_in_rows": Row(
        gathered("ND", batch=1), gather_nd_in_rows, ([4, 5, 6], integers(4, 3, 1, low=-5, high=5)), free=False
    ),
    "scatter_elements": Row(scattered("ELEMENT", 1), lambda x, i, new: x.scatter(1, i, new), ([4, 5], PLACES, [4, 3])),
    "scatter_coordinates": Row(
        scattered("ND"),
        scatter_nd,
        ([4, 5, 6], torch.tensor([[1, 2], [3, -1], [-4, 0]]), [3, 6]),
        lambda x, i, new: scatter_nd(x, i.flip(0), new),
    ),
    "scatter_rows": Row(scattered("ND"), scatter_nd, ([4, 5], torch.tensor([[2], [0]], dtype=I32), [2, 5])),
    "one_hot": Row(one_hot(-1), hot, (integers(3, 4, low=-5, high=5, dtype=I32), [2])),
    "one_hot_in_front": Row(
        one_hot(0), lambda i, v: hot(i, v).permute(2, 0, 1), (integers(3, 4, low=0, high=5, dtype=I32), [2])
    ),
    "largest": Row(topk("MAX", 3, 1, trt.int64), lambda x: tuple(x.topk(3, 1)), ([4, 7, 2],), free=False),
    "smallest": Row(topk("MIN", 2, 0, trt.int64), lambda x: tuple(x.topk(2, 0, largest=False)), ([5, 3],), free=False),
    "largest_of_equals": Row(
        topk("MAX", 3, 1, trt.int32),
        lambda x: (x.sort(1).values.flip(1)[:, :3], torch.tensor([[0, 2, 3], [3, 4, 0]], dtype=I32)),
        (TIES,),
    ),
    "non_zero": Row(lambda net, x: net.out("non_zero", x, trt.int64), lambda x: torch.stack(torch.where(x)), (flags(3, 4, 2),)),
}


@pytest.mark.parametrize("dtype", [F32, torch.float16], ids=str)
@pytest.mark.parametrize("row", INDICES.values(), ids=INDICES)
def test_index(row, dtype):
    check_row(row, dtype)


def test_places_outside():
    """A gather reads 0 there, a scatter drops the element: so the kernels that TensorRT writes."""
    x, far = torch.randn(3, 4), torch.tensor([2, 3, -4, -1])
    assert torch.equal(run(gathered("DEFAULT", 0), [x, far])[0], torch.stack([x[2], x[0] * 0, x[0] * 0, x[2]]))
    assert torch.equal(run(gathered("DEFAULT", 1), [x, torch.tensor([4, 1])])[0], torch.stack([x[:, 0] * 0, x[:, 1]], 1))
    assert torch.equal(
        run(gathered("ELEMENT", 1), [x, far[None].expand(3, 4) + 1])[0],
        torch.stack([x[:, 3], x[:, 0] * 0, x[:, 1], x[:, 0]], 1),
    )
    coordinates = torch.tensor([[0, 4], [3, 0], [-3, 3]])
    assert torch.equal(run(gathered("ND"), [x, coordinates])[0], torch.stack([x[0, 0] * 0, x[0, 0] * 0, x[0, 3]]))
    assert torch.equal(run(scattered("ND"), [x, coordinates, torch.ones(3)])[0], scatter_nd(x, coordinates[2:], torch.ones(1)))
    kept = scatter_nd(x, torch.tensor([[2, 1]]), torch.ones(1))
    assert torch.equal(run(scattered("ELEMENT", 0), [x, torch.tensor([[3, 2]]), torch.ones(1, 2)])[0], kept)
    assert torch.equal(run(one_hot(-1), [torch.tensor([5, -6], dtype=I32), torch.tensor([0.5, 1])])[0], torch.full((2, 5), 0.5))
