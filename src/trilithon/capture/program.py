"""What lifting and proving ask of a program: an ExportedProgram has it, and so has a traced graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import Graph, GraphModule, Node


class Signature(Protocol):
    """Which inputs of the graph are the program's own tensors (input -> where the tensor is), and which of these it changes."""

    @property
    def inputs_to_parameters(self) -> Mapping[str, str]: ...
    @property
    def inputs_to_buffers(self) -> Mapping[str, str]: ...
    @property
    def inputs_to_lifted_tensor_constants(self) -> Mapping[str, str]: ...
    @property
    def buffers_to_mutate(self) -> Mapping[str, str]: ...


class Program(Protocol):
    """A functional graph of ATen operations, all of whose tensors are inputs; see `torch.export.ExportedProgram`."""

    @property
    def graph(self) -> Graph: ...
    @property
    def graph_signature(self) -> Signature: ...
    @property
    def state_dict(self) -> Mapping[str, Any]: ...
    @property
    def constants(self) -> Mapping[str, Any]: ...
    @property
    def range_constraints(self) -> Mapping[Any, Any]: ...


@dataclass(frozen=True)
class OwnTensors:
    """The signature of a graph whose own tensors are never written to."""

    inputs_to_lifted_tensor_constants: Mapping[str, str]
    inputs_to_parameters: Mapping[str, str] = field(default_factory=dict)
    inputs_to_buffers: Mapping[str, str] = field(default_factory=dict)
    buffers_to_mutate: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphProgram:
    """A functional graph as a program.

    Attributes:
        nodes: a node of the graph that it was made of -> the node here.
    """

    graph: Graph
    graph_signature: OwnTensors
    constants: Mapping[str, Any]
    range_constraints: Mapping[Any, Any]
    nodes: Mapping[Node, Node]
    state_dict: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, gm: GraphModule, names: Iterable[str] = ()) -> GraphProgram:
        """A copy of a functional graph, whose attributes become inputs of which the values are known.

        Args:
            gm: with `meta["val"]` at each node; nothing writes to its attributes.
            names: what to call its inputs, in order.
        """
        graph, nodes, own = Graph(), dict[Node, Node](), dict[str, str]()
        inputs = gm.graph.find_nodes(op="placeholder")
        for node, name in zip(inputs, [*names, *(n.name for n in inputs)], strict=False):
            nodes[node] = _input(graph, name, node.meta)
        attributes = {node: attrgetter(str(node.target))(gm) for node in gm.graph.find_nodes(op="get_attr")}
        attributes = {node: value for node, value in attributes.items() if isinstance(value, Tensor)}
        for node in attributes:
            nodes[node] = _input(graph, f"c_{node.name}", {**node.meta, "val": node.meta.get("val", attributes[node])})
            own[nodes[node].name] = str(node.target)
        for node in gm.graph.nodes:
            if node not in nodes:
                nodes[node] = graph.node_copy(node, nodes.__getitem__)
        constants = {str(node.target): value for node, value in attributes.items() if not is_fake(value)}
        return cls(graph, OwnTensors(own), constants, _ranges(gm.graph), nodes)


def _input(graph: Graph, name: str, meta: dict[str, Any]) -> Node:
    node = graph.placeholder(name)
    node.meta = dict(meta)
    return node


def is_fake(value: Any) -> bool:
    """Has the tensor no data?"""
    return isinstance(value, torch._subclasses.FakeTensor) or (isinstance(value, Tensor) and value.is_meta)


def _ranges(graph: Graph) -> dict[Any, Any]:
    """Size symbol -> the range that was assumed when the graph was traced."""
    mode = detect_fake_mode([node.meta.get("val") for node in graph.nodes])
    shapes = None if mode is None else mode.shape_env
    ranges = {} if shapes is None else shapes.var_to_range
    return {symbol: allowed for symbol, allowed in ranges.items() if symbol.is_integer}  # others are floats


def known_size(size: int | torch.SymInt) -> int | None:
    """The one number that a size can be, though export may not have put it in; None where there are several."""
    if isinstance(size, int):
        return size
    span = size.node.shape_env.bound_sympy(size.node.expr)
    return int(span.lower) if span.lower == span.upper else None
