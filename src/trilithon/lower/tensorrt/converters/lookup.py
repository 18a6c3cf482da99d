"""Rows of a table."""

from __future__ import annotations

import torch

from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.network import ITensor, Network

aten = torch.ops.aten


@converts(aten.embedding.default)
def convert_embedding(
    net: Network, weight: ITensor, indices: ITensor, padding_idx: int, scale_grad_by_freq: bool, sparse: bool
) -> ITensor:
    """The row of each index; all other arguments are about gradients."""
    return net.gather(weight, indices, 0)
