"""A program for one row: a graph in which each size is a number and the shape of every value is known."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node

from trilithon.lower.inputs import Input


def at_one_token(gm: GraphModule, inputs: tuple[Input, ...], tokens: int | None = None) -> GraphModule:
    """A copy of a program for one row; it shares the weights, and `meta["val"]` of each node is a fake tensor.

    Args:
        gm: made by `insert_cache`, lowered.
        inputs: what it takes; the first axis of each runs over rows.
        tokens: of the row; None = as many as it takes at most, one of a step.
    """
    made = GraphModule(gm, copy.deepcopy(gm.graph))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        shapes = [tuple(axis.high if i else 1 for i, axis in enumerate(x.axes)) for x in inputs]
        shapes[0] = shapes[0] if tokens is None else (1, tokens)
        given = [torch.empty(shape, dtype=x.dtype) for shape, x in zip(shapes, inputs, strict=True)]
        _Record(made, mode).run(*given)
    for node in list(made.graph.nodes):
        if node.op == "call_function" and isinstance(node.meta["val"], int):
            _put_number(node, node.meta["val"])
    made.graph.eliminate_dead_code()
    return made


class _Record(Interpreter):
    """Runs a graph on fake tensors, which it notes in each node; all of them on the CPU."""

    def __init__(self, gm: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self.mode = mode

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "get_attr" and isinstance(value, Tensor):
            value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        n.meta["val"] = value
        return value


def _put_number(node: Node, number: int) -> None:
    for user in list(node.users):
        user.args = torch.fx.node.map_arg(user.args, lambda n: number if n is node else n)
        user.kwargs = torch.fx.node.map_arg(user.kwargs, lambda n: number if n is node else n)
    node.graph.erase_node(node)
