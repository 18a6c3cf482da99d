"""A program for one row: a graph in which each size is a number and the shape of every value is known."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Interpreter, Node
from torch.fx._lazy_graph_module import _LazyGraphModule

from trilithon.lower.inputs import Input
from trilithon.lower.native.fused.remembered import Remembered

META = torch.device("meta")


def at_one_token(gm: GraphModule, inputs: tuple[Input, ...], tokens: int | None = None) -> GraphModule:
    """A copy of a program for one row; it shares the weights, and `meta["val"]` of each node is a tensor without numbers.

    Args:
        gm: made by `insert_cache`, lowered.
        inputs: what it takes; the first axis of each runs over rows.
        tokens: of the row; None = as many as it takes at most, one of a step.
    """
    made: GraphModule = _LazyGraphModule(gm, copy.deepcopy(gm.graph))  # it is read, and seldom run
    known = Remembered("sizes", None, gm, inputs, tokens)  # to run it on such tensors, Dynamo is imported, which takes seconds
    kept = known.read()
    if kept is None:
        _run(made, inputs, tokens)
        known.keep([_data(n.meta["val"]) for n in made.graph.nodes])
    else:
        for node, value in zip(made.graph.nodes, kept, strict=True):
            node.meta["val"] = _value(value)
    for node in list(made.graph.nodes):
        if node.op == "call_function" and isinstance(node.meta["val"], int):
            _put_number(node, node.meta["val"])
    made.graph.eliminate_dead_code()
    return made


def _run(gm: GraphModule, inputs: tuple[Input, ...], tokens: int | None) -> None:
    shapes = [tuple(axis.high if i else 1 for i, axis in enumerate(x.axes)) for x in inputs]
    shapes[0] = shapes[0] if tokens is None else (1, tokens)
    with torch.no_grad(), META:
        _Record(gm).run(*(torch.empty(n, dtype=x.dtype) for n, x in zip(shapes, inputs, strict=True)))


def _data(value: Any) -> Any:
    """A value without numbers as plain data."""
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "stride": value.stride()}
    return [_data(x) for x in value] if isinstance(value, (tuple, list)) else value


def _value(data: Any) -> Any:
    if isinstance(data, dict):
        return torch.empty_strided(data["shape"], data["stride"], dtype=getattr(torch, data["dtype"]), device=META)
    return tuple(_value(x) for x in data) if isinstance(data, list) else data


class _Record(Interpreter):
    """Runs a graph on tensors without numbers, which it notes in each node."""

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "get_attr" and isinstance(value, Tensor):
            value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        n.meta["val"] = value
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        makes = isinstance(target, OpOverload) and any(x.name == "device" for x in target._schema.arguments)
        return super().call_function(target, args, kwargs | ({"device": META} if makes or "device" in kwargs else {}))


def _put_number(node: Node, number: int) -> None:
    for user in list(node.users):
        user.args = torch.fx.node.map_arg(user.args, lambda n: number if n is node else n)
        user.kwargs = torch.fx.node.map_arg(user.kwargs, lambda n: number if n is node else n)
    node.graph.erase_node(node)
