"""Make a prompt of one row of PyTorch's products and attention, and of generated kernels for all between them.

The program for one token says what is done to each; the same program for many says which axis runs over tokens, and that
nothing else depends on how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from trilithon.lower.inputs import Input
from trilithon.lower.native.attention import attend
from trilithon.lower.native.causal import attend_causal, has_kernel
from trilithon.lower.native.fused.by_token import (
    ByToken,
    Emits,
    Piece,
    parts_of_rows,
    text_of_tokens,
    token_major,
)
from trilithon.lower.native.fused.fuse import LINEAR, Fuser
from trilithon.lower.native.fused.one_token import at_one_token
from trilithon.lower.native.fused.operations import COLUMNS, KNOWN, SPLITS, VIEWS, refuse
from trilithon.lower.native.gated import GATED, gated_product
from trilithon.lower.native.writes import write_tokens
from trilithon.rewrite.cache_ops import last_tokens, real_positions
from trilithon.rewrite.unlift import device_of
from trilithon.spec.masks import parse

aten = torch.ops.aten
MANY = 1021  # tokens: a number that no size of a model is likely to be, and no multiple of one
ORDERED = VIEWS - {aten.transpose.int, aten.permute.default}  # numbers keep their order, whatever axes there are
MORE = {real_positions, last_tokens, write_tokens, attend, GATED}


def fuse_prompt(gm: GraphModule, inputs: tuple[Input, ...]) -> GraphModule:
    """The prompt for one row: `gm` takes the same, and stays as it is.

    Args:
        gm: made by `insert_cache` in mode "prompt", lowered, with `separate_writes`.
        inputs: what it takes.

    Raises:
        CannotFuse: it holds what neither generated kernels nor PyTorch's are for.
    """
    one = _without_masks(at_one_token(gm, inputs, tokens=1))
    many = {n.name: n.meta.get("val") for n in at_one_token(gm, inputs, tokens=MANY).graph.nodes}
    return _PromptFuser(one, many=many).run()


def _without_masks(gm: GraphModule) -> GraphModule:
    """A prompt whose sites make no tensor of a mask that a kernel knows by its name, in place."""
    device = device_of(gm)
    for node in gm.graph.find_nodes(op="call_function", target=attend):
        q, _, _, mask, _, allowed = node.args
        if allowed is None or allowed.meta["val"].dtype != torch.bool:  # with a bias it is no mask
            continue
        if has_kernel(parse(mask), q.meta["val"].shape[3], device, q.meta["val"].dtype):
            node.args = (*node.args[:5], None)
    gm.graph.eliminate_dead_code()
    return gm


@dataclass
class _PromptFuser(Fuser):
    """Values of all tokens are made by kernels of `by_token`; those of the last token alone as those of a step.

    Attributes:
        many: of each node by name, its value for `MANY` tokens.
        axes: of what each token has, the axis of tokens.
        moving: what depends on tokens or their positions.
        tail: what depends on the last token alone.
        written: the write of each key and value.
    """

    many: dict[str, Any] = field(default_factory=dict)
    axes: dict[Node, int] = field(default_factory=dict)
    moving: set[Node] = field(default_factory=set)
    tail: set[Node] = field(default_factory=set)
    written: dict[Node, Node] = field(default_factory=dict)
    known: ClassVar[set[Any]] = {*KNOWN, *SPLITS, LINEAR, *MORE}
    large: ClassVar[set[Any]] = {LINEAR, GATED, attend}

    def __post_init__(self) -> None:
        self.tokens, self.start, self.counts = [n for n in self.gm.graph.nodes if n.op == "placeholder"][:3]
        self.emits = Emits(self.made.__contains__, self._is_fixed, self._check, self.start, self.counts)
        for node in self.gm.graph.nodes:
            axis = self._axis(node)
            if axis is not None:
                self.axes[node] = axis
            if axis is not None or any(x in self.moving for x in node.all_input_nodes):
                self.moving.add(node)
            if node.target is last_tokens or any(x in self.tail for x in node.all_input_nodes):
                self.tail.add(node)
            if node.target is write_tokens:
                self._note_write(node)

    def _note_write(self, node: Node) -> None:
        _, x, *places = node.args
        if x in self.written or places != [self.start, self.counts]:
            raise refuse(node, "it is not the one write of a value, from where the prompt starts")
        self.written[x] = node  # type: ignore[index]

    def _axis(self, node: Node) -> int | None:
        """The one axis that is as long as there are tokens."""
        own, many = node.meta.get("val"), self.many.get(node.name)
        if not isinstance(own, Tensor) or not isinstance(many, Tensor) or own.dim() != many.dim():
            return None
        longer = [i for i, (a, b) in enumerate(zip(own.shape, many.shape, strict=True)) if a != b]
        return longer[0] if len(longer) == 1 and (own.shape[longer[0]], many.shape[longer[0]]) == (1, MANY) else None

    def _is_fixed(self, node: Node) -> bool:
        """Is it the same for all tokens?"""
        return node not in self.moving

    def _check(self, node: Node) -> None:
        """Is it of each token alone, and would its numbers lie in this order token by token?"""
        if node not in self.moving:
            return
        if node in self.tail or (node not in self.axes and isinstance(node.meta.get("val"), Tensor)):
            raise refuse(node, "it is not made token by token")
        source = node.args[0] if node.args else None
        if node.target in ORDERED and isinstance(source, Node) and node in self.axes:
            (a, own), (b, other) = ((self.axes.get(x), x.meta["val"].shape) for x in (node, source))
            if b is None or math.prod(own[:a]) != math.prod(other[:b]):
                raise refuse(node, "it mixes tokens with other axes")

    def visit(self, node: Node) -> None:
        if node.target is last_tokens:
            self.made[node] = self.graph.call_function(last_tokens, (self.stored(node.args[0]), self.made[self.counts]))  # type: ignore[arg-type]
        elif node.target is attend:
            self.attend(node)
        elif node.target is GATED and node not in self.done:
            self.products(node)
        elif node.target is write_tokens:
            if node.args[1] in self.written:
                raise refuse(node, "no attention reads what it writes")
        elif node.target is not real_positions:
            super().visit(node)

    def stored(self, node: Node) -> Node:
        if node in self.tail:
            return super().stored(node)
        if node not in self.made:
            self.made[node] = self._viewed(node) or self._of_kernel(node)
        return self.made[node]

    def _viewed(self, node: Node) -> Node | None:
        """What another value in memory holds in the same order."""
        source: Any = node
        while source not in self.made:
            if source.target not in VIEWS:
                return None
            self._check(source)
            source = source.args[0]
        if source not in self.axes or node not in self.axes:
            return None
        shape = [-1 if i == self.axes[node] else n for i, n in enumerate(node.meta["val"].shape)]
        if math.prod(shape[: self.axes[node]]) != 1:
            return None
        return self.graph.call_function(token_major, (self.made[source], self.axes[source], shape))

    def _of_kernel(self, node: Node) -> Node:
        """A kernel makes it, and with it what is read elsewhere too."""
        self._call_tokens([Piece(node)], with_others=True)
        return self.made[node]

    def meet(self, node: Node) -> None:
        raise refuse(node, "ranks that share the model meet in it")

    def values(self, nodes: list[Node]) -> None:
        if any(n in self.tail for n in nodes):
            super().values(nodes)
            return
        pieces = [Piece(n) for n in nodes if n in self.moving]  # what is the same for all tokens is made where it is read
        if pieces:
            self._call_tokens(pieces)

    def _late(self) -> set[Node]:
        """The last token's values are made behind its choice."""
        return super()._late() | self.tail

    def _call_tokens(self, pieces: Sequence[Piece], *, with_others: bool = False) -> None:
        for piece in pieces:
            if piece.node not in self.axes:
                raise refuse(piece.node, "it is no value of each token")
        text = text_of_tokens(pieces, self.emits, with_others=with_others)
        reads = tuple(self._by_token(x) for x in text.reads)
        caches = tuple(self.made[p.cache] for p in pieces if p.cache is not None)
        self._add(ByToken(text, pieces, self.axes.__getitem__), (self.made[self.tokens], *reads, *caches), text.makes)

    def _by_token(self, leaf: Node) -> Node:
        """A value in memory, token by token."""
        if self._is_fixed(leaf):
            return self.made[leaf]
        axis, shape = self.axes[leaf], leaf.meta["val"].shape
        if math.prod(shape[:axis]) == 1:
            return self.made[leaf]
        return self.graph.call_function(
            token_major, (self.made[leaf], axis, [-1, *(n for i, n in enumerate(shape) if i != axis)])
        )

    def products(self, first: Node) -> None:
        """All of one vector of each token, by PyTorch's own kernels."""
        if first in self.tail:
            self._check_tail(first)
            super().products(first)
            return
        x: Any = first.args[0]
        group = [n for n in x.users if n.target in (LINEAR, GATED) and n.args[0] is x and n not in self.tail]
        self.done.update(group)
        held = self.stored(x)
        for node in group:
            if any(a.op != "get_attr" for a in node.all_input_nodes if a is not x):
                raise refuse(node, "it is no product with a matrix of the model")
            given = [self.made[a] if isinstance(a, Node) else a for a in node.args[1:]]
            target = (
                gated_product if node.target is GATED else node.target
            )  # an operation would import Dynamo, which takes seconds
            self.made[node] = self.graph.call_function(target, (held, *given))

    def _check_tail(self, node: Node) -> None:
        """Kernels of a step would read all tokens' values as if they were one's."""
        seen, todo = set[Node](), [node]
        while todo:
            x = todo.pop()
            if x in seen or x.op == "get_attr" or (x in self.made and x in self.tail):
                continue
            seen.add(x)
            if x not in self.tail and (x in self.moving or x.op == "placeholder"):
                raise refuse(x, "what is done to the last token reads it")
            todo += x.all_input_nodes

    def attend(self, node: Node) -> None:
        q, k, v, mask, scale, allowed = node.args
        if allowed is not None:
            raise refuse(node, "its mask is a tensor")
        parts = {x: part for x in (q, k, v) if (part := self._part_of_product(x)) is not None}  # type: ignore[arg-type]
        pieces = [Piece(x, x not in parts, self._cache_of(x)) for x in (q, k, v)]  # type: ignore[arg-type]
        self._call_tokens([p for p in pieces if p.is_kept or p.cache is not None])
        self.made |= parts  # type: ignore[arg-type]
        given = [self.made[x] for x in (q, k, v)]  # type: ignore[index]
        call = (attend, (*given, mask, scale, None)) if mask == "full" else (attend_causal, (*given, mask, scale))
        self.made[node] = self.graph.call_function(*call)

    def _cache_of(self, x: Node) -> Node | None:
        """What a key or value is written to, by the kernel that makes it."""
        write = self.written.pop(x, None)
        return None if write is None else write.args[0]  # type: ignore[return-value]

    def _part_of_product(self, x: Node) -> Node | None:
        """The view of a product in memory that this is, if it is one."""
        chain, source = list[Any](), x
        while source not in self.made:
            if source.target not in VIEWS | COLUMNS | SPLITS:
                return None
            self._check(source)
            chain, source = [source, *chain], source.args[0]  # type: ignore[assignment]
        if source.target is not LINEAR or not chain:
            return None
        root = value = torch.empty(source.meta["val"].shape)
        for each in chain:
            value = each.target(value, *each.args[1:], **each.kwargs)
        if value.untyped_storage().data_ptr() != root.untyped_storage().data_ptr():
            return None
        view = list(value.shape), self.axes[x], list(value.stride()), value.storage_offset()
        return self.graph.call_function(parts_of_rows, (self.made[source], *view))
