"""Every proved site becomes `trilithon::attention`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from trilithon.capture.sites import RESHAPE, Site
from trilithon.lift.meaning import UNKNOWN, Meaning
from trilithon.passes import Outcome
from trilithon.prove.program import Examined
from trilithon.rewrite.op import ATTENTION
from trilithon.spec.bias_text import VARIABLES, write_bias
from trilithon.spec.masks import Causal, Chunked, Formula, LocalWindow, Mask, Padding, SlidingWindow, parts
from trilithon.spec.position_bias import NOTHING
from trilithon.spec.term import Term
from trilithon.spec.traverse import free_vars, tables

aten = torch.ops.aten
SITE = "trilithon_site"  # in `meta` of a canonical node: the name of the site that it was


@dataclass(frozen=True)
class Proved:
    """A site with the mask that was proved for it, and the rest of what its scores mean."""

    site: Site
    mask: Mask
    meaning: Meaning


def canonical_sites(examined: Iterable[Examined]) -> tuple[Proved, ...]:
    """The sites that the canonical op can carry."""
    return tuple(
        Proved(e.site, e.proof.mask, e.meaning)
        for e in examined
        if e.is_proved and e.proof is not None and e.meaning is not None
        if why_not_canonical(e) is None
    )


def why_not_canonical(examined: Examined) -> str | None:
    """Why the canonical op cannot carry a site that was proved, or None."""
    assert examined.proof is not None and examined.meaning is not None
    return _why_not_scores(examined, examined.meaning) or _why_not_mask(examined.proof.mask, examined.meaning)


def _why_not_scores(examined: Examined, meaning: Meaning) -> str | None:
    if meaning.flat and examined.site.flat_heads == 1:
        return "how many heads share one axis with the batch is not known"
    if meaning.scale is None:
        return "its scale is not a number of the program: it changes with an input, or with the width of one"
    if meaning.softcap is not None and meaning.softcap <= 0.0:
        return f"its softcap is {meaning.softcap:g}"
    if meaning.sinks and meaning.tables.get(meaning.sinks_table) != (meaning.dims[1],):
        return "its sinks are not a tensor of the program with one number a head"
    if meaning.bias is not None and meaning.position_bias is None:
        return _why_no_position_bias(meaning, meaning.bias.formula)
    validated = examined.validated
    changed = meaning.bias is not None or meaning.softcap is not None or meaning.sinks
    if changed and (validated is None or not validated.cells):
        why = "" if validated is None else f": {validated.skipped}"
        return f"its scores were not compared with the program's own{why}"
    return None


def _why_no_position_bias(meaning: Meaning, formula: Term) -> str:
    read = sorted(tables(formula) - meaning.own)
    computed = [name.removeprefix(UNKNOWN) for name in read if name.startswith(UNKNOWN)]
    if computed:
        return f"its bias is computed from activations, by {', '.join(computed)}"
    if read:
        return f"its bias reads the input {', '.join(read)}"
    others = sorted(free_vars(formula) - VARIABLES)
    return f"its bias depends on {', '.join(others) or 'a running sum'}, and not by one number a row"


def _why_not_mask(mask: Mask, meaning: Meaning) -> str | None:
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

    A bias by position, a softcap and sinks become arguments; the bias reads the program's own tensors.
    `nodes` maps the nodes that the sites name to those of the graph at hand.
    """

    sites: tuple[Proved, ...]
    nodes: Mapping[Node, Node]
    name: ClassVar[str] = "fuse-attention"

    def __call__(self, gm: GraphModule) -> Outcome:
        key_masks: dict[str, Node] = {}
        own = {node.name: node for node in gm.graph.nodes if node.op == "placeholder"}
        for proved in self.sites:
            self._replace(gm, proved, key_masks, own)
        return Outcome(len(self.sites))

    def _replace(self, gm: GraphModule, proved: Proved, key_masks: dict[str, Node], own: dict[str, Node]) -> None:
        site, old = proved.site, self.nodes[proved.site.output]
        padding = next((p for p in parts(proved.mask) if isinstance(p, Padding)), None)
        key_mask = _key_mask(gm, padding, key_masks) if padding is not None else None
        with gm.graph.inserting_before(old):
            q, k, v = self._operands(gm.graph, site)
            args = (q, k, v, str(proved.mask), proved.meaning.scale, None, key_mask, *_scores(proved.meaning, own))
            node = gm.graph.call_function(ATTENTION, args)
            node.meta = {**old.meta, SITE: site.name}
            if site.flat_heads is not None:
                node.meta["val"] = old.meta["val"].reshape(*q.meta["val"].shape[:3], v.meta["val"].shape[3])
                _use_apart(old, node)
            new = node if site.flat_heads is None else _together(gm.graph, node, old)
        old.replace_all_uses_with(new)

    def _operands(self, graph: Graph, site: Site) -> tuple[Node, Node, Node]:
        """q `[b h s d]`, k `[b g t d]`, v `[b g t e]`, as the site has them or with batch and heads apart."""
        q, k, v = (self.nodes[n] for n in (site.q, site.k, site.v))
        if site.kind == "decomposed":
            plain = graph.call_function(aten.transpose.int, (k, -2, -1))
            plain.meta = {**k.meta, "val": k.meta["val"].transpose(-2, -1)}
            k = plain
        if site.flat_heads is None:
            return q, k, v
        return _apart(graph, q, site.flat_heads), _apart(graph, k, site.flat_heads), _apart(graph, v, site.flat_heads)


