"""Give positions a row axis: in a cached program each row of the batch stands at positions of its own.

    %p = arange(%s)             [s]             %p = token_positions(%start, %s)     [b s]
    %q = unsqueeze(%p, 0)       [1 s]      =>   %q = unsqueeze(%p, 1)                [b 1 s]
    %e = embedding(%w, %q)      [1 s d]         %e = embedding(%w, %q)               [b 1 s d]
    %x = add(%tokens, %e)       [b s d]         %x = add(%tokens, squeeze(%e, 1))    [b s d]

Every value that is made of positions alone and has no row axis is rebuilt with one in front ("lifted"). Where it meets
a value with rows, that axis is moved to where the rows of the result are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from trilithon.passes import bound_arguments
from trilithon.prove.axes import ROWS, TOKENS, Found, Label, Source, refuse
from trilithon.prove.local_values import BROADCAST, targets
from trilithon.rewrite.row_lifts import LIFTS, rank_of

aten = torch.ops.aten
CREATED = set(targets("new_zeros new_ones new_full new_empty"))  # they read no more than the type of their operand


@dataclass
class RowPositions:
    """Rebuilds positional values at the insertion point of the graph.

    Attributes:
        graph: the program, unlifted.
        labels: of its nodes.
        positions: node of `[b s]`: the position of each token of each row.
        rows: node of the number of rows, or None where that is 1: then nothing needs a row axis.
        lifted: node -> the same value of each row, with the rows in front.
        sources: the nodes that make positions out of the number of tokens.
    """

    graph: Graph
    labels: Mapping[Node, Found]
    positions: Node
    rows: Node | None
    lifted: dict[Node, Node] = field(default_factory=dict)
    sources: set[Node] = field(init=False)

    def __post_init__(self) -> None:
        made = {n for n, found in self.labels.items() if _is_made_of_positions(found)}
        self.sources = {n for n in made if n.op == "call_function" and not any(x in made for x in n.all_input_nodes)}

    def call(self, target: Callable[..., Any], *args: Any, like: Node | None = None, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        if like is not None:
            node.meta = {k: v for k, v in like.meta.items() if k != "val"}
        return node

    def rewrite(self, node: Node) -> None:
        """Make one node depend on `positions`; nodes are given in order of the graph."""
        if node.op == "placeholder":
            return
        found = self.labels.get(node)
        with self.graph.inserting_before(node):
            if node in self.sources and isinstance(found, Label):
                self._put(node, found, self._source(node, found))
            elif _is_positional(found) and self.rows is not None:
                self.lifted[node] = self._lift(node)
            elif any(x in self.lifted for x in node.all_input_nodes):
                self._meet(node, found)

    def take_input(self, node: Node) -> None:
        """The positions input is replaced."""
        label = self.labels[node]
        assert isinstance(label, Label)
        own, dtype = self._here(), node.meta["val"].dtype
        own = own if dtype == torch.int64 else self.call(aten._to_copy.default, own, dtype=dtype)
        self._put(node, label, self._as_wide(own, node))

    def _put(self, node: Node, found: Any, made: Node) -> None:
        if ROWS in found.factors or self.rows is None:
            node.replace_all_uses_with(made)
        else:
            self.lifted[node] = made

    # ------------------------------------------------------------ where positions come from

    def _here(self) -> Node:
        """`[s]` where there is one row only, else `[b s]`."""
        return self.positions if self.rows is not None else self.call(aten.select.int, self.positions, 0, 0)

    def _as_wide(self, own: Node, node: Node) -> Node:
        """`own` for an input of shape `[s]`, `[1 s]` or `[b s]`."""
        label: Any = self.labels[node]
        if len(label.axes) == 1:
            return own
        return own if ROWS in label.factors else self.call(aten.unsqueeze.default, own, 0 if self.rows is None else 1)

    def _source(self, node: Node, label: Label) -> Node:
        """What a node that makes positions out of the number of tokens becomes."""
        args = bound_arguments(node)
        if node.target is aten.cumsum.default:
            return self._counted(node, label, args)
        if node.target is aten.slice.Tensor:
            return self._looked_up(node, label, args)
        if TOKENS not in label.factors or "end" not in args:
            raise refuse(node, "positions of a row cannot take its place")
        start, dtype = args.get("start", 0), node.meta["val"].dtype
        own = self._here()
        own = self.call(aten.add.Tensor, own, start) if start else own
        return own if dtype == torch.int64 else self.call(aten._to_copy.default, own, dtype=dtype)

    def _counted(self, node: Node, label: Label, args: dict[str, Any]) -> Node:
        """cumsum of equal numbers: each token's position + 1, times that number."""
        place, row = label.axis_of(TOKENS), label.axis_of(ROWS)
        assert place is not None
        rank, dtype = len(label.axes), node.meta["val"].dtype
        own = self.call(aten._to_copy.default, self.call(aten.add.Tensor, self._here(), 1), dtype=dtype)
        number = self.call(aten._to_copy.default, args["self"], dtype=dtype)
        lead = self.rows is not None
        if lead and row is None:
            own = self._spread(own, rank + 1, {0: 0, 1: place + 1})
        elif lead and row is not None:
            if row > place:
                own = self.call(aten.transpose.int, own, 0, 1)
            own = self._spread(own, rank, {0: min(row, place), 1: max(row, place)})
        else:
            own = self._spread(own, rank, {0: place})
        return self.call(aten.mul.Tensor, number, own, like=node)

    def _spread(self, x: Node, rank: int, places: dict[int, int]) -> Node:
        """Axes of one element put between those of `x`, so that axis i comes to `places[i]`."""
        taken = set(places.values())
        for axis in range(rank):
            if axis not in taken:
                x = self.call(aten.unsqueeze.default, x, axis)
        return x

    def _looked_up(self, node: Node, label: Label, args: dict[str, Any]) -> Node:
        """`table[.., :s, ..]`: the entry of each position."""
        axis = args["dim"] % len(label.axes)
        own = self.call(aten.add.Tensor, self._here(), args["start"]) if args["start"] else self._here()
        made = self.call(aten.index.Tensor, args["self"], [*[None] * axis, own], like=node)
        if self.rows is None or axis == 0:
            return made
        order = [axis, *range(axis), *range(axis + 1, len(label.axes) + 1)]
        return self.call(aten.permute.default, made, order)

    # ------------------------------------------------------------ values made of positions

    def _lift(self, node: Node) -> Any:
        lift = LIFTS.get(node.target)
        if lift is None:
            raise refuse(node, f"positions of a row cannot be given to {node.target}")
        return lift(self, node)

    def copy(self, node: Node, of: Callable[[Node], Any], target: Any = None) -> Node:
        """The node with its operands replaced."""
        args, kwargs = map_arg((node.args, node.kwargs), of)
        function: Any = target or node.target
        return self.call(function, *args, like=node, **kwargs)

    def own(self, x: Node) -> Any:
        return self.lifted.get(x, x)

    def padded(self, x: Node, rank: int) -> Node:
        """A lifted operand with axes of one element behind the rows, up to `rank` axes; others as they are."""
        if x not in self.lifted or not isinstance(x.meta.get("val"), Tensor):
            return self.lifted.get(x, x)
        made = self.lifted[x]
        for _ in range(rank - 1 - rank_of(x)):
            made = self.call(aten.unsqueeze.default, made, 1)
        return made

    def with_rows(self, x: Node) -> Node:
        """Lifted, or a constant repeated for each row."""
        if x in self.lifted:
            return self.lifted[x]
        wide = self.call(aten.unsqueeze.default, x, 0)
        return self.call(aten.expand.default, wide, [self.rows, *[-1] * rank_of(x)])

    # ------------------------------------------------------------ where they meet rows

    def _meet(self, node: Node, found: Any) -> None:
        if node.target in CREATED or (node.target is aten.type_as.default and node.args[0] not in self.lifted):
            node.args = map_arg(node.args, self.own)
            return
        place = found.axis_of(ROWS) if isinstance(found, Label) else None
        meets = BROADCAST | {aten.expand.default, aten.expand_as.default, aten.repeat.default}
        if node.target not in meets or place is None or found.axes[place] != (ROWS,):
            raise refuse(node, f"positions of a row cannot be given to {node.target}")
        rank = len(found.axes)
        args: Any = map_arg(node.args, lambda x: self._aligned(x, rank, place))
        kwargs: Any = map_arg(node.kwargs, lambda x: self._aligned(x, rank, place))
        if node.target is aten.repeat.default:
            args = (args[0], [1 if i == place else n for i, n in enumerate(args[1])])
        node.args, node.kwargs = args, kwargs

    def _aligned(self, x: Node, rank: int, place: int) -> Node:
        """A lifted operand with its rows at axis `place` of a result of `rank` axes."""
        if x not in self.lifted:
            return x
        made, own = self.lifted[x], place - (rank - rank_of(x))
        if own >= 0:  # an axis of one element stands where the rows belong
            made = self.call(aten.squeeze.dim, made, own + 1)
            return made if own == 0 else self.call(aten.permute.default, made, _forward(rank_of(x), own))
        for _ in range(-own - 1):
            made = self.call(aten.unsqueeze.default, made, 1)
        return made


def _forward(rank: int, place: int) -> list[int]:
    """The order of axes that brings the first to `place`."""
    return [*range(1, place + 1), 0, *range(place + 1, rank)]


def _is_made_of_positions(found: Any) -> bool:
    labels = found if isinstance(found, tuple) else (found,)
    return any(isinstance(x, Label) and x.source is not Source.CONSTANT for x in labels)


def _is_positional(found: Any) -> bool:
    """Made of positions alone, and without rows."""
    labels = found if isinstance(found, tuple) else (found,)
    return all(isinstance(x, Label) and x.source is Source.POSITIONS and ROWS not in x.factors for x in labels)
