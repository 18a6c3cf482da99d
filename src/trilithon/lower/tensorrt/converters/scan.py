"""Sums up to each element."""

from __future__ import annotations

import torch

from trilithon.lower.tensorrt.converters.known import axis_of
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.library import library
from trilithon.lower.tensorrt.network import ITensor, Network

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


@converts(aten.cumsum.default)
def convert_cumsum(net: Network, self: ITensor, dim: int, dtype: torch.dtype | None) -> ITensor:
    """Integers are summed as int64 if no dtype is asked for; halves in float32, as the layer adds in its own type."""
    given = net.dtype(self)
    wanted = dtype or (given if given.is_floating_point else torch.int64)
    x = net.cast(self, torch.float32 if wanted in HALF else wanted)
    if not len(self.shape):
        return net.cast(x, wanted)
    axis = net.constant(torch.tensor(axis_of(net, self, dim)))
    total = net.out("cumulative", x, axis, library().CumulativeOperation.SUM, False, False)
    return net.cast(total, wanted)
