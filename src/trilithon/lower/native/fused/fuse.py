"""Make the decode step of one row of a few generated kernels a layer.

Each kernel is one region of the graph: the products that read one vector, with all that makes the vector before them and
all that is done to single elements behind them; or one attention, with what makes its query, key and value, and their writes
into the cache. Nothing is matched by name: a region is cut where a value needs more than its own row of numbers, or where
ranks that share the model meet: collectives stand between kernels as they are.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from trilithon.capture.collectives import ALL_GATHER, ALL_REDUCE, WAIT
from trilithon.lower.inputs import Input
from trilithon.lower.native.fused.launch import AFTER_RANKS, Attention, Largest, Products, Values
from trilithon.lower.native.fused.one_token import at_one_token
from trilithon.lower.native.fused.operations import CASTS, KNOWN, SINGLE, SPLITS, VIEWS, extent, numel, refuse
from trilithon.lower.native.fused.text import Segment, Site, text_of_attention, text_of_products, text_of_values
from trilithon.lower.native.split_kv import ATTEND_SPLIT, MOST_QUERIES, MOST_WIDTH, reach
from trilithon.passes import bound_arguments
from trilithon.rewrite.cache_ops import slot_positions, write_cache
from trilithon.spec.masks import parse

aten = torch.ops.aten
LINEAR, ARGMAX = aten.linear.default, aten.argmax.default
COPIES = {aten.clone.default, aten.contiguous.default}
SPARED = {*VIEWS, *CASTS}  # a region does not end with these
MOST_VECTOR = 16384  # numbers of a vector that each program holds


def fuse_step(gm: GraphModule, inputs: tuple[Input, ...]) -> GraphModule:
    """The step for one row, of generated kernels: `gm` takes the same, and stays as it is.

    Args:
        gm: made by `insert_cache` in mode "step", and lowered with `split`.
        inputs: what it takes.

    Raises:
        CannotFuse: a value is none that the kernels can make.
    """
    return Fuser(at_one_token(gm, inputs)).run()


@dataclass
class Fuser:
    """Builds the new graph; `made` are the values that stand in memory, `done` the products that a kernel has."""

    gm: GraphModule
    graph: Graph = field(default_factory=Graph)
    made: dict[Node, Node] = field(default_factory=dict)
    done: set[Node] = field(default_factory=set)
    met: bool = False  # ranks have, since the last kernel
    modules: dict[str, Any] = field(default_factory=dict)
    late: set[Node] = field(default_factory=set)  # what depends on a product or an attention
    known: ClassVar[set[Any]] = {*KNOWN, *SPLITS, LINEAR, ATTEND_SPLIT, write_cache, slot_positions}
    large: ClassVar[set[Any]] = {LINEAR, ATTEND_SPLIT}  # what regions end at

    def run(self) -> GraphModule:
        self.late = self._late()
        for node in self.gm.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.made[node] = self.graph.node_copy(node)
                if node.op == "get_attr":
                    self.modules[node.target] = getattr(self.gm, node.target)
            elif node.op == "output":
                self.graph.output(torch.fx.node.map_arg(node.args[0], self.stored))
            elif node.target in self.large and node not in self.done:
                self._before()
                self.visit(node)
            else:
                self.visit(node)
        made = GraphModule(self.modules, self.graph)
        made.graph.eliminate_dead_code()
        made.recompile()
        return made

    def visit(self, node: Node) -> None:
        """An operation, of which some are made when they are reached, and others when they are read."""
        if node.target is LINEAR and node not in self.done:
            self.products(node)
        elif node.target is ATTEND_SPLIT:
            self.attend(node)
        elif node.target is ARGMAX:
            self.largest(node)
        elif str(node.target) in (ALL_REDUCE, ALL_GATHER, WAIT):
            self.meet(node)
        elif node.target not in self.known:
            raise refuse(node, f"{getattr(node.target, '__name__', node.target)} has no kernel")

    def _late(self) -> set[Node]:
        """What depends on a product or an attention."""
        late: set[Node] = set()
        for node in self.gm.graph.nodes:
            if node.target in self.large or any(n in late for n in node.all_input_nodes):
                late.add(node)
        return late

    def _before(self) -> None:
        """Once: make what depends on no product, and is read by what does, in one kernel."""
        ends = []
        for node in self.gm.graph.nodes:
            if node.op != "call_function" or node in self.late or node.target not in KNOWN or not set(node.users) & self.late:
                continue
            while node.target in VIEWS:
                node = node.args[0]
            if node not in self.made and node not in ends:
                ends.append(node)
        if ends:
            self.values(ends)

    def stored(self, node: Node) -> Node:
        """The value in the new graph."""
        if node not in self.made:
            target: Any = node.target
            if target in VIEWS or self._is_piece(node):
                args = torch.fx.node.map_arg(node.args, self.stored)
                self.made[node] = self.graph.call_function(target, args, node.kwargs)
            else:
                self.values([node])
        return self.made[node]

    def _is_piece(self, node: Node) -> bool:
        """Is it cut from what stands in memory, one number behind the other?"""
        return node.target is aten.slice.Tensor and node.args[0] in self.made and node.meta["val"].is_contiguous()

    def meet(self, node: Node) -> None:
        """A collective, of what stands in memory; a sum takes the place of what a kernel made for it alone."""
        given: Any = node.args[0]
        target: Any = node.target
        x = given
        while x.target in COPIES and x.args[0].meta["val"].is_contiguous():
            x = x.args[0]
        held = self.stored(x)
        if str(target) == ALL_REDUCE and x is given and len(x.users) == 1 and held.target is operator.getitem:
            target = torch.ops._c10d_functional.all_reduce_.default
        self.made[node] = self.graph.call_function(target, (held, *node.args[1:]))
        self.made[node].meta["val"] = node.meta["val"]
        self.met = True

    def values(self, nodes: list[Node]) -> None:
        text = text_of_values(nodes, self.made.__contains__)
        self._call(Values(text), text.reads, text.makes)

    def products(self, first: Node) -> None:
        """All products of one vector."""
        x: Any = first.args[0]
        group = [n for n in x.users if n.target is LINEAR and n.args[0] is x]
        self.done.update(group)
        for node in group:
            self._check_product(node)
        segments = tuple(self._segments(group))
        text = text_of_products(x, segments, self.made.__contains__)
        self._call(Products(text, segments, extent(x)[1]), text.reads, text.makes)

    def _check_product(self, node: Node) -> None:
        x, weight = node.args[:2]
        if not isinstance(x, Node) or not isinstance(weight, Node) or weight.op != "get_attr" or extent(x)[0] != 1:
            raise refuse(node, "it is no product of one vector with a matrix of the model")
        if extent(x)[1] > MOST_VECTOR or not weight.meta["val"].is_contiguous() or weight.meta["val"].dtype == torch.float64:
            raise refuse(node, f"a matrix of {list(weight.meta['val'].shape)} is not in rows that a program can hold")

    def _segments(self, group: list[Node]) -> list[Segment]:
        """Each product with what is done to its elements; two that meet are one segment."""
        found = {node: Segment((node,), node) for node in group}
        for node in group:
            segment = found[node]
            while (more := self._longer(segment, list(found.values()))) is not None:
                segment = more
                found |= dict.fromkeys(segment.linears, segment)
        return [_shorter(s) for s in dict.fromkeys(found.values())]

    def _longer(self, segment: Segment, others: list[Segment]) -> Segment | None:
        """The segment with the one operation that reads its end, if that is one of single elements."""
        if len(segment.end.users) != 1:
            return None
        user = next(iter(segment.end.users))
        if user.target not in SINGLE or numel(user) != numel(segment.end):
            return None
        linears = segment.linears
        for operand in user.all_input_nodes:
            if operand is segment.end:
                continue
            met = next((s for s in others if s.end is operand and len(operand.users) == 1), None)
            if met is not None:
                linears = (*linears, *met.linears)
            elif not self._at_hand(operand):
                return None
        return Segment(linears, user)

    def _at_hand(self, node: Node) -> bool:
        """May each element be made, of what is stored?"""
        if node in self.made:
            return True
        return (node.target in SINGLE or node.target is aten.expand.default) and all(
            self._at_hand(n) for n in node.all_input_nodes
        )

    def largest(self, node: Node) -> None:
        x: Any = node.args[0]
        if node.args[1:] != (-1,) or node.kwargs or extent(x)[0] != 1:
            raise refuse(node, "it looks for the largest of other numbers than those of one row")
        self.stored(x)
        self._call(Largest(), (x,), (node,))

    def attend(self, node: Node) -> None:
        args = bound_arguments(node)
        site = self._site(node, args)
        self.stored(site.start)
        text = text_of_attention(site, node, self.made.__contains__)
        self._call(Attention(text, site), (site.k_cache, site.v_cache, site.start, *text.reads), (node,))

    def _site(self, node: Node, args: dict[str, Any]) -> Site:
        k, v, places = args["k"], args["v"], args["k_positions"]
        if args["k_scales"] is not None or any(x.target is not write_cache for x in (k, v)):
            raise refuse(node, "its cache is not one of the model's own type")
        if places is not None and places.target is not slot_positions:
            raise refuse(node, "its keys stand in another order than that of a ring")
        window, chunk = reach(parse(args["mask"]))
        site = Site(
            args["q"], k.args[1], v.args[1], k.args[0], v.args[0], args["q_start"], window, chunk, places is not None,
            args["scale"], args["softcap"],
        )  # fmt: skip
        if site.sizes[1] > MOST_QUERIES or max(site.sizes[2:]) > MOST_WIDTH:
            raise refuse(node, "its heads are too many or too wide for a program")
        return site

    def _call(self, module: torch.nn.Module, reads: tuple[Node, ...], makes: tuple[Node, ...]) -> None:
        self._add(module, tuple(self.made[n] for n in reads), makes)

    def _add(self, module: torch.nn.Module, reads: tuple[Node, ...], makes: tuple[Node, ...]) -> None:
        """A call of a kernel with values of the new graph."""
        name = f"kernel_{sum(key.startswith('kernel_') for key in self.modules)}"
        self.modules[name] = module
        setattr(module, AFTER_RANKS, self.met)
        self.met = False
        call = self.graph.call_module(name, reads)
        if isinstance(module, Largest):
            self.made[makes[0]] = call
            return
        for i, node in enumerate(makes):
            self.made[node] = self.graph.call_function(operator.getitem, (call, i))


def _shorter(segment: Segment) -> Segment:
    """Without a view or a conversion at its end: the next region makes it as well."""
    end: Any = segment.end
    while end not in segment.linears and end.target in SPARED:
        end = end.args[0]
    return Segment(segment.linears, end)
