"""Turn a causal program without a cache into prefill and decode over a static KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from trilithon.errors import CannotCache
from trilithon.passes import Outcome
from trilithon.prove.locality import refuse, token_axes
from trilithon.rewrite.op import ATTENTION
from trilithon.rewrite.unlift import input_names, unlift
from trilithon.spec.masks import Causal, Chunked, Padding, SlidingWindow, conjunction, parse, parts

aten = torch.ops.aten
TOKEN_INPUTS = {"input_ids": 1, "position_ids": 1}


@dataclass(frozen=True)
class CacheShape:
    """What one attention site keeps for a token: `g` heads of `d` (keys) and `e` (values) numbers."""

    g: int
    d: int
    e: int
    dtype: torch.dtype


def cache_shapes(program: ExportedProgram) -> list[CacheShape]:
    """Show that a cache is sound, and what it must hold.

    Sound means: outside attention every value at token i depends on token i alone, and at each attention the
    proved mask lets query i see no key after it. Then tokens that are already in the cache never change.

    Raises:
        CannotCache: the program's inputs, a node or a site stands in the way.
    """
    names = input_names(program)
    if set(names) != set(TOKEN_INPUTS):
        raise CannotCache(
            "cannot insert a KV cache",
            why=f"the program takes {', '.join(names)}; a cache needs exactly input_ids and position_ids",
            todo="export a causal LM with input_ids and position_ids",
        )
    _refuse_fixed_length(program)
    labels = token_axes(program, TOKEN_INPUTS, ATTENTION)
    outputs = [n for n in program.graph.output_node().args[0] if isinstance(n, Node)]
    if len(outputs) != 1 or labels[outputs[0]] != 1:
        raise refuse(outputs[0], "the program must give one output [b s v], logits that run over tokens")
    sites = [n for n in program.graph.nodes if n.target is ATTENTION]
    unproved = [n for n in program.graph.nodes if "scaled_dot_product" in str(n.target)]
    if unproved or not sites:
        raise refuse((unproved or outputs)[0], "the mask of this attention is not proved causal")
    return [_cache_shape(node) for node in sites]


def _refuse_fixed_length(program: ExportedProgram) -> None:
    """Prefill and decode run the program at other lengths than the example's."""
    for node in program.graph.nodes:
        if node.name in TOKEN_INPUTS and isinstance(node.meta["val"].shape[TOKEN_INPUTS[node.name]], int):
            raise refuse(node, "the number of tokens is fixed: export it with a dynamic token axis")


def _cache_shape(node: Node) -> CacheShape:
    _, k, v, mask = node.args[:4]
    kinds = parts(parse(str(mask)))
    if not any(isinstance(p, (Causal, SlidingWindow)) for p in kinds) or any(isinstance(p, Padding) for p in kinds):
        raise refuse(node, f"its mask is {mask}, not causal: a query would see later tokens")
    if any(isinstance(p, Chunked) for p in kinds):
        raise refuse(node, f"its mask is {mask}: chunks are counted from a row's first token, and padding moves that")
    if any(node.args[8:9]):
        raise refuse(node, "its scores carry a bias by position, and padding moves positions")
    (_, g, _, d), (_, _, _, e) = k.meta["val"].shape, v.meta["val"].shape  # type: ignore[union-attr]
    return CacheShape(int(g), int(d), int(e), k.meta["val"].dtype)  # type: ignore[union-attr]


