"""Walking a network: order, checks, refusals; and finding where it departs from its graph."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.nn.functional import scaled_dot_product_attention

from one_layer import F32, I32, INF, Emit, check, run, trt
from trilithon.errors import CannotLower, InputError
from trilithon.lower.tensorrt.interpret import first_difference, interpret, tensors
from trilithon.lower.tensorrt.interpret.compare import relative_error
from trilithon.lower.tensorrt.interpret.read import EVALUATORS
from trilithon.lower.tensorrt.network import Network

aten = torch.ops.aten
SOFTMAX, NO_MASK = trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE


def test_layers_are_sorted():
    """The mask is added after the attention that reads it."""

    def emit(net: Network, q: Any, k: Any, v: Any) -> Any:
        layer = net.add("attention_v2", q, k, v, SOFTMAX, NO_MASK)
        layer.mask = net.unary("NOT", net.elementwise("GREATER", net.iota(5, 3, 4), net.iota(3, 2, 4)))
        return layer.get_output(0)

    meaning = lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)  # noqa: E731
    check(emit, meaning, *(torch.randn(1, 2, s, 8) for s in (3, 5, 5)))


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
    layer.set_input(1, net.constant(torch.tensor([0, 0, 0, start])))
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


# ------------------------------------------------------------ differences


class Chain:
    """`relu(x @ w) @ u` as a graph and, written by hand, as a network; `op` takes the place of the relu there."""

    def __init__(self, dtype: torch.dtype = F32, op: str = "RELU") -> None:
        torch.manual_seed(0)
        root, graph = torch.nn.Module(), Graph()
        root.w, root.u = (torch.nn.Buffer(torch.randn(5, 5).to(dtype)) for _ in range(2))
        x, w = graph.placeholder("x"), graph.get_attr("w")
        mm = graph.create_node("call_function", aten.mm.default, (x, w), name="mm")
        relu = graph.create_node("call_function", aten.relu.default, (mm,), name="relu")
        u = graph.get_attr("u")
        mm_1 = graph.create_node("call_function", aten.mm.default, (relu, u), name="mm_1")
        graph.output((mm_1, mm_1))
        self.gm, self.net = GraphModule(root, graph), Network()
        net = self.net
        net.values = {"x": net.input("x", dtype, [-1, 5]), "w": net.constant(root.w)}
        net.values["mm"] = net.matmul(net.values["x"], net.values["w"])
        net.values["relu"] = net.activation(op, net.values["mm"])
        net.values["u"] = net.constant(root.u)
        net.values["mm_1"] = net.matmul(net.values["relu"], net.values["u"])
        net.output(net.values["mm_1"], "output_0")
        net.output(net.values["mm_1"], "output_1")  # a copy
        self.feeds = {"x": torch.randn(3, 5).to(dtype)}

    def observed(self, *names: str) -> dict[str, Tensor]:
        """The tensors that these nodes, or outputs, became."""
        values = tensors(self.net, self.feeds)
        named = [self.net.values[name].name if name in self.net.values else name for name in names]
        return {name: values[name].clone() for name in named}


@pytest.mark.parametrize("dtype", [F32, torch.float16, torch.bfloat16], ids=str)
def test_a_network_that_does_what_its_graph_does(dtype):
    chain = Chain(dtype)
    assert first_difference(chain.net, chain.gm, chain.feeds) is None
    assert first_difference(chain.net, chain.gm, chain.feeds, dtype=torch.float64) is None


def test_another_graph_is_told():
    chain = Chain()
    del chain.net.values["relu"]
    with pytest.raises(InputError, match="it was not made of it: relu is not known"):
        first_difference(chain.net, chain.gm, chain.feeds)


def test_a_changed_weight_is_named():
    chain = Chain()
    name = next(name for name, data in chain.net.data.items() if data.data_ptr() == chain.gm.u.data_ptr())
    chain.net.data[name] = chain.net.data[name].clone()
    chain.net.data[name][2, 3] += 1
    found = first_difference(chain.net, chain.gm, chain.feeds)
    assert found is not None
    assert found.node == "u"
    assert found.tensor == chain.net.values["u"].name
    assert found.error == pytest.approx(1 / float(chain.gm.u.abs().max()))
    assert torch.equal(found.graph, chain.gm.u)
    assert torch.equal(found.network, chain.net.data[name])
    assert str(found).startswith("u differs by 0.") and "(node u)" in str(found)
    later = first_difference(chain.net, chain.gm, chain.feeds, limit=found.error * 1.01)
    assert later is None or later.node == "mm_1", "the limit is not heeded"


def test_a_wrong_layer_is_named():
    chain = Chain(op="TANH")
    found = first_difference(chain.net, chain.gm, chain.feeds)
    assert found is not None
    assert found.node == "relu"
    assert torch.equal(found.graph, torch.relu(chain.feeds["x"] @ chain.gm.w))
    assert found.where.node == "relu"


def test_what_an_engine_computed_is_compared():
    chain = Chain()
    values = chain.observed("mm", "relu", "output_0", "output_1")
    assert first_difference(chain.net, chain.gm, chain.feeds, observed=values) is None
    values["output_1"][0, 0] += 1
    found = first_difference(chain.net, chain.gm, chain.feeds, observed=values)
    assert found is not None and (found.node, found.tensor) == ("output", "output_1")
    values[chain.net.values["relu"].name][1, 1] = float("nan")
    found = first_difference(chain.net, chain.gm, chain.feeds, observed=values)
    assert found is not None and (found.node, found.error) == ("relu", torch.inf)
    with pytest.raises(InputError, match="no node stands for elsewhere"):
        first_difference(chain.net, chain.gm, chain.feeds, observed={"elsewhere": torch.zeros(1)})


@pytest.mark.parametrize("wrong", [False, True])
def test_sizes_numbers_and_several_results(wrong):
    graph = Graph()
    x = graph.placeholder("x")
    size = graph.call_function(aten.sym_size.int, (x, 0))
    total = graph.call_function(operator.mul, (size, 3))
    best = graph.call_function(aten.max.dim, (x, 1))
    value = graph.call_function(operator.getitem, (best, 0))
    place = graph.call_function(operator.getitem, (best, 1))
    graph.output((value, place))
    net = Network()
    own = net.input("x", F32, [-1, 5])
    length = net.size(own, 0)
    layer = net.add("topk", own, trt.TopKOperation.MAX, 1, 1 << 1, trt.int64)
    both = [net.reshape(layer.get_output(i), [length]) for i in range(2)]
    places = net.elementwise("SUM", both[1], net.constant(torch.tensor([int(wrong)])))
    net.values = {"x": own, size.name: length, total.name: net.calculate("PROD", length, 3)}
    net.values |= {best.name: (both[0], places), value.name: both[0], place.name: places}
    net.output(both[0], "output_0")
    net.output(places, "output_1")
    found = first_difference(net, GraphModule(torch.nn.Module(), graph), {"x": torch.randn(4, 5)})
    assert (found.node if found else None) == (best.name if wrong else None)
    net.values[total.name] = 13
    found = first_difference(net, GraphModule(torch.nn.Module(), graph), {"x": torch.randn(4, 5)}, limit=0.9)
    assert found is not None and (found.node, found.tensor, int(found.network)) == (total.name, "", 13)


@pytest.mark.parametrize("wrong", [False, True])
def test_an_input_written_in_place(wrong):
    """Its placeholder stands for the new value afterwards, as `convert` has it; the caller's tensor stays."""
    graph = Graph()
    cache, _, x = graph.placeholder("cache"), graph.placeholder("unread"), graph.placeholder("x")
    double = graph.call_function(aten.mul.Tensor, (cache, 2))
    written = graph.call_function(aten.add_.Tensor, (cache, x))
    after = graph.call_function(aten.neg.default, (cache,))
    more = graph.call_function(aten.add_.Tensor, (after, x))
    graph.output((after,))
    net = Network()
    old, new = net.input("cache", F32, [3]), net.input("x", F32, [3])
    updated = net.elementwise("SUB" if wrong else "SUM", old, new)
    twice, negative = net.elementwise("SUM", old, old), net.unary("NEG", updated)
    total = net.elementwise("SUM", negative, new)
    net.values = {"cache": updated, "x": new, double.name: twice, written.name: updated, after.name: total, more.name: total}
    net.output(total, "output_0")
    net.output(updated, "cache_out")
    feeds = {"cache": torch.tensor([1.0, 2, 3]), "x": torch.tensor([10.0, 20, 30])}
    gm = GraphModule(torch.nn.Module(), graph)
    found = first_difference(net, gm, feeds)
    assert (found.node if found else None) == (written.name if wrong else None)
    assert torch.equal(feeds["cache"], torch.tensor([1.0, 2, 3]))
    found = first_difference(net, gm, feeds, observed={"cache_out": torch.zeros(3)})
    assert found is not None and (found.node, found.error) == (written.name, 1.0)
    assert torch.equal(found.graph, torch.tensor([11.0, 22, 33]))
    found = first_difference(net, gm, feeds, observed={"output_0": torch.tensor([-1.0, -2, -4])})
    assert found is not None and found.node == more.name
    net.values[double.name] = net.values["x"]
    found = first_difference(net, gm, feeds)
    assert found is not None and torch.equal(found.graph, torch.tensor([2.0, 4, 6]))


@pytest.mark.parametrize(
    ("network", "graph", "expected"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([1.0, -INF], [1.0, -INF], 0.0),
        ([1.0, INF], [1.0, -INF], INF),
        ([1.0, float("nan")], [1.0, float("nan")], 0.0),
        ([1.0, 0.0], [1.0, float("nan")], INF),
        ([1.0, INF], [1.0, float("nan")], INF),
        ([[1.0, 2.0]], [1.0, 2.0], INF),
        ([0.0, 1e-30], [0.0, 0.0], INF),
        ([], [], 0.0),
    ],
)
def test_relative_error(network, graph, expected):
    assert relative_error(torch.tensor(network), torch.tensor(graph)) == expected
