"""Writes of a prompt's keys and values into the caches: on a GPU a kernel of its own.

What Inductor makes of `write_cache` divides numbers of 64 bits for each element (docs/performance.md).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, has_side_effect

from trilithon.lower.inputs import Input
from trilithon.lower.native.fused.operations import padded
from trilithon.lower.native.split_kv import has_triton
from trilithon.rewrite.cache_ops import quantise, write_cache, write_cache_8bit

NUMBERS = 4096  # that one program moves


@has_side_effect
def write_tokens(cache: Tensor, x: Tensor, start: Tensor, counts: Tensor) -> Tensor:
    """`cache_ops.write_cache`, run as it is, outside of compiled programs."""
    if not (cache.is_cuda and has_triton()):
        return write_cache(cache, x, start, counts)
    write_by_kernel(cache, x, start, counts)
    return cache


def write_by_kernel(cache: Tensor, x: Tensor, start: Tensor, counts: Tensor) -> None:
    from trilithon.lower.native.write_kernels import write

    kept, x = cache, x if x.stride(3) == 1 else x.contiguous()
    if cache.dtype.itemsize == 1:  # bits that no kernel has to know the meaning of
        kept, x = cache.view(torch.int8), x.view(torch.int8)
    (b, g, s, d), t = x.shape, cache.shape[2]
    width = padded(d)
    tokens = max(1, NUMBERS // width)
    write[(-(-s // tokens), b * g)](
        x, kept, start, counts, *x.stride()[:3], *kept.stride()[:3], g, s, t, d, BLOCK_S=tokens, BLOCK_D=width
    )


def separate_writes(gm: GraphModule, inputs: Sequence[Input]) -> None:
    """Make each write of a prompt, whose result nothing reads, one of `write_tokens`, in place; into 8 bits, two.

    Args:
        inputs: what it takes.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    dtypes = {node: x.dtype for node, x in zip(placeholders, inputs, strict=True)}
    for node in list(gm.graph.nodes):
        if node.target is write_cache and not node.users:
            node.target = write_tokens
        elif node.target is write_cache_8bit and not any(item.users for item in node.users):
            _separate_8bit(gm.graph, node, dtypes)
    gm.recompile()


def _separate_8bit(graph: Graph, node: Node, dtypes: Mapping[Node, torch.dtype]) -> None:
    cache, scales, x, *places = node.args
    with graph.inserting_before(node):
        made = graph.call_function(quantise, (x, dtypes[cache]))  # type: ignore[index]
        for i, kept in enumerate((cache, scales)):
            graph.call_function(write_tokens, (kept, graph.call_function(operator.getitem, (made, i)), *places))
    for item in list(node.users):
        graph.erase_node(item)
    graph.erase_node(node)
