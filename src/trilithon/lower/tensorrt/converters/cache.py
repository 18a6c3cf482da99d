"""What cached programs call beside ATen: positions of rows, and writes into a static cache.

There is no converter for rings: TensorRT's cache update writes consecutive slots.
"""

from __future__ import annotations

import torch

from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.library import library
from trilithon.lower.tensorrt.network import ITensor, Network, Size
from trilithon.rewrite.cache_ops import last_tokens, real_positions, token_positions, turn, turn_back, write_cache


@converts(token_positions)
def convert_token_positions(net: Network, start: ITensor, tokens: Size) -> ITensor:
    """`start[b] .. start[b] + tokens - 1`."""
    return net.elementwise("SUM", _column(net, start), net.iota(tokens, axis=1, rank=2))


@converts(real_positions)
def convert_real_positions(net: Network, positions: ITensor, start: ITensor, counts: ITensor) -> ITensor:
    end = net.elementwise("SUM", start, counts)
    last = net.elementwise("SUB", _column(net, end), net.number(1, torch.int64, 2))
    return net.elementwise("MIN", positions, last)


@converts(last_tokens)
def convert_last_tokens(net: Network, x: ITensor, counts: ITensor) -> ITensor:
    """Element by element along the tokens."""
    last = net.elementwise("SUB", _column(net, counts), net.number(1, torch.int64, 2))
    rows, width = net.size(x, 0), net.size(x, 2)
    index = net.expand(net.reshape(last, [net.size(counts, 0), 1, 1]), [rows, 1, width])
    return net.out("gather_v2", x, index, library().GatherMode.ELEMENT, axis=1)


@converts(write_cache)
def convert_write_cache(net: Network, cache: ITensor, x: ITensor, start: ITensor, counts: ITensor) -> ITensor:
    """A write of consecutive slots into a cache, in place. Padding is written too, behind the tokens of its row.

    What stands there is written again when the row gets so far, and no query sees it before.

    Source: TensorRT IKVCacheUpdateLayer: `write_indices` is the first slot of each row; slots behind the end are dropped.
    """
    if not cache.is_network_input or len(cache.shape) != 4:
        raise net.refuse("it is not a write into a cache [b g t d] that is an input")
    if net.dtype(cache) != net.dtype(x):
        raise net.refuse(f"it writes {net.dtype(x)} into a cache of {net.dtype(cache)}")
    key = ("first slots", start.name)
    if key not in net.shared:
        net.shared[key] = net.cast(start, torch.int32)
    made = net.out("kv_cache_update", cache, x, net.shared[key], library().KVCacheMode.LINEAR)
    net.aliases[cache.name] = made
    return made


@converts(turn)
def convert_turn(net: Network, x: ITensor) -> ITensor:
    """Of one token nothing moves."""
    b, g, s, e = net.sizes(x)
    moved = x if s == 1 else net.permute(x, [0, 1, 3, 2])
    return net.reshape(moved, [b, net.product([g, e]), s, 1])


@converts(turn_back)
def convert_turn_back(net: Network, cache: ITensor, g: int) -> ITensor:
    """As they are kept, `[b g e t]`, they are `net.shared["turned", name]`: an attention that can, reads those."""
    b, heads, t, _ = net.sizes(cache)
    kept = net.reshape(cache, [b, g, net.calculate("FLOOR_DIV", heads, g), t])
    values = net.permute(kept, [0, 1, 3, 2])
    net.shared["turned", values.name] = kept
    return values


def _column(net: Network, x: ITensor) -> ITensor:
    """`[b]` as `[b 1]`."""
    return net.reshape(x, [net.size(x, 0), 1])
