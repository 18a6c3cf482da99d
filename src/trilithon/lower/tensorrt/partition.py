"""Split a module where TensorRT cannot follow: engines for what has a converter, PyTorch for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

from trilithon.lower.inputs import Axis, Input, fixed
from trilithon.lower.tensorrt.converters.registry import CONVERTERS

aten = torch.ops.aten
ENGINE = "engine_"  # starts the names of the parts that become engines
WORTH_IT = ("attention", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv")  # a part without is left to PyTorch


class _Support(OperatorSupportBase):
    """Nodes that have a converter, except those named, which turned out to be more than it takes."""

    def __init__(self, refused: Mapping[str, str]) -> None:
        self.refused = refused

    def is_node_supported(self, submodules: Mapping[str, torch.nn.Module], node: Node) -> bool:
        return node.op == "get_attr" or (node.target in CONVERTERS and node.name not in self.refused)


def split(gm: GraphModule, refused: Mapping[str, str]) -> GraphModule:
    """A module that calls a submodule `engine_0`, ... for each part that can be an engine.

    Args:
        gm: every node has its fake tensor in `meta["val"]`.
        refused: name of a node that TensorRT cannot take -> why.
    """
    partitioner = CapabilityBasedPartitioner(gm, _Support(refused), allows_single_node_partition=False)
    parts = [p for p in partitioner.propose_partitions() if any(_is_heavy(n) for n in p.nodes)]
    whole = partitioner.fuse_partitions(parts, prefix=ENGINE)
    for _, part in engines(whole):
        _derive_sizes(part)
    return whole


def engines(whole: GraphModule) -> list[tuple[str, GraphModule]]:
    """The parts that are to become engines, by name."""
    return [(name, part) for name, part in whole.named_children() if name.startswith(ENGINE)]  # type: ignore[misc]


def _is_heavy(node: Node) -> bool:
    return any(word in str(node.target) for word in WORTH_IT)


def _derive_sizes(part: GraphModule) -> None:
    """Read the sizes that a part is given off the tensors that it is given."""
    placeholders = part.graph.find_nodes(op="placeholder")
    before = part.graph._root
    for node in placeholders:  # each may stand as late as its first use
        before.append(node)
        before = node
    tensors = [n for n in placeholders if isinstance(n.meta.get("val"), torch.Tensor)]
    for node in [n for n in part.graph.nodes if n.op == "placeholder" and n not in tensors]:
        found = _where_is(node.meta.get("val"), tensors)
        if found is None:
            continue
        with part.graph.inserting_after(tensors[-1]):
            size = part.graph.call_function(aten.sym_size.int, found)
        size.meta = dict(node.meta)
        node.replace_all_uses_with(size)
    part.recompile()


def _where_is(size: Any, tensors: Sequence[Node]) -> tuple[Node, int] | None:
    for tensor in tensors:
        for axis, other in enumerate(tensor.meta["val"].shape):
            if isinstance(size, torch.SymInt) and str(other) == str(size):
                return tensor, axis
    return None


def part_inputs(part: GraphModule, spans: Mapping[str, Axis]) -> tuple[Input, ...] | str:
    """What a part takes, or why it can be no engine.

    Args:
        spans: name of a size that export left dynamic -> what it may be.
    """
    found = []
    for node in part.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            if node.users:
                return f"it is given the size {node.name}, which no tensor of its has"
            found.append(Input(node.name, torch.int64, ()))
            continue
        axes = [fixed(size) if isinstance(size, int) else spans.get(str(size)) for size in value.shape]
        if None in axes:
            return f"the sizes {list(value.shape)} of {node.name} are not those of an input"
        found.append(Input(node.name, value.dtype, tuple(axis for axis in axes if axis is not None)))
    return tuple(found)
