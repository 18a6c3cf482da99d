"""Collectives of torch.distributed as operations of a graph: their names, and which group of ranks they are of.

They are PyTorch's functional collectives, which name a group by a text, so that export, Inductor and CUDA graphs know them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

ALL_REDUCE = "_c10d_functional.all_reduce.default"
ALL_REDUCE_IN_PLACE = "_c10d_functional.all_reduce_.default"
ALL_GATHER = "_c10d_functional.all_gather_into_tensor.default"
WAIT = "_c10d_functional.wait_tensor.default"
MEETINGS = (ALL_REDUCE, ALL_REDUCE_IN_PLACE, ALL_GATHER)


def all_reduce(x: Tensor, group: str, how: str = "sum") -> Tensor:
    """The sum of `x` over the ranks, or its "max", on each of them."""
    ops = torch.ops._c10d_functional
    total: Tensor = ops.wait_tensor(ops.all_reduce(x, how, group))
    return total


def all_gather(x: Tensor, ranks: int, group: str) -> Tensor:
    """What each rank has, one behind the other along the first axis, on each of them; all are of one shape."""
    ops = torch.ops._c10d_functional
    joined: Tensor = ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), ranks, group))
    return joined


def any_of_ranks(found: Sequence[bool], group: str, device: torch.device) -> list[bool]:
    """Each of `found`, as it is on any rank; all have as many."""
    most = all_reduce(torch.tensor([int(x) for x in found], device=device), group, "max")
    return [bool(x) for x in most.tolist()]


def of_first_rank(x: Tensor, group: str) -> Tensor:
    """What the first rank has, on each of them."""
    ops = torch.ops._c10d_functional
    given = x.to(torch.uint8) if x.dtype == torch.bool else x  # gloo sends no bool
    sent: Tensor = ops.wait_tensor(ops.broadcast(given.contiguous(), 0, group))
    return sent.to(x.dtype)


def group_of(graph: Graph) -> str | None:
    """The group whose ranks run the graph together; None where one process runs it alone."""
    return next((str(n.args[-1]) for n in graph.nodes if str(n.target) in MEETINGS), None)


def is_gathered(graph: Graph) -> bool:
    """Is the graph's result put together of all ranks', and so the same on each to the last bit?"""
    moved = torch.ops.aten.permute.default, torch.ops.aten.slice.Tensor, torch.ops.aten.clone.default
    found: Any = graph.output_node().args[0]
    while isinstance(found, (tuple, list)) and found:
        found = found[0]
    while isinstance(found, Node) and found.args and (str(found.target) == WAIT or found.target in moved):
        found = found.args[0]
    return isinstance(found, Node) and str(found.target) == ALL_GATHER


def alone(gm: GraphModule) -> GraphModule:
    """What one rank can run while others do not: a copy of the graph in which they all have what it has; sums are left out.

    It shares weights and submodules; of one process it is `gm` itself.
    """
    if group_of(gm.graph) is None:
        return gm
    made = GraphModule(gm, copy.deepcopy(gm.graph))
    for node in list(made.graph.nodes):
        if str(node.target) not in (*MEETINGS, WAIT):
            continue
        x = node.args[0]
        if str(node.target) == ALL_GATHER:
            with made.graph.inserting_before(node):
                x = made.graph.call_function(torch.ops.aten.cat.default, ([x] * node.args[1],))
        node.replace_all_uses_with(x)
        made.graph.erase_node(node)
    made.recompile()
    return made
