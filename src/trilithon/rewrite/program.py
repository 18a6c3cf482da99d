"""Exported programs as values: copy one to work on, and seal the result."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, TensorArgument
from torch.fx import Graph, GraphModule, Node


def working_copy(program: ExportedProgram) -> tuple[GraphModule, dict[Node, Node]]:
    """A copy of the program's graph that shares its weights, and the map from old nodes to new."""
    graph = Graph()
    mapping: dict[Node, Node] = {}
    output = graph.graph_copy(program.graph, mapping)
    for old, new in mapping.items():
        if old.op == "placeholder":
            new.name = old.name  # fx would call `input` `input_1`, and the signature does not
    node = graph.output(output)
    node.meta = dict(program.graph.output_node().meta)
    return GraphModule(program.graph_module, graph), mapping


def seal(gm: GraphModule, program: ExportedProgram) -> ExportedProgram:
    """The edited graph as an exported program with the signature, weights and ranges of the original."""
    outputs = gm.graph.output_node().args[0]
    specs = [
        replace(spec, arg=TensorArgument(name=node.name))
        if isinstance(node, Node) and isinstance(spec.arg, TensorArgument)
        else spec
        for spec, node in zip(program.graph_signature.output_specs, outputs, strict=True)  # type: ignore[arg-type]
    ]
    signature = ExportGraphSignature(input_specs=list(program.graph_signature.input_specs), output_specs=specs)
    return ExportedProgram(  # it makes the code of the graph
        root=gm,
        graph=gm.graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=[program.verifier],
    )


def refresh_shapes(gm: GraphModule, after: Node) -> None:
    """Recompute `meta["val"]` of every node behind `after` from its operands' fake tensors."""
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode([n.meta.get("val") for n in gm.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)])
    behind = False
    for node in gm.graph.nodes:
        if behind and node.op == "call_function" and mode is not None:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
            with mode:
                node.meta["val"] = node.target(*args, **kwargs)
        behind = behind or node is after
