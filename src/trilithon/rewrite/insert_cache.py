"""Turn a causal program without a cache into prefill and decode over a static KV cache."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from trilithon.passes import bound_arguments
from trilithon.prove.axes import ROWS, TOKENS, refuse
from trilithon.rewrite.cache_ops import (
    read_cache,
    real_positions,
    slot_positions,
    token_positions,
    turn,
    turn_back,
    write_cache,
    write_cache_8bit,
)
from trilithon.rewrite.cache_shape import CacheShape
from trilithon.rewrite.give_logits import give_best, give_logits
from trilithon.rewrite.row_positions import RowPositions
from trilithon.rewrite.token_model import TokenModel, mask_window, token_model

aten = torch.ops.aten
Mode = Literal["prompt", "step", "extend"]


def cache_shapes(
    program: ExportedProgram,
    *,
    tokens: str | None = None,
    rings: bool = True,
    stored: torch.dtype | None = None,
    turned: bool = False,
) -> list[CacheShape]:
    """Show that a cache is sound (see `token_model`), and what each site must keep.

    Args:
        program: its proved attention canonical.
        tokens: as given to `token_model`.
        rings: a site whose mask is a window or chunks keeps only what its queries can see.
        stored, turned: as in `CacheShape`; a site with sinks is not turned.

    Raises:
        CannotCache: the program's inputs, a node or a site stands in the way.
    """
    return [_cache_shape(site, rings, stored, turned) for site in token_model(program, tokens).sites]


def _cache_shape(node: Node, rings: bool, stored: torch.dtype | None, turned: bool) -> CacheShape:
    _, k, v = node.args[:3]
    (_, g, _, d), (_, _, _, e) = k.meta["val"].shape, v.meta["val"].shape  # type: ignore[union-attr]
    if not all(isinstance(size, int) for size in (g, d, e)):
        raise refuse(node, "the number or the width of its heads is known only at run time")
    window, has_sinks = mask_window(node), bound_arguments(node)["sinks"] is not None
    dtype: torch.dtype = k.meta["val"].dtype  # type: ignore[union-attr]
    return CacheShape(g, d, e, dtype, window if rings else None, stored, turned and not has_sinks)


def insert_cache(
    program: ExportedProgram,
    mode: Mode,
    *,
    tokens: str | None = None,
    all_logits: bool = False,
    rings: bool = True,
    stored: torch.dtype | None = None,
    turned: bool = False,
) -> GraphModule:
    """The program over a cache: `(tokens, start, counts, context_0, ..., cache_k_0, cache_v_0, ...) -> logits`.

    A step gives `(logits, best)`, where `best [b]` int64 is the token of the highest logit.

    Args:
        program: canonical, and accepted by `cache_shapes`.
        mode: "prompt": from an empty cache (`start` is 0); attention reads the fresh keys. "step": one token a row.
            "extend": any number of tokens at any start.
        tokens: as given to `token_model`.
        all_logits: logits `[b s v]` of every token, else `[b 1 v]` of the last real one of each row.
        rings, stored, turned: as given to `cache_shapes`.

    The module's inputs: the tokens `[b s]`, under the name that the program has for them; `start [b]` int64: tokens in
    the cache of each row before; `counts [b]` int64, 1 to s: how many of the tokens at hand are real, from the left;
    what `split_context` gives, where the program has a context; and for each site its `cache_k_i [b g slots d]` and
    `cache_v_i [b g slots e]`, which are written in place; with `stored` each has its `scale_k_i` or `scale_v_i [b g slots 1]`
    behind it, and values that are turned have `[b g*e slots 1]`. The token at position p of a row is in slot `p % slots`.
    Padding stands behind all real tokens of its row, so that the causal mask hides it, and leaves no trace.

    Raises:
        CannotCache: as `cache_shapes`; or all logits are asked of a program that gives those of the last token.
    """
    model = token_model(program, tokens)
    shapes = [_cache_shape(site, rings, stored, turned) for site in model.sites]
    inputs = _inputs(model, mode, shapes)
    _place_tokens(model, inputs)
    use = _UseCache(model.gm, inputs, mode)
    for site, shape, (key, value) in zip(model.sites, shapes, inputs.caches, strict=True):
        use.rewrite(site, key, value, shape)
    give_logits(model, inputs.counts, all_logits=all_logits, one_token=mode == "step")
    if mode == "step":
        give_best(model)
    model.gm.graph.eliminate_dead_code()
    _drop_positions(model)
    model.gm.graph.lint()
    model.gm.recompile()
    return model.gm


class _Kept(NamedTuple):
    """A cache; of 8 bits it has scales. One that is turned is for `turned` heads."""

    cache: Node
    scales: Node | None
    turned: int = 0


@dataclass(frozen=True)
class _Inputs:
    """The new inputs, and what is made of them at the head of the graph."""

    tokens: Node
    start: Node
    counts: Node
    caches: list[tuple[_Kept, _Kept]]
    size: Node  # how many tokens are at hand
    rows: Node
    end: Node  # start + counts
    positions: Node  # [b s], padding included
    inside: Node  # the same, of padding that of the last real token


def _inputs(model: TokenModel, mode: Mode, shapes: list[CacheShape]) -> _Inputs:
    graph = model.gm.graph
    tokens = next(n for n in graph.nodes if n.op == "placeholder" and n.name == model.inputs.tokens)
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(tokens):
        start = graph.placeholder("start")
    with graph.inserting_after(start):
        counts = graph.placeholder("counts")
    caches = _placeholders(model.gm, counts if last is tokens else last, shapes)
    with graph.inserting_before(_first_operation(model.gm)):
        size = graph.call_function(aten.sym_size.int, (tokens, 1))
        rows = graph.call_function(aten.sym_size.int, (tokens, 0))
        rows.meta["val"], size.meta["val"] = tokens.meta["val"].shape
        end = graph.call_function(aten.add.Tensor, (start, counts))
        positions = graph.call_function(token_positions, (start, size))
        inside = positions
        if mode != "step":
            inside = graph.call_function(real_positions, (positions, start, counts))
    return _Inputs(tokens, start, counts, caches, size, rows, end, positions, inside)


def _placeholders(gm: GraphModule, after: Node, shapes: list[CacheShape]) -> list[tuple[_Kept, _Kept]]:
    """The caches of each site, as inputs behind `after`."""
    pairs: list[tuple[_Kept, _Kept]] = []
    for i, shape in enumerate(shapes):
        made: dict[str, Node] = {}
        for tensor in shape.tensors:
            with gm.graph.inserting_after(after):
                made[tensor.kind] = after = gm.graph.placeholder(f"{tensor.kind}_{i}")
        key, value = (_Kept(made[f"cache_{kind}"], made.get(f"scale_{kind}")) for kind in "kv")
        pairs.append((key, value._replace(turned=shape.g if shape.turned else 0)))
    return pairs


def _first_operation(gm: GraphModule) -> Node:
    first: Node = next(n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr"))
    return first


def _place_tokens(model: TokenModel, inputs: _Inputs) -> None:
    """Every value made of positions is made of each row's own; sizes are those of the tokens at hand."""
    graph = model.gm.graph
    held = [n for n in graph.nodes if n.op == "placeholder" and n.name == model.inputs.positions]
    made = RowPositions(graph, model.labels, inputs.inside, None if model.sizes.rows is None else inputs.rows)
    own = {inputs.size, inputs.rows}
    for node in list(graph.nodes):
        if node.target is aten.sym_size.int and node not in own:
            found = model.sizes.axis(node.meta["val"])
            if found in ((ROWS,), (TOKENS,)):
                node.replace_all_uses_with(inputs.rows if found == (ROWS,) else inputs.size)
    for node in held:
        with graph.inserting_after(inputs.inside):
            made.take_input(node)
    for node in list(graph.nodes):
        if node in model.labels:
            made.rewrite(node)


