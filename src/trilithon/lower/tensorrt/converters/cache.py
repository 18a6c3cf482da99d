"""Writes into a static cache."""

from __future__ import annotations

from typing import Any

import torch

from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.library import library
from trilithon.lower.tensorrt.network import ITensor, Network, Size, is_tensor
from trilithon.rewrite.insert_cache import _slots

aten = torch.ops.aten


@converts(_slots)
def convert_slots(net: Network, start: ITensor, tokens: Size) -> ITensor:
    """`start .. start + tokens - 1`."""
    slots = net.elementwise("SUM", net.iota(tokens), net.reshape(start, [1]))
    net.shared["start of slots", slots.name] = start
    return slots


@converts(aten.index_copy_.default)
def convert_index_copy_(net: Network, self: ITensor, dim: int, index: ITensor, source: ITensor) -> ITensor:
    """A write of consecutive slots into a cache, in place.

    Source: TensorRT IKVCacheUpdateLayer: `write_indices` is the first slot of each row; slots behind the end are dropped.
    """
    start = net.shared.get(("start of slots", index.name)) if is_tensor(index) else None
    if start is None or dim != 2 or not self.is_network_input or len(self.shape) != 4:
        raise net.refuse("it is not a write of consecutive slots along axis 2 of a cache [b g t d] that is an input")
    if net.dtype(self) != net.dtype(source):
        raise net.refuse(f"it writes {net.dtype(source)} into a cache of {net.dtype(self)}")
    rows: Any = net.size(self, 0)
    key = ("first slots", start.name, rows.name if is_tensor(rows) else rows)
    if key not in net.shared:
        first = net.cast(net.reshape(start, [1]), torch.int32)
        net.shared[key] = net.expand(first, [rows])
    return net.out("kv_cache_update", self, source, net.shared[key], library().KVCacheMode.LINEAR)
