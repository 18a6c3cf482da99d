"""Weights that engines read where PyTorch keeps them, as inputs of their own.

Small weights are part of an engine. A large matrix of halves is an input with a fixed address: building an engine makes no
copy of it, an engine's file does not hold it, and prompts, steps and PyTorch share one. Where weights are part of an engine
TensorRT makes one product of those that read one vector; where they are inputs it does not, so `lower/products.py` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from trilithon.lower.products import LINEAR, attribute

aten = torch.ops.aten
LEAST_BYTES = 1 << 20
HALVES = (torch.float16, torch.bfloat16)  # matrices of float32 that are inputs are copied in each run
# Where in the arguments of an operation a matrix may be an input: its converter asks for no numbers of it.
PLACES: dict[Any, tuple[int, ...]] = {
    LINEAR: (1,),
    aten.embedding.default: (0,),
    aten.mm.default: (0, 1),
    aten.matmul.default: (0, 1),
    aten.addmm.default: (1, 2),
}


def is_bound(gm: GraphModule, node: Node) -> bool:
    """Is the weight of a `get_attr` node an input of the engine?"""
    value = attribute(gm, node)
    is_large = value.dim() == 2 and value.dtype in HALVES and value.nbytes >= LEAST_BYTES
    return is_large and all(_reads_matrix(user, node) for user in node.users)


def _reads_matrix(user: Node, weight: Node) -> bool:
    places = PLACES.get(user.target, ())
    return bool(places) and not user.kwargs and all(i in places for i, x in enumerate(user.args) if x is weight)