def insert_cache(program: ExportedProgram, *, decode: bool, padded: bool) -> GraphModule:
    """The program over a cache: `(input_ids, position_ids, start, key_mask, *caches) -> logits [b 1 v]` of the last token.

    Args:
        program: canonical, and accepted by `cache_shapes`.
        decode: True: attend over the cache, any number of tokens at any `start`. False: the prompt, from an empty
            cache; attention reads the fresh keys only.
        padded: rows have left padding; decode always takes it.

    The module's inputs: `input_ids, position_ids [b s]` int64; `start []` int64, tokens in the cache before; `key_mask`
    bool `[b t]`, slots that hold a token of the row; then for each site its key and value cache `[b g t d]`, `[b g t e]`,
    written in place at slots `start .. start + s - 1`.
    """
    gm = unlift(program)
    UseStaticCache(decode=decode, padded=padded)(gm)
    LastTokenOnly()(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


@dataclass(frozen=True)
class UseStaticCache:
    """Write K and V of each site into its cache; in decode, attend over the cache.

    %o = attention(%q, %k, %v, "causal")   =>   %keys = index_copy_(%cache_k, 2, %slots, %k)
                                                %values = index_copy_(%cache_v, 2, %slots, %v)
                                                %o = attention(%q, %keys, %values,
                                                               "causal & padding(slots)", ..., %start, %key_mask)

    It reads what the write returns, not the cache, so that no pass can put the attention before the write.
    """

    decode: bool
    padded: bool
    name: ClassVar[str] = "use-static-cache"

    def __call__(self, gm: GraphModule) -> Outcome:
        graph = gm.graph
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        ids = next(n for n in graph.nodes if n.op == "placeholder" and n.name == "input_ids")
        with graph.inserting_after(last):
            start = graph.placeholder("start")
        with graph.inserting_after(start):
            key_mask = graph.placeholder("key_mask")
        tail = key_mask
        sites = [n for n in graph.nodes if n.target is ATTENTION]
        caches: list[tuple[Node, Node]] = []
        for i in range(len(sites)):
            with graph.inserting_after(tail):
                key = graph.placeholder(f"cache_k_{i}")
            with graph.inserting_after(key):
                tail = graph.placeholder(f"cache_v_{i}")
            caches.append((key, tail))
        with graph.inserting_after(tail):
            tokens = graph.call_function(aten.sym_size.int, (ids, 1))
        with graph.inserting_after(tokens):
            slots = graph.call_function(_slots, (start, tokens))
        for node, (key, value) in zip(sites, caches, strict=True):
            self._use(gm, node, key, value, start, slots, key_mask)
        return Outcome(len(sites))

    def _use(self, gm: GraphModule, node: Node, key: Node, value: Node, start: Node, slots: Node, key_mask: Node) -> None:
        q, k, v, mask, scale = node.args[:5]
        with gm.graph.inserting_before(node):
            keys = gm.graph.call_function(aten.index_copy_.default, (key, 2, slots, k))
            values = gm.graph.call_function(aten.index_copy_.default, (value, 2, slots, v))
        if self.decode:
            text = str(conjunction((parse(str(mask)), Padding("slots", "bool"))))
            node.args = (q, keys, values, text, scale, start, key_mask, *node.args[7:])
        elif self.padded:
            text = str(conjunction((parse(str(mask)), Padding("slots", "bool"))))
            node.args = (q, k, v, text, scale, None, key_mask, *node.args[7:])


def _slots(start: Any, tokens: int) -> Any:
    """The cache slots of the tokens at hand: `start .. start + tokens - 1`."""
    return start + torch.arange(tokens, device=start.device)


@dataclass(frozen=True)
class LastTokenOnly:
    """Compute logits of the last token only: nothing else of them is used.

    %logits = linear(%x, %w)   =>   %last = slice(%x, 1, -1, max)
                                    %logits = linear(%last, %w)
    """

    name: ClassVar[str] = "last-token-only"

    def __call__(self, gm: GraphModule) -> Outcome:
        output = gm.graph.output_node()
        logits: Any = output.args[0]
        head: Any = logits
        while head.target in (aten.alias.default, aten.clone.default, aten._to_copy.default) and len(head.users) == 1:
            head = head.args[0]
        if head.target is aten.linear.default and len(head.users) == 1:
            with gm.graph.inserting_before(head):
                last = gm.graph.call_function(aten.slice.Tensor, (head.args[0], 1, -1, (1 << 63) - 1))
            head.args = (last, *head.args[1:])
        else:
            with gm.graph.inserting_before(output):
                last = gm.graph.call_function(aten.slice.Tensor, (logits, 1, -1, (1 << 63) - 1))
            output.args = (last,)
        return Outcome(1)
