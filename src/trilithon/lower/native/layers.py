"""Cut a program between its attention sites, so that Inductor compiles each kind of layer once, not each layer.

A compiled program of 28 layers takes Inductor 28 times as long as one of a layer. What several layers read, such as the cosines
of rotary embeddings, is made in the first part and handed on: within one program Inductor computes it anew wherever it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

HANDED = ("placeholder", "get_attr")  # read by parts without being handed on from one to the next


def in_layers(
    gm: GraphModule,
    is_site: Callable[[Node], bool],
    compiled: Callable[[GraphModule], nn.Module],
    is_apart: Callable[[Node], bool] = lambda node: False,
) -> GraphModule:
    """The program as calls of compiled parts, each of which holds one site; equal parts are one module.

    Args:
        gm: it is left as it is; a program that writes to no tensors but its inputs.
        is_site: is this node an attention?
        compiled: what runs a part.
        is_apart: does this node, whose result nothing reads, run as it is, behind the part that it stands in?
    """
    nodes = [n for n in gm.graph.nodes if n.op not in (*HANDED, "output")]
    ends = _cuts(nodes, [i for i, n in enumerate(nodes) if is_site(n)])
    parts = [nodes[a:b] for a, b in zip([0, *ends], [*ends, len(nodes)], strict=True)]
    maker = _Maker(gm, compiled)
    for part in parts:
        maker.add([n for n in part if not is_apart(n)])
        maker.copy([n for n in part if is_apart(n)])
    return maker.made()


def _cuts(nodes: list[Node], sites: list[int]) -> list[int]:
    """Where parts begin, but for the first: before what makes the last of the fewest values that are needed from there on.

    That is the sum at the end of a layer, which so is one kernel with the norm behind it.
    """
    place = {n: i for i, n in enumerate(nodes)}
    last = [max((place.get(u, len(nodes)) for u in n.users), default=-1) for n in nodes]
    alive, count = list[int](), 0  # values made before a place, and needed there or later
    for i in range(len(nodes)):
        alive.append(count)
        count += (last[i] > i) - sum(last[place[x]] == i for x in nodes[i].all_input_nodes if x in place)
    found = list[int]()
    for before, after in pairwise(sites):
        least = min(alive[before + 1 : after + 1])
        found.append(max(i for i in range(before + 1, after + 1) if alive[i] == least) - 1)
    return [cut for cut in found if cut > 0]


@dataclass
class _Maker:
    """The program of parts, as it grows."""

    gm: GraphModule
    compiled: Callable[[GraphModule], nn.Module]
    graph: Graph = field(default_factory=Graph)
    root: nn.Module = field(default_factory=nn.Module)
    values: dict[Node, Node] = field(default_factory=dict)  # of `gm` -> here
    kinds: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self.graph.node_copy(node)

    def add(self, nodes: list[Node]) -> None:
        part = _Part(nodes)
        held = [getattr(self.gm, str(x.target)) for x in part.inputs if x.op == "get_attr"]
        kind = (*part.kind, *((x.shape, x.dtype) for x in held))  # else Dynamo would compile one part again and again
        name = self.kinds.setdefault(kind, f"part_{len(self.kinds)}")
        if not hasattr(self.root, name):
            setattr(self.root, name, self.compiled(GraphModule(nn.Module(), part.graph)))
        results = self.graph.call_module(name, tuple(self.value(x) for x in part.inputs))
        for i, node in enumerate(part.outputs):
            self.values[node] = self.graph.call_function(_item, (results, i))

    def copy(self, nodes: list[Node]) -> None:
        for node in nodes:
            self.graph.node_copy(node, self.value)

    def value(self, node: Node) -> Node:
        """An input, a weight, or what a part made."""
        if node not in self.values:
            assert node.op == "get_attr"
            held = getattr(self.gm, str(node.target)).detach()
            torch._dynamo.mark_static(held)
            setattr(self.root, str(node.target), held)
            self.values[node] = self.graph.get_attr(str(node.target))
        return self.values[node]

    def made(self) -> GraphModule:
        output = next(n for n in self.gm.graph.nodes if n.op == "output")
        self.graph.output(map_arg(output.args[0], self.value))
        return GraphModule(self.root, self.graph)


def _item(values: tuple[Any, ...], i: int) -> Any:
    return values[i]


class _Part:
    """Some nodes as a graph of their own.

    Attributes:
        inputs: what they read that others made; sizes are read anew in each part.
        outputs: what others read of theirs.
        kind: the same for parts that do the same with their inputs.
    """

    def __init__(self, nodes: list[Node]) -> None:
        within = set(nodes)
        self.outputs = [n for n in nodes if not _is_size(n) and any(u not in within for u in n.users)]
        own = _with_sizes(nodes)
        self.inputs = [x for x in dict.fromkeys(x for n in own for x in n.all_input_nodes) if x not in set(own)]
        self.graph = Graph()
        copies = {x: self.graph.placeholder(f"x{i}") for i, x in enumerate(self.inputs)}
        for node in own:
            copies[node] = self.graph.node_copy(node, copies.__getitem__)
        self.graph.output(tuple(copies[n] for n in self.outputs))
        self.kind = tuple(words(self.graph.nodes))


def _is_size(node: Node) -> bool:
    """Is it a number that the sizes of inputs tell? A graph that was read from a file has its name."""
    return isinstance(node.meta.get("val"), (int, torch.SymInt, str))


def _with_sizes(nodes: list[Node]) -> list[Node]:
    """The nodes, and before them those that make the sizes which they read and others hold."""
    found: dict[Node, None] = {}

    def read(node: Node) -> None:
        for x in node.all_input_nodes:
            if x not in found and x.op not in HANDED and _is_size(x):
                read(x)
                found[x] = None

    within = set(nodes)
    for node in nodes:
        read(node)
    return [*(n for n in found if n not in within), *nodes]


def words(nodes: Iterable[Node]) -> Iterator[tuple[Any, ...]]:
    """What each node does with which; no names."""
    numbers: dict[Node, str] = {}
    for node in nodes:
        target = node.target if callable(node.target) else node.op
        yield target, repr(map_arg((node.args, node.kwargs), numbers.__getitem__))
        numbers[node] = f"%{len(numbers)}"
