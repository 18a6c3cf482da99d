"""Lower canonical attention to PyTorch kernels; a dense mask that several layers share is made once."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from trilithon.errors import CannotLower
from trilithon.lower.native.attention import attend, attend_cache
from trilithon.lower.native.emit import emit_mask
from trilithon.rewrite.op import ATTENTION
from trilithon.spec.masks import parse

NO_TENSOR = ("causal", "full")


def lower_native(gm: GraphModule) -> GraphModule:
    """Replace every `trilithon::attention` of the graph, in place, and return it."""
    masks: dict[tuple[Any, ...], Node] = {}
    for node in list(gm.graph.nodes):
        if node.target is ATTENTION:
            _lower(gm, node, masks)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return gm


def _lower(gm: GraphModule, node: Node, masks: dict[tuple[Any, ...], Node]) -> None:
    if node.args[7:]:
        raise CannotLower("cannot lower attention", why="it has a bias, a softcap, sinks or positions of keys")
    args: list[Any] = [*node.args, None, None][:7]
    q, k, v, mask, scale, q_start, key_mask = args
    with gm.graph.inserting_before(node):
        allowed = None
        if mask not in NO_TENSOR or q_start is not None:
            lengths = [str(x.meta["val"].shape[2]) for x in (q, k)] if q_start is None else []  # all caches are of one length
            key = (mask, q_start, key_mask, *lengths)
            if key not in masks:
                masks[key] = emit_mask(gm.graph, parse(mask), q, k, q_start, key_mask)
            allowed = masks[key]
        if q_start is None:
            new = gm.graph.call_function(attend, (q, k, v, mask, scale, allowed))
        else:
            new = gm.graph.call_function(attend_cache, (q, k, v, scale, allowed))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
