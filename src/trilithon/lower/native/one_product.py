"""Products of one vector as one, where PyTorch runs them: they are larger, and fewer kernels."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from trilithon.lower.products import attribute, merge_products

aten = torch.ops.aten
VIEWS = (aten.view.default, aten._unsafe_view.default)


def one_product(gm: GraphModule) -> GraphModule:
    """Merge products of one vector, in place; views of their results, which lie side by side, may have to copy.

    The matrices become views of one in the model too; on a GPU their old memory is given back.
    """
    merge_products(gm, _is_matrix)
    for node in gm.graph.nodes:
        if node.target in VIEWS:
            node.target = aten.reshape.default
    gm.recompile()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return gm


def _is_matrix(gm: GraphModule, node: Node) -> bool:
    weight = attribute(gm, node)
    return weight.dim() == 2 and weight.dtype.is_floating_point
