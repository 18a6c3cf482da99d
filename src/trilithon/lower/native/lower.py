"""Lower canonical attention to PyTorch kernels; masks and biases that several layers share are made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule

from trilithon.lower.native.attention import attend, attend_cache, attend_scores, first_slots, slots_in_use
from trilithon.lower.native.emit import blocked, emit_bias, emit_cells, emit_mask
from trilithon.lower.native.split_kv import ATTEND_SPLIT, has_bounds
from trilithon.passes import bound_arguments
from trilithon.rewrite.cache_ops import read_cache
from trilithon.rewrite.op import ATTENTION
from trilithon.spec.bias_text import parse_bias
from trilithon.spec.float_term import fits
from trilithon.spec.masks import parse

NO_TENSOR = ("causal", "full")
Made = TypeVar("Made")


def compiled(gm: GraphModule, *, dynamic: bool) -> nn.Module:
    """By Inductor, when it is first called; code that is yet to be written is written before, as Dynamo sees no other."""
    _LazyGraphModule.force_recompile(gm)
    made: nn.Module = torch.compile(gm, dynamic=dynamic, fullgraph=True)  # type: ignore[assignment]
    return made


def is_lowered_site(node: Node) -> bool:
    return node.target in (attend, attend_cache, attend_scores, ATTEND_SPLIT)


def lower_native(gm: GraphModule, *, trim: bool = False, split: bool = False) -> GraphModule:
    """Replace every `trilithon::attention` of the graph, in place, erase what nothing reads, and return it.

    Args:
        trim: attention over a cache reads the slots in use alone. The graph then asks the device how many these are, so it
            is for a CPU, where that costs nothing.
        split: a few queries over a cache run on our kernels for GPUs, which read the slots in use alone.
    """
    _replace(gm, trim, split)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return gm


def replace_attention(gm: GraphModule) -> GraphModule:
    """Replace every `trilithon::attention` of the graph, in place, and return it."""
    _replace(gm, trim=False, split=False)
    gm.graph.lint()
    gm.recompile()
    return gm


def _replace(gm: GraphModule, trim: bool, split: bool) -> None:
    lowering = _Lowering(gm, trim, split)
    for node in list(gm.graph.nodes):
        if node.target is ATTENTION:
            lowering.replace(node)


@dataclass
class _Lowering:
    """One graph; `shared` holds what was made for its sites, by what it was made of."""

    gm: GraphModule
    trim: bool
    split: bool
    shared: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def replace(self, node: Node) -> None:
        with self.gm.graph.inserting_before(node):
            new = self.emit(bound_arguments(node))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        self.gm.graph.erase_node(node)

    def emit(self, args: dict[str, Any]) -> Node:
        """The site at the insertion point; the arguments are those of `trilithon::attention`."""
        q, k, v, mask, scale = (args[name] for name in ("q", "k", "v", "mask", "scale"))
        softcap, sinks = args["softcap"], args["sinks"]
        cached = args["q_start"] is not None or args["k_positions"] is not None
        if not args["bias"] and not cached and not softcap and sinks is None:
            allowed = None if mask in NO_TENSOR else self.mask(args)
            return self.call(attend, q, k, v, mask, scale, allowed)
        if cached and self.split and _can_split(args):
            (k, *k_scales), (v, *v_scales) = _stored(k), _stored(v)
            places = args["q_start"], args["k_positions"]
            return self.call(ATTEND_SPLIT, q, k, v, mask, scale, *places, softcap, *k_scales, *v_scales)
        if cached and self.trim and args["k_positions"] is None:
            used = self.once(
                ("used", args["q_start"], _size(q, 2)), partial(self.call, slots_in_use, args["q_start"], q, _stored(k)[0])
            )
            k, v = self.first(k, used), self.first(v, used)
            args = {**args, "k": k, "v": v}
        allowed, bias = self.mask(args), self.bias(args)
        if cached:
            return self.call(attend_cache, q, k, v, scale, allowed, bias, softcap, sinks)
        dtype = q.meta["val"].dtype
        if softcap or sinks is not None or not _fits(args, dtype):
            return self.call(attend_scores, q, k, v, scale, allowed, bias, softcap, sinks)
        added = self.once(("added", bias, allowed, dtype), partial(self.call, blocked, bias, allowed, dtype))
        return self.call(attend, q, k, v, mask, scale, added)

    def first(self, kept: Node, used: Node) -> Node:
        """The first slots of keys or values; of a cache of 8 bits only these are read."""
        firsts = [self.call(first_slots, x, used) for x in _stored(kept)]
        return firsts[0] if len(firsts) == 1 else self.call(read_cache, *firsts, kept.args[2])

    def mask(self, args: dict[str, Any]) -> Node | None:
        """Which keys a query may see, bool; None = every key."""
        mask, key_mask, empty = parse(args["mask"]), args["key_mask"], args["k_positions"] is not None
        key = ("mask", str(mask), key_mask, *_place(args))
        return self.once(key, partial(emit_mask, self.gm.graph, mask, self.cells(args), key_mask, empty))

    def bias(self, args: dict[str, Any]) -> Node | None:
        """What is added to the scores, in its own type."""
        text, tables = args["bias"], args["tables"] or ()
        if not text:
            return None
        key = ("bias", text, *tables, _size(args["q"], 1), *_place(args))
        return self.once(key, partial(emit_bias, self.gm.graph, parse_bias(text, len(tables)), self.cells(args), tables))

    def cells(self, args: dict[str, Any]) -> dict[str, Any]:
        q, k, q_start, k_positions = (args[name] for name in ("q", "k", "q_start", "k_positions"))
        key = ("cells", _size(q, 1), *_place(args))
        return self.once(key, partial(emit_cells, self.gm.graph, q, k, q_start, k_positions))

    def once(self, key: tuple[Any, ...], make: Callable[[], Made]) -> Made:
        """What `make` gives; made at the first site that asks for `key`, which stands before the others."""
        if key not in self.shared:
            self.shared[key] = make()
        found: Made = self.shared[key]
        return found

    def call(self, function: Callable[..., Any], *args: Any) -> Node:
        return self.gm.graph.call_function(function, args)


def _stored(kept: Node) -> tuple[Node, ...]:
    """The cache of 8 bits and the scales that keys or values are read from; else these themselves."""
    return cast(tuple[Node, Node], kept.args[:2]) if kept.target is read_cache else (kept,)


def _can_split(args: dict[str, Any]) -> bool:
    """May `split_kv` serve a site over a cache?"""
    more = args["bias"] or args["sinks"] is not None or args["key_mask"] is not None
    return not more and args["q_start"] is not None and has_bounds(parse(args["mask"]))


def _place(args: dict[str, Any]) -> tuple[Any, ...]:
    """Where queries and keys stand: sites with the same places may share what depends on them alone.

    Caches whose keys stand in order are of one length; others tell it by the positions of their keys.
    """
    if args["q_start"] is not None or args["k_positions"] is not None:
        return args["q_start"], args["k_positions"]
    return _size(args["q"], 2), _size(args["k"], 2)


def _size(x: Node, axis: int) -> Any:
    """A size's name, or the node itself where it is not recorded."""
    return str(x.meta["val"].shape[axis]) if "val" in x.meta else x


def _fits(args: dict[str, Any], dtype: torch.dtype) -> bool:
    """SDPA adds what has its operands' type: may a bias be given to it?"""
    tables = args["tables"] or ()
    return fits(parse_bias(args["bias"], len(tables)), {str(i): x.meta["val"].dtype for i, x in enumerate(tables)}, dtype)
