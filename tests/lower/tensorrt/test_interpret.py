"""Walking a network: order, checks, refusals; and finding where it departs from its graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_layer import F32, I32, Emit, run, trt
from torch import Tensor
from torch.fx import Graph, GraphModule

from trilithon.errors import CannotLower, InputError
from trilithon.lower.tensorrt.interpret import first_difference, interpret, tensors
from trilithon.lower.tensorrt.interpret.read import EVALUATORS
from trilithon.lower.tensorrt.network import Network

# ------------------------------------------------------------ walking


def test_layers_are_sorted():
    """The mask is added after the attention that reads it."""

    def emit(net: Network, q: Any, k: Any, v: Any) -> Any:
        layer = net.add("attention_v2", q, k, v, SOFTMAX, NO_MASK)
        layer.mask = net.unary("NOT", net.elementwise("GREATER", net.iota(5, 3, 4), net.iota(3, 2, 4)))
        return layer.get_output(0)

    check(emit, sdpa(upper_left), *(torch.randn(shape) for shape in QKV))


def test_depth_is_not_limited():
    def emit(net: Network, x: Any) -> Any:
        for _ in range(3000):
            x = net.unary("NEG", x)
        return x

    x = torch.randn(3)
    assert torch.equal(run(emit, [x])[0], x)


def test_all_tensors_have_their_names():
    net = Network()
    x = net.input("x", F32, [2])
    middle = net.unary("EXP", x)
    net.output(net.unary("NEG", middle), "y")
    values = tensors(net, {"x": torch.tensor([0.0, 1.0])})
    assert set(values) == {"x", middle.name, "y"}
    assert torch.equal(values[middle.name], torch.tensor([0.0, 1.0]).exp())


def small() -> Network:
    net = Network()
    net.output(net.unary("EXP", net.input("x", F32, [2, -1])), "y")
    return net


@pytest.mark.parametrize(
    ("feeds", "said"),
    [
        ({}, "not in both: x"),
        ({"x": torch.ones(2, 3), "z": torch.ones(1)}, "not in both: z"),
        ({"x": torch.ones(3, 3)}, r"it is torch.float32 \[2, -1\], got torch.float32 \[3, 3\]"),
        ({"x": torch.ones(2, 3).half()}, "got torch.float16"),
        ({"x": torch.ones(2)}, r"got torch.float32 \[2\]"),
    ],
)
def test_wrong_feeds_are_told(feeds, said):
    with pytest.raises(InputError, match=said):
        interpret(small(), feeds)


def test_wide_feeds_are_taken_in_precise_mode_only():
    x = torch.randn(2, 3, dtype=torch.float64)
    assert torch.equal(interpret(small(), {"x": x}, dtype=torch.float64)["y"], x.exp())
    with pytest.raises(InputError):
        interpret(small(), {"x": x})
    with pytest.raises(InputError, match="less digits"):
        interpret(small(), {"x": x}, dtype=torch.float16)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda layer: layer.x().double(), "it makes torch.float64, declared is torch.float32"),
        (lambda layer: layer.x().half(), "it makes torch.float16, declared is torch.float32"),
        (lambda layer: layer.x().long(), "it makes torch.int64, declared is torch.float32"),
        (lambda layer: layer.x().T, r"it makes \[3, 2\], declared is \[2, -1\]"),
        (lambda layer: layer.x()[0], r"it makes \[3\], declared is \[2, -1\]"),
        (lambda layer: (layer.x(), layer.x()), "it has 1 outputs, 2 were calculated"),
        (lambda layer: layer.x() @ layer.x(), "it fails on these inputs: mat1 and mat2"),
        (lambda layer: layer.x(1), "it has nothing in slot 1"),
    ],
)
def test_a_wrong_evaluator_is_found(monkeypatch, wrong, said):
    monkeypatch.setitem(EVALUATORS, "UNARY", ("IUnaryLayer", wrong))
    with pytest.raises(CannotLower, match=f"cannot interpret a UNARY layer(.|\n)*{said}"):
        interpret(small(), {"x": torch.ones(2, 3)})


def pooled(net: Network, x: Any) -> Any:
    return net.out("pooling_nd", x, trt.PoolingType.MAX, (2, 2))


def branched(net: Network, x: Any) -> Any:
    branch = net.definition.add_if_conditional()
    branch.set_condition(net.constant(torch.tensor(True)))
    inside = branch.add_input(x).get_output(0)
    return branch.add_output(net.unary("EXP", inside), net.unary("NEG", inside)).get_output(0)


def looped(net: Network, x: Any) -> Any:
    loop = net.definition.add_loop()
    loop.add_trip_limit(net.constant(torch.tensor(3, dtype=I32)), trt.TripLimit.COUNT)
    state = loop.add_recurrence(x)
    state.set_input(1, net.unary("EXP", state.get_output(0)))
    return loop.add_loop_output(state.get_output(0), trt.LoopOutput.LAST_VALUE).get_output(0)


def with_lengths(net: Network, q: Any) -> Any:
    return net.out("attention_v2", q, q, q, SOFTMAX, NO_MASK, key_value_lengths=net.constant(torch.tensor([2], dtype=I32)))


def divided(op: str) -> Emit:
    return lambda net, x: net.elementwise(op, net.cast(x, I32), net.constant(torch.zeros(1, 1, 1, 1, dtype=I32)))


REFUSED = {
    "pooling": (pooled, "POOLING(.|\n)*layers of this kind are not modelled"),
    "condition": (branched, "layers of this kind are not modelled"),
    "loop": (looped, "layers of this kind are not modelled"),
    "lengths": (with_lengths, "it has lengths, which TensorRT 1.5 inverts"),
    "without_softmax": (
        lambda net, q: net.out("attention_v2", q, q, q, trt.AttentionNormalizationOp.NONE, NO_MASK),
        "its normalization is NONE",
    ),
    "integer_average": (lambda net, x: net.reduce("AVG", net.cast(x, I32), [1], False), "it is an average of integers"),
    "random": (
        lambda net, x: net.out("fill", (2,), trt.FillOperation.RANDOM_UNIFORM, trt.float32),
        "it fills with RANDOM_UNIFORM",
    ),
    "divide_by_zero": (divided("DIV"), "divides an integer by zero"),
    "floor_divide_by_zero": (divided("FLOOR_DIV"), "divides an integer by zero"),
    "outside": (lambda net, x: sliced_at(net, x, 3), r"it reads 3 \+ 1 i, i < 2, of axis 3"),
    "padding_mode": (
        lambda net, x: net.out("convolution_nd", x, 1, (3, 3), KERNEL, trt.Weights(), padding_mode=trt.PaddingMode.SAME_UPPER),
        "its padding mode SAME_UPPER is not modelled",
    ),
    "too_many": (lambda net, x: best_by_tensor(net, x, 5), "it takes 5 of 4 elements"),
}
ONES = torch.ones(1, 1, 3, 3)
KERNEL = trt.Weights(trt.float32, ONES.data_ptr(), 9)


def sliced_at(net: Network, x: Any, start: int) -> Any:
    layer = net.add("slice", x, (0, 0, 0, 0), (1, 1, 4, 2), (1, 1, 1, 1))
    layer.set_input(
        1,
        net.cast(net.concat([net.shape([0, 0, 0]), net.size(net.constant(torch.zeros(start)), 0)], 0), I64)
        if False
        else net.constant(torch.tensor([0, 0, 0, start])),
    )
    return layer.get_output(0)


def best_by_tensor(net: Network, x: Any, count: int) -> Any:
    layer = net.add("topk", x, trt.TopKOperation.MAX, 1, 1 << 3)
    layer.set_input(1, net.constant(torch.tensor(count, dtype=I32)))
    return layer.get_output(0)


@pytest.mark.parametrize(("emit", "said"), REFUSED.values(), ids=REFUSED)
def test_refused(emit, said):
    net = Network()
    net.output(emit(net, net.input("x", F32, [1, 1, 4, 4])), "y")
    with pytest.raises(CannotLower, match=said):
        interpret(net, {"x": torch.rand(1, 1, 4, 4)})
