"""Products of one vector made into one: of queries, keys and values; of gate and up.

Their matrices are put into one, one below the other, and become views of it, in the model too: with a copy, a weight that is
written to later would be seen by some products and not by others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from trilithon.lower.cuda_graph import keep_for_graphs

aten = torch.ops.aten
LINEAR = aten.linear.default


def attribute(gm: GraphModule, node: Node) -> Tensor:
    """The weight that a `get_attr` node stands for."""
    value: object = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


def merge_products(gm: GraphModule, may_be_part: Callable[[GraphModule, Node], bool]) -> GraphModule:
    """Products of one vector with several matrices, in place, as one product.

    %q = linear(%x, %w_q)   =>   %all = linear(%x, cat(%w_q, %w_k))
    %k = linear(%x, %w_k)        %q, %k = %all[.., :n], %all[.., n:]

    Results are no longer contiguous. Matrices that share memory with anything but each other stay as they are.

    Args:
        may_be_part: of the `get_attr` node of a matrix.
    """
    groups: dict[Node, list[Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        if node.target is LINEAR and _can_merge(gm, node, may_be_part):
            groups[node.args[0]].append(node)
    for number, (x, products) in enumerate(groups.items()):
        if len(products) > 1 and len({len(p.args) for p in products}) == 1:
            _merge(gm, x, products, f"merged_{number}")
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _can_merge(gm: GraphModule, product: Node, may_be_part: Callable[[GraphModule, Node], bool]) -> bool:
    x, *weights = product.args
    given = all(isinstance(w, Node) and w.op == "get_attr" for w in weights)
    known = isinstance(x, Node) and "val" in product.meta
    return known and given and may_be_part(gm, product.args[1])  # type: ignore[arg-type]


def _merge(gm: GraphModule, x: Node, products: Sequence[Node], name: str) -> None:
    graph, first = gm.graph, products[0]
    places = range(1, len(first.args))
    parts = [[attribute(gm, p.args[place]) for p in products] for place in places]  # type: ignore[arg-type]
    if not all(_lie_together(group) or _are_movable(group) for group in parts):
        return
    with graph.inserting_before(first):
        weights = []
        for place, group in zip(places, parts, strict=True):
            gm.register_buffer(f"{name}_{place}", _joined(group))
            weights.append(graph.get_attr(f"{name}_{place}"))
            weights[-1].meta["val"] = first.args[place].meta.get("val")  # type: ignore[union-attr]
        whole = graph.call_function(LINEAR, (x, *weights))
        whole.meta = {key: value for key, value in first.meta.items() if key != "val"}
        start, axis = 0, first.meta["val"].dim() - 1
        for product in products:
            width = product.meta["val"].shape[-1]
            part = graph.call_function(aten.slice.Tensor, (whole, axis, start, start + width))
            part.meta, start = dict(product.meta), start + width
            product.replace_all_uses_with(part)
    whole.meta["val"] = first.meta["val"].new_empty((*first.meta["val"].shape[:-1], start))
    for product in products:
        graph.erase_node(product)


def _lie_together(parts: Sequence[Tensor]) -> bool:
    """Were they put into one for another program of the model?"""
    ends = [parts[0].data_ptr(), *(part.data_ptr() + part.nbytes for part in parts)]
    follows = all(part.data_ptr() == end and part.is_contiguous() for part, end in zip(parts, ends, strict=False))
    return follows and len({part.untyped_storage().data_ptr() for part in parts}) == 1


def _are_movable(parts: Sequence[Tensor]) -> bool:
    plain = all(type(part) in (Tensor, nn.Parameter) and part.untyped_storage().nbytes() == part.nbytes for part in parts)
    return plain and len({part.data_ptr() for part in parts}) == len(parts) and len({(x.dtype, x.device) for x in parts}) == 1


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One matrix of all parts, one below the other; where it is made the parts become views of it, as the model has them."""
    first = parts[0]
    if _lie_together(parts):
        return first.detach().as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())
    with torch.inference_mode(False):  # it outlives the mode that the caller is in
        made = torch.cat([part.detach() for part in parts])
    start = 0
    for part in parts:
        keep_for_graphs(part.detach())
        part.data, start = made[start : start + len(part)], start + len(part)
    return made