def _apart(graph: Graph, x: Node, heads: int) -> Node:
    """`[b * h, s, d]` as `[b h s d]`."""
    value = x.meta["val"]
    flat, tokens, width = value.shape
    node = graph.call_function(aten.reshape.default, (x, [-1, heads, *_sizes(graph, x, (1, 2))]))
    node.meta = {**x.meta, "val": value.reshape(flat // heads, heads, tokens, width)}
    return node


def _use_apart(flat: Node, x: Node) -> None:
    """Whoever puts `flat`, `[b * h, s, e]`, into the shape `[b h s e]` takes `x`, which has it."""
    shape = list(map(str, x.meta["val"].shape))
    for user in list(flat.users):
        if user.target in RESHAPE and list(map(str, user.meta["val"].shape)) == shape:
            user.replace_all_uses_with(x)


def _together(graph: Graph, x: Node, like: Node) -> Node:
    """`[b h s e]` as `[b * h, s, e]`, what `like` is."""
    node = graph.call_function(aten.reshape.default, (x, [-1, *_sizes(graph, x, (2, 3))]))
    node.meta = dict(like.meta)
    return node


def _sizes(graph: Graph, x: Node, axes: tuple[int, ...]) -> list[int | Node]:
    """Sizes of a tensor: numbers where they are known, else nodes."""
    found: list[int | Node] = []
    for axis in axes:
        size = x.meta["val"].shape[axis]
        if not isinstance(size, int):
            node = graph.call_function(aten.sym_size.int, (x, axis))
            node.meta = {"val": size}
            found.append(node)
        else:
            found.append(size)
    return found


def _scores(meaning: Meaning, own: Mapping[str, Node]) -> tuple[Any, ...]:
    """The arguments of the canonical op from `k_positions` on; none where there is nothing beside the mask.

    Args:
        own: the program's own tensors, by name.
    """
    bias = meaning.position_bias
    names = [] if bias is None else sorted(tables(bias))
    text = "" if bias is None or bias is NOTHING else write_bias(bias, names)
    given = (text, [own[name] for name in names] or None, meaning.softcap or 0.0)
    sinks = own[meaning.sinks_table] if meaning.sinks else None
    return (None, *given, sinks) if given != ("", None, 0.0) or sinks is not None else ()


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
