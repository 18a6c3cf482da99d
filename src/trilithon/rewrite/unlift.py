"""An exported program as a plain module: weights become attributes, user inputs become arguments in order."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node

from trilithon.errors import CannotLower

WEIGHTS = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}


def unlift(program: ExportedProgram) -> GraphModule:
    """The program as a GraphModule that takes its tensor inputs in signature order and shares its weights.

    Inputs that export fixed (None, bool, int) disappear. One output stays one value, several a tuple.

    Raises:
        CannotLower: the program mutates a buffer or an input.
    """
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise CannotLower(
            "cannot run this program",
            why="it mutates its buffers or inputs: " + ", ".join([*signature.buffers_to_mutate.values()]),
            todo="export the model without a mutable cache; Trilithon adds its own",
        )
    root = nn.Module()
    graph, mapping = Graph(), dict[Node, Node]()
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind in WEIGHTS:
                value = program.state_dict.get(spec.target, program.constants.get(spec.target))
                root.register_buffer(node.name, value)
                mapping[node] = _attribute(graph, node)
            elif isinstance(node.meta.get("val"), Tensor):
                mapping[node] = graph.node_copy(node)
        elif node.op == "output":
            values = [mapping[n] if isinstance(n, Node) else n for n in node.args[0]]
            graph.output(values[0] if len(values) == 1 else tuple(values))
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    return GraphModule(root, graph)


def device_of(gm: GraphModule) -> torch.device:
    """Where the weights of an unlifted program are; the CPU where it has none."""
    return next((x.device for x in chain(gm.parameters(), gm.buffers())), torch.device("cpu"))


def _attribute(graph: Graph, node: Node) -> Node:
    copy = graph.get_attr(node.name)
    copy.meta = dict(node.meta)
    return copy


def fake_inputs(program: ExportedProgram) -> dict[str, Tensor]:
    """The tensor inputs by name, in order, as the fake tensors of the export."""
    names = {s.arg.name for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT}
    return {
        n.name: n.meta["val"]
        for n in program.graph.nodes
        if n.op == "placeholder" and n.name in names and isinstance(n.meta.get("val"), Tensor)
    }


def input_names(program: ExportedProgram) -> tuple[str, ...]:
    """The tensor inputs that the unlifted module takes, in order."""
    return tuple(fake_inputs(program))
