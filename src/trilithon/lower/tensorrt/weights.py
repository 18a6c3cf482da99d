"""Weights that engines read where PyTorch keeps them, as inputs of their own; and products of one vector made into one.

Small weights are part of an engine. A large matrix of halves is an input with a fixed address: building an engine makes no
copy of it, an engine's file does not hold it, and prompts, steps and PyTorch share one. Where weights are part of an engine
TensorRT makes one product of those that read one vector (query, key and value; gate and up); where they are inputs it does
not, so it is done here: their matrices are put into one, one below the other, and become views of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
LEAST_BYTES = 1 << 20
HALVES = (torch.float16, torch.bfloat16)  # matrices of float32 that are inputs are copied in each run
LINEAR = aten.linear.default
# Where in the arguments of an operation a matrix may be an input: its converter asks for no numbers of it.
PLACES: dict[Any, tuple[int, ...]] = {
    LINEAR: (1,),
    aten.embedding.default: (0,),
    aten.mm.default: (0, 1),
    aten.matmul.default: (0, 1),
    aten.addmm.default: (1, 2),
}


def attribute(gm: GraphModule, node: Node) -> Tensor:
    """The weight that a `get_attr` node stands for."""
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


def is_bound(gm: GraphModule, node: Node) -> bool:
    """Is the weight of a `get_attr` node an input of the engine?"""
    value = attribute(gm, node)
    is_large = value.dim() == 2 and value.dtype in HALVES and value.nbytes >= LEAST_BYTES
    return is_large and all(_reads_matrix(user, node) for user in node.users)


def _reads_matrix(user: Node, weight: Node) -> bool:
    places = PLACES.get(user.target, ())
    return bool(places) and not user.kwargs and all(i in places for i, x in enumerate(user.args) if x is weight)


def merge_products(gm: GraphModule) -> GraphModule:
    """Products of one vector with several large matrices, in place, as one product.

    %q = linear(%x, %w_q)   =>   %all = linear(%x, cat(%w_q, %w_k))
    %k = linear(%x, %w_k)        %q, %k = %all[.., :n], %all[.., n:]
    """
    groups: dict[Node, list[Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        if node.target is LINEAR and _can_merge(gm, node):
            groups[node.args[0]].append(node)
    for number, (x, products) in enumerate(groups.items()):
        if len(products) > 1 and len({len(p.args) for p in products}) == 1:
            _merge(gm, x, products, f"merged_{number}")
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _can_merge(gm: GraphModule, product: Node) -> bool:
    x, *weights = product.args
    given = all(isinstance(w, Node) and w.op == "get_attr" for w in weights)
    known = isinstance(x, Node) and "val" in product.meta
    return known and given and is_bound(gm, product.args[1])  # type: ignore[arg-type]


def _merge(gm: GraphModule, x: Node, products: Sequence[Node], name: str) -> None:
    graph, first = gm.graph, products[0]
    with graph.inserting_before(first):
        weights = []
        for place in range(1, len(first.args)):
            parts = [attribute(gm, p.args[place]) for p in products]  # type: ignore[arg-type]
            gm.register_buffer(f"{name}_{place}", _joined(parts))
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


_REPLACED: Any = WeakIdKeyDictionary()  # part -> its memory before: CUDA graphs that were captured then read it by address


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One matrix of all parts, one below the other; where it is made the parts become views of it, as the model has them."""
    first, ends = parts[0], [parts[0].data_ptr()]
    for part in parts:
        ends.append(part.data_ptr() + part.nbytes)
    together = all(part.data_ptr() == end and part.is_contiguous() for part, end in zip(parts, ends, strict=False))
    if together and len({part.untyped_storage().data_ptr() for part in parts}) == 1:  # by another program of the model
        return first.detach().as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())
    made = torch.cat([part.detach() for part in parts])
    start = 0
    for part in parts:
        if part.is_cuda:
            _REPLACED[part] = part.detach()
        part.data, start = made[start : start + len(part)], start + len(part)
    return made