def _drop_positions(model: TokenModel) -> None:
    for node in model.gm.graph.find_nodes(op="placeholder", target=model.inputs.positions or ""):
        if node.users:
            raise refuse(next(iter(node.users)), f"positions of a row cannot take the place of {node.name}")
        model.gm.graph.erase_node(node)


@dataclass(frozen=True)
class _UseCache:
    """Write K and V of a site into its cache, and attend over what its queries can see.

    %o = attention(%q, %k, %v, "causal")   =>   %keys = write_cache(%cache_k, %k, %start, %counts)
                                                %values = write_cache(%cache_v, %v, %start, %counts)
                                                %o = attention(%q, %keys, %values, "causal", .., %start)

    A cache of 8 bits is written by `write_cache_8bit`, and what it holds is `read_cache` of cache and scales. Into one that
    is turned `turn(%v)` is written, and what it holds is `turn_back` of it.
    It reads what the write returns, not the cache, so that no pass can put the attention before the write. In a prompt
    it reads `%k` and `%v`; over a ring, several tokens read the ring as it was and themselves, and are written after.
    """

    gm: GraphModule
    inputs: _Inputs
    mode: Mode
    held: dict[int, Node] = field(default_factory=dict)  # window -> positions of the keys of its rings

    def rewrite(self, node: Node, key: _Kept, value: _Kept, shape: CacheShape) -> None:
        """One site."""
        k, v = node.args[1:3]
        graph, inputs, window = self.gm.graph, self.inputs, shape.window
        is_late = self.mode == "prompt" or (self.mode == "extend" and window is not None)
        with graph.inserting_before(node):
            keys, values, positions = k, v, None
            if not is_late:
                keys, values = (self._read(self._write(c, x), shape) for c, x in ((key, k), (value, v)))
                positions = None if window is None else self._held(window, key.cache)
            elif self.mode == "extend":
                olds = self._read(key, shape), self._read(value, shape)
                keys, values = (graph.call_function(aten.cat.default, ([c, x], 2)) for c, x in zip(olds, (k, v), strict=True))
                positions = None if window is None else self._held(window, key.cache)
        start = None if self.mode == "prompt" else inputs.start
        rest = node.args[8:] if len(node.args) > 8 or positions is None else ()
        own = (positions,) if positions is not None or rest else ()
        node.args = (node.args[0], keys, values, *node.args[3:5], start, None, *own, *rest)
        if is_late:
            with graph.inserting_before(node.next):
                self._write(key, k)
                self._write(value, v)

    def _write(self, kept: _Kept, x: Any) -> _Kept:
        """What the write returns."""
        graph = self.gm.graph
        rest = (graph.call_function(turn, (x,)) if kept.turned else x, self.inputs.start, self.inputs.counts)
        if kept.scales is None:
            return kept._replace(cache=graph.call_function(write_cache, (kept.cache, *rest)))
        both = graph.call_function(write_cache_8bit, (kept.cache, kept.scales, *rest))
        cache, scales = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
        return _Kept(cache, scales)

    def _read(self, kept: _Kept, shape: CacheShape) -> Node:
        if kept.turned:
            return self.gm.graph.call_function(turn_back, (kept.cache, kept.turned))
        if kept.scales is None:
            return kept.cache
        return self.gm.graph.call_function(read_cache, (kept.cache, kept.scales, shape.dtype))

    def _held(self, window: int, cache: Node) -> Node:
        """Positions of the keys of a ring: after the write of one token, or before that of several and then theirs."""
        if window not in self.held:
            graph, inputs = self.gm.graph, self.inputs
            slots = graph.call_function(aten.sym_size.int, (cache, 2))
            found = graph.call_function(slot_positions, (inputs.end if self.mode == "step" else inputs.start, slots))
            if self.mode == "extend":
                found = graph.call_function(aten.cat.default, ([found, inputs.positions], 1))
            self.held[window] = found
        return self.held[window]
