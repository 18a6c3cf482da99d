"""Graphs as plain data for JSON and back: calls out of a closed table, their arguments, and names of weights.

A graph that was read holds of each tensor its type and the names of its sizes, and of each size its name: what passes ask for.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule

from trilithon.errors import CannotLower
from trilithon.lower.graph_ops import called, name_of
from trilithon.passes import where_of

Data = dict[str, Any]
LAYOUTS = {str(x): x for x in (torch.strided,)}
FORMATS = {str(x): x for x in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)}
DTYPES = {str(x): x for x in vars(torch).values() if isinstance(x, torch.dtype)}
PLAIN = (bool, int, str, type(None))


@dataclass(frozen=True)
class Shape:
    """What lowering asks of a value, in the place of a fake tensor: its type, and its sizes as numbers or names."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def dim(self) -> int:
        return len(self.shape)

    def new_empty(self, shape: Iterable[int | str]) -> Shape:
        return Shape(self.dtype, tuple(shape))


@dataclass(frozen=True)
class GraphData:
    """A graph, and its weights by name."""

    nodes: list[Any]
    tensors: Mapping[str, Tensor]


def to_data(gm: GraphModule) -> GraphData:
    """The graph of a canonical module; the tensors are its own.

    Raises:
        CannotLower: it holds something that is not in the closed table; says which node.
    """
    places: dict[Node, int] = {}
    tensors: dict[str, Tensor] = {}
    nodes = list[Any]()
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            tensors[str(node.target)] = _tensor(gm, node)
        target = _target(node)
        entry = [
            node.op,
            node.name,
            target,
            _argument(node, list(node.args), places),
            _argument(node, dict(node.kwargs), places),
        ]
        value = _value_data(node.meta.get("val"))
        if value is not None:
            entry.append(value)
        places[node] = len(nodes)
        nodes.append(entry)
    return GraphData(nodes, tensors)


def _refuse(node: Node, why: str) -> CannotLower:
    todo = "keep the model in memory; if a general program is what cannot be saved, compile with when_guard_fails='raise'"
    return CannotLower(f"cannot save the program with {node.name}", why=why, todo=todo, where=where_of(node))


def _value_data(value: Any) -> Any:
    """What is known of a value, as plain data: of a tensor its type and sizes, of a size its name; None of others."""
    if isinstance(value, (Tensor, Shape)):
        return [str(value.dtype), [x if isinstance(x, int) else str(x) for x in value.shape]]
    if isinstance(value, (tuple, list)):
        return {"tuple": [_value_data(x) for x in value]}
    if isinstance(value, (int, torch.SymInt, str)) and not isinstance(value, bool):
        return value if isinstance(value, int) else str(value)
    return None


def _target(node: Node) -> str:
    if node.op == "call_function":
        name = name_of(node.target)
        if name is None:
            raise _refuse(node, f"{node.target} is not in the table of operations that a file may hold")
        return name
    target = str(node.target)
    if node.op not in ("placeholder", "get_attr", "output") or not _is_name(target):
        raise _refuse(node, f"a file holds no {node.op} of {target}")
    return target


def _tensor(gm: GraphModule, node: Node) -> Tensor:
    value = getattr(gm, str(node.target), None)
    if not isinstance(value, Tensor):
        raise _refuse(node, f"it stands for a {type(value).__name__}, not for a tensor")
    return value


def _argument(node: Node, value: Any, places: Mapping[Node, int]) -> Any:
    """An argument as plain data; what is none is a dict with one key."""
    if isinstance(value, Node):
        return {"#": places[value]}
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, list):
        return [_argument(node, x, places) for x in value]
    if isinstance(value, tuple):
        return {"tuple": [_argument(node, x, places) for x in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _argument(node, x, places) for key, x in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_argument(node, x, places) for x in (value.start, value.stop, value.step)]}
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return {type(value).__name__: str(value)}
    if isinstance(value, torch.device):
        return {"device": value.type}
    raise _refuse(node, f"its argument {value!r} has no plain form")


# ---------------------------------------------------------------- and back


def from_data(nodes: list[Any], tensors: Mapping[str, Tensor], device: torch.device) -> GraphModule:
    """The module of which `to_data` gave `nodes`.

    Args:
        tensors: weights by name, on the device.
        device: on which it makes what it makes, wherever it was captured.

    Raises:
        ValueError, TypeError, KeyError, IndexError, AttributeError: it did not.
    """
    root, graph, made = nn.Module(), Graph(), list[Node]()
    for name, tensor in tensors.items():
        root.register_buffer(_checked(name), tensor)
    for op, name, target, args, kwargs, *value in nodes:
        if op not in ("placeholder", "get_attr", "call_function", "output"):
            raise ValueError(f"a saved graph has no {op}")
        if op == "get_attr" and target not in tensors:
            raise ValueError(f"there is no weight {target}")
        read = _Reader(made, device)
        given = read(kwargs)
        if not isinstance(given, dict) or not all(map(_is_name, given)):
            raise ValueError(f"{name} has no arguments by name")
        what = called(target) if op == "call_function" else _checked(target)
        node = graph.create_node(op, what, tuple(read(args)), given, name=_checked(name))
        for kept in value:
            node.meta["val"] = _value(kept)
        made.append(node)
    graph.lint()
    return _LazyGraphModule(root, graph)  # passes follow, and each would have its code written anew


@dataclass(frozen=True)
class _Reader:
    """Arguments from plain data."""

    made: list[Node]
    device: torch.device

    def __call__(self, data: Any) -> Any:
        if isinstance(data, PLAIN):
            return data
        if isinstance(data, list):
            return [self(x) for x in data]
        ((kind, value),) = data.items()
        if kind == "#":
            if not 0 <= value < len(self.made):
                raise ValueError(f"an argument is value {value}, of which there are {len(self.made)} so far")
            return self.made[value]
        if kind == "dict":
            return {key: self(x) for key, x in value.items()}
        readers: dict[str, Callable[[Any], Any]] = {
            "float": float.fromhex,
            "tuple": lambda x: tuple(self(each) for each in x),
            "slice": lambda x: slice(*map(self, x)),
            "dtype": DTYPES.__getitem__,
            "layout": LAYOUTS.__getitem__,
            "memory_format": FORMATS.__getitem__,
            "device": lambda x: self.device,
        }
        return readers[kind](value)


def _value(data: Any) -> Any:
    """What `_value_data` was made of."""
    if isinstance(data, dict):
        return tuple(None if x is None else _value(x) for x in data["tuple"])
    if not isinstance(data, list):
        return _size(data)
    dtype, sizes = data
    return Shape(DTYPES[dtype], tuple(_size(x) for x in sizes))


def _size(x: Any) -> int | str:
    if type(x) not in (int, str):
        raise ValueError(f"{x!r} is no size")
    return x  # type: ignore[no-any-return]


def _is_name(text: Any) -> bool:
    """May a graph's code hold it as a name?"""
    return isinstance(text, str) and text.isascii() and text.isidentifier() and not keyword.iskeyword(text)


def _checked(text: Any) -> str:
    if not _is_name(text):
        raise ValueError(f"{text!r} is no name")
    return str(text)
