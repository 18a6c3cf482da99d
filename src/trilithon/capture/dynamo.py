"""The graph that Dynamo gives to a backend, traced to a functional program in which its attention calls are found again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch.fx import Graph, GraphModule, Node
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trilithon.capture.program import GraphProgram
from trilithon.errors import CaptureError

ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")  # of torch's function


@dataclass(frozen=True)
class TracedCalls:
    """A Dynamo graph as a program.

    Attributes:
        program: functional; weights and other attributes are inputs of which nothing is known, since no guard of Dynamo
            looks at values.
        calls: an attention call of the program -> the node of the Dynamo graph that it was.
        inputs: name of an input of the program -> the placeholder of the Dynamo graph that it was.
        writes: whether the graph writes to its inputs.
    """

    program: GraphProgram
    calls: Mapping[Node, Node]
    inputs: Mapping[str, Node]
    writes: bool


def masked_calls(graph: Graph) -> list[Node]:
    """The calls of torch's attention that are given a mask."""
    found = graph.find_nodes(op="call_function", target=scaled_dot_product_attention)
    return [node for node in found if isinstance(call_arguments(node).get("attn_mask"), Node)]


def call_arguments(node: Node) -> dict[str, Any]:
    """What a call of torch's attention is given, by name."""
    return {**dict(zip(ARGUMENTS, node.args, strict=False)), **node.kwargs}


def trace_calls(gm: GraphModule) -> TracedCalls:
    """Trace a Dynamo graph with the fake tensors that Dynamo made it with, so that what tracing assumes about sizes becomes
    guards of Dynamo.

    Raises:
        CaptureError: the graph has something that cannot be traced this way.
    """
    _require_plain(gm)
    calls = masked_calls(gm.graph)
    copy, inputs = _all_inputs(gm, calls)
    values = [node.meta["example_value"] for node in inputs]
    traced, writes = _trace(copy, values)
    outputs: Any = traced.graph.output_node().args[0]
    program = GraphProgram.of(traced, [_readable(node) for node in inputs])
    results = [program.nodes.get(node) for node in outputs[len(outputs) - len(calls) :]]
    _forget_symbolic_scales(program.graph)
    ours = {name: node for name, node in zip(_inputs_of(program), inputs, strict=False) if node.op == "placeholder"}
    return TracedCalls(program, {n: c for n, c in zip(results, calls, strict=True) if n is not None}, ours, writes)


def _inputs_of(program: GraphProgram) -> list[str]:
    return [node.name for node in program.graph.find_nodes(op="placeholder")]


def _require_plain(gm: GraphModule) -> None:
    """Refuse what makes a traced graph another function than Dynamo's, or leaves traces in Dynamo's state."""
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if node.op == "placeholder" and value is None:
            raise _refuse(f"{node.name} has no example value")
        if node.op == "placeholder" and isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
            raise _refuse(f"{node.name} is a {type(value).__name__}, which is many tensors")
        if "unbacked_bindings" in node.meta:
            raise _refuse(f"{node.name} is a size that depends on data")
        if node.op == "call_function" and str(getattr(node.target, "__name__", "")).startswith("_enter_"):
            raise _refuse(f"{node.target.__name__} changes how all that follows runs")
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise _refuse("autocast is on", todo="call the model outside torch.autocast, in the type that it should have")


def _refuse(why: str, todo: str = "") -> CaptureError:
    return CaptureError("cannot trace this graph", why=why, todo=todo)


def _all_inputs(gm: GraphModule, calls: list[Node]) -> tuple[GraphModule, list[Node]]:
    """A copy of the graph that gives the results of the calls; and what its inputs were.

    Attributes and floats become inputs: their values are not guarded, or only by symbols that a trace has no tensor for.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    inputs += [n for n in gm.graph.nodes if _is_tensor_attribute(n) or _is_float_of_input(n)]
    graph, mapping = Graph(), dict[Node, Node]()
    for node in inputs:
        mapping[node] = graph.placeholder(node.name)
        mapping[node].meta = dict(node.meta)
    for node in gm.graph.nodes:
        if node not in mapping and node.op != "output":
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
    graph.output(tuple(mapping[call] for call in calls))
    return GraphModule(gm, graph), inputs


def _is_tensor_attribute(node: Node) -> bool:
    return node.op == "get_attr" and isinstance(node.meta.get("example_value"), Tensor)


def _is_float_of_input(node: Node) -> bool:
    """`scale.item()`: how Dynamo has a float that may change."""
    return node.op == "call_method" and node.target == "item" and isinstance(node.meta.get("example_value"), torch.SymFloat)


def _trace(gm: GraphModule, values: list[Any]) -> tuple[GraphModule, bool]:
    """The functional ATen graph, with composite operations kept; and whether it writes to inputs."""
    from torch._functorch.aot_autograd import aot_export_module

    mode = detect_fake_mode(values)
    if mode is None:
        raise _refuse("its inputs are no fake tensors")
    try:
        with torch.no_grad(), tracing(TracingContext(mode)):
            traced, signature = aot_export_module(gm, values, trace_joint=False, pre_dispatch=True, decompositions={})
    except Exception as error:  # tracing raises many types
        raise _refuse(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    assert isinstance(traced, GraphModule)
    return traced, bool(signature.user_inputs_to_mutate or signature.buffers_to_mutate)


def _readable(node: Node) -> str:
    """The name that the user has for an input: `attention_mask` for `L['kwargs']['attention_mask']`."""
    source = getattr(node, "_dynamo_source", None) or getattr(node.meta.get("grapharg"), "source", None)
    name: Any = getattr(source, "name", "")
    words = re.findall(r"\w+", name() if callable(name) else name)
    return words[-1] if words and words[-1].isidentifier() else node.name


def _forget_symbolic_scales(graph: Graph) -> None:
    """No mask depends on the scale, and a scale that may change is no number."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default):
        if isinstance(node.kwargs.get("scale"), Node):
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "scale"}
