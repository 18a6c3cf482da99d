"""An exported program made functional: by rewriting the few operations that torch.export never keeps, or traced anew.

`ExportedProgram.run_decompositions({})` runs a program twice over fake tensors, which takes longer than the export itself. Of
most models it changes eight composite operations that may or may not give back what they take, and leaves out what is dead.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from trilithon.passes import bound_arguments

aten = torch.ops.aten
log = logging.getLogger(__name__)
KEPT = {  # composite operations that stay as they are
    aten.sym_size.int, aten.diff.default, aten.__and__.Tensor, aten.linear.default, aten.matmul.default, aten.softmax.int,
    aten.scaled_dot_product_attention.default, aten.layer_norm.default, aten.where.ScalarOther, aten.type_as.default,
    aten.repeat_interleave.self_int, aten.square.default, aten.conv1d.default, aten.min.other, aten.max.other,
}  # fmt: skip
TRACED = {aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.lift.default}  # and what depends on data
NUMBERS = ("_operator", "math")  # modules whose functions are of sizes


class CannotRewrite(Exception):
    """A program has an operation that is left to torch.export."""


def functional(program: ExportedProgram, *, own: bool) -> ExportedProgram:
    """In-place operations dissolved, SDPA kept (an empty decomposition table).

    Args:
        own: `program` may be changed.
    """
    if own and all(map(_is_known, program.graph.nodes)):
        try:
            return _rewritten(program)
        except CannotRewrite:
            pass  # what has been rewritten by then means the same
        except Exception as error:  # of another release of torch
            log.warning("a program is traced anew, which takes longer: %s: %s", type(error).__name__, error)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: ExportedProgram = program.run_decompositions({})
        return made


def _is_known(node: Node) -> bool:
    """Does it stay, or has it a rewrite here?"""
    if node.op != "call_function":
        return node.op != "call_module"
    target: Any = node.target
    if not isinstance(target, OpOverload):
        return getattr(target, "__module__", "") in NUMBERS or getattr(target, "__name__", "").startswith("sym_")
    if target in REWRITES or target in KEPT:
        return True
    is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    return not (is_composite or target._schema.is_mutable or target in TRACED or torch.Tag.data_dependent_output in target.tags)


def _rewritten(program: ExportedProgram) -> ExportedProgram:
    graph = program.graph
    for node in list(graph.nodes):
        rewrite = REWRITES.get(node.target)
        if rewrite is None:
            continue
        with graph.inserting_before(node), _deciding(node):
            made = rewrite(graph, node, bound_arguments(node))
        for fresh in _fresh(made, node):
            fresh.meta = {**node.meta, **({"val": fresh.meta["val"]} if "val" in fresh.meta else {})}
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    specs: Any = program.graph_signature.output_specs
    results: Any = graph.output_node().args[0]
    for spec, result in zip(specs, results, strict=True):
        if isinstance(result, Node):
            if result.op == "placeholder":
                raise CannotRewrite
            spec.arg.name = result.name
    return ExportedProgram(
        root=program.graph_module, graph=graph, graph_signature=program.graph_signature, state_dict=program.state_dict,
        range_constraints=program.range_constraints, module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs, constants=program.constants,
    )  # fmt: skip


def _fresh(made: Node, node: Node) -> Iterator[Node]:
    """The nodes that were put between what `node` reads and itself."""
    reads = set(node.all_input_nodes)
    while made not in reads:
        yield made
        made = made.all_input_nodes[0]


@contextmanager
def _deciding(node: Node) -> Iterator[None]:
    """What is asked of symbolic sizes is answered by those of the example, as in a trace."""
    value = node.meta["val"]
    mode = getattr(value[0] if isinstance(value, (tuple, list)) else value, "fake_mode", None)
    if mode is None or mode.shape_env is None:
        raise CannotRewrite
    with mode, mode.shape_env.suppress_guards():
        yield


def _to(graph: Graph, node: Node, args: dict[str, Any]) -> Node:
    x, value = args["self"], node.meta["val"]
    unusual = args.get("copy"), args.get("pin_memory"), args.get("layout") not in (None, torch.strided)
    if any(unusual) or args.get("memory_format") is not None:
        raise CannotRewrite
    before = x.meta["val"]
    asked = {name: getattr(value, name) for name in ("dtype", "device") if getattr(value, name) != getattr(before, name)}
    return graph.call_function(aten._to_copy.default, (x,), asked) if asked else x


def _contiguous(graph: Graph, node: Node, args: dict[str, Any]) -> Node:
    x: Node = args["self"]
    if node.kwargs.get("memory_format", torch.contiguous_format) != torch.contiguous_format or len(node.args) > 1:
        raise CannotRewrite
    return x if x.meta["val"].is_contiguous() else _copied(graph, x)


def _copied(graph: Graph, x: Node) -> Node:
    made = graph.call_function(aten.clone.default, (x,), {"memory_format": torch.contiguous_format})
    made.meta["val"] = x.meta["val"].clone(memory_format=torch.contiguous_format)
    return made


def _dropout(graph: Graph, node: Node, args: dict[str, Any]) -> Node:
    if args["train"]:
        raise CannotRewrite
    return graph.call_function(aten.clone.default, (args["input"],))


def _reshape(graph: Graph, node: Node, args: dict[str, Any]) -> Node:
    return _viewed(graph, args["self"], list(args["shape"]), node.meta["val"])


def _viewed(graph: Graph, x: Node, shape: list[Any], value: Tensor) -> Node:
    try:
        x.meta["val"].view(value.shape)
    except (RuntimeError, ValueError):  # its numbers do not stand in that order
        return graph.call_function(aten._unsafe_view.default, (_copied(graph, x), shape))
    return graph.call_function(aten.view.default, (x, shape))


def _flatten(graph: Graph, node: Node, args: dict[str, Any]) -> Node:
    x: Node = args["self"]
    value = node.meta["val"]
    rank = x.meta["val"].dim()
    if rank == 0:
        raise CannotRewrite
    first, last = args["start_dim"] % rank, args["end_dim"] % rank
    if first == last:
        return x
    shape: list[Any] = []
    for axis, size in enumerate(value.shape):
        if isinstance(size, int):
            shape.append(size)
        elif axis == first:
            shape.append(-1)
        else:
            held = graph.call_function(aten.sym_size.int, (x, axis if axis < first else axis + last - first))
            held.meta = {**node.meta, "val": size}
            shape.append(held)
    return _viewed(graph, x, shape, value)


def _chunk(graph: Graph, node: Node, args: dict[str, Any]) -> Node:
    x, pieces, axis = args["self"], args["chunks"], args["dim"]
    size = x.meta["val"].shape[axis]
    if not isinstance(size, int) or size == 0:
        raise CannotRewrite
    return graph.call_function(aten.split.Tensor, (x, -(-size // pieces), axis))


REWRITES: dict[Any, Callable[[Graph, Node, dict[str, Any]], Node]] = {
    aten.to.dtype: _to,
    aten.to.dtype_layout: _to,
    aten.to.device: _to,
    aten.contiguous.default: _contiguous,
    aten.dropout.default: _dropout,
    aten.reshape.default: _reshape,
    aten.flatten.using_ints: _flatten,
    aten.chunk.default: _chunk,
}
