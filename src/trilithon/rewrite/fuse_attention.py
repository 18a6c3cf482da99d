"""Every proved site becomes `trilithon::attention`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from trilithon.capture.sites import Site
from trilithon.lift.meaning import Meaning
from trilithon.passes import Outcome
from trilithon.rewrite.op import ATTENTION
from trilithon.spec.masks import Causal, Chunked, Formula, LocalWindow, Mask, Padding, SlidingWindow, parts

aten = torch.ops.aten
SITE = "trilithon_site"  # in `meta` of a canonical node: the name of the site that it was


@dataclass(frozen=True)
class Proved:
    """A site with the mask that was proved for it, and the factor on its scores."""

    site: Site
    mask: Mask
    scale: float


def why_not_canonical(mask: Mask, meaning: Meaning) -> str | None:
    """Why the canonical op cannot carry `mask` at a site of this meaning, or None."""
    beside = [f"{type(meaning.bias).__name__} bias"] if meaning.bias else []
    beside += [f"softcap {meaning.softcap:g}"] if meaning.softcap else []
    beside += ["sinks"] if meaning.sinks else []
    if beside:
        return f"the canonical op takes no {', no '.join(beside)}"
    if meaning.flat:
        return "batch and heads share one axis of its operands"
    if sum(isinstance(part, Padding) for part in parts(mask)) > 1:
        return "the canonical op takes one key mask, and this mask has two paddings"
    for part in parts(mask):
        if isinstance(part, Padding) and meaning.tables.get(part.table) != (meaning.dims[0], meaning.dims[3]):
            return f"{part.table} is not of shape [b t], one entry a key"
        if isinstance(part, (Causal, SlidingWindow, Chunked)) and part.align != "upper_left":
            return f"{part} aligns by lengths; the canonical op aligns by positions"
        if isinstance(part, Chunked) and part.position is not None:
            return f"{part} cuts chunks by an input"
        if not isinstance(part, (Causal, SlidingWindow, LocalWindow, Chunked, Padding)):
            return f"no kernel takes {'a formula' if isinstance(part, Formula) else part}"
    return None


@dataclass(frozen=True)
class FuseAttention:
    """Replace proved attention calls.

        %mask = ...                                            %o = trilithon.attention(%q, %k, %v, "causal", 0.125)
        %o = scaled_dot_product_attention(%q, %k, %v, %mask)  =>

    `nodes` maps the nodes that the sites name to those of the graph at hand.
    """

    sites: tuple[Proved, ...]
    nodes: Mapping[Node, Node]
    name: ClassVar[str] = "fuse-attention"

    def __call__(self, gm: GraphModule) -> Outcome:
        key_masks: dict[str, Node] = {}
        for proved in self.sites:
            self._replace(gm, proved, key_masks)
        return Outcome(len(self.sites))

    def _replace(self, gm: GraphModule, proved: Proved, key_masks: dict[str, Node]) -> None:
        site, old = proved.site, self.nodes[proved.site.output]
        q, k, v = (self.nodes[n] for n in (site.q, site.k, site.v))
        padding = next((p for p in parts(proved.mask) if isinstance(p, Padding)), None)
        key_mask = _key_mask(gm, padding, key_masks) if padding is not None else None
        with gm.graph.inserting_before(old):
            if site.kind == "decomposed":
                plain = gm.graph.call_function(aten.transpose.int, (k, 2, 3))
                plain.meta = {**k.meta, "val": k.meta["val"].transpose(2, 3)}
                k = plain
            args = (q, k, v, str(proved.mask), proved.scale, None, key_mask)
            node = gm.graph.call_function(ATTENTION, args)
        node.meta = {**old.meta, SITE: site.name}
        old.replace_all_uses_with(node)


def _key_mask(gm: GraphModule, padding: Padding, made: dict[str, Node]) -> Node:
    """A bool `[b t]` tensor of the padding's table, made once at the head of the graph."""
    if padding.table not in made:
        table = next(n for n in gm.graph.nodes if n.op == "placeholder" and n.name == padding.table)
        if padding.sort == "bool":
            made[padding.table] = table
        else:
            last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
            with gm.graph.inserting_after(last):
                node = gm.graph.call_function(aten.ne.Scalar, (table, 0))
            node.meta["val"] = table.meta["val"] != 0
            made[padding.table] = node
    return made[padding.table]
