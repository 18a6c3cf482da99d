"""Linear layers of which a rank holds a part of the weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from trilithon.capture.collectives import all_gather, all_reduce


class Columns(nn.Module):
    """Some outputs of a linear layer.

    Args:
        weight: `[out in]`, whole.
        own: outputs of this rank.
        device: where they are kept.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, own: range, device: torch.device) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.shape[1], len(own)
        self.weight = _held(weight[own.start : own.stop], device)
        self.bias = None if bias is None else _held(bias[own.start : own.stop], device)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Joined(nn.Module):
    """All outputs of a linear layer, of which each rank computes some.

    The result is the same on all ranks to the last bit. Outputs are padded to as many on each rank.

    Args:
        weight: `[out in]`, whole; where it `is_shared` with another layer, on `device`, and divides evenly, a view is held.
        rank, ranks, group: whose.
        device: where they are kept.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        rank: int,
        ranks: int,
        group: str,
        device: torch.device,
        *,
        is_shared: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.ranks, self.group = ranks, group
        size = -(-self.out_features // ranks)
        own = range(min(rank * size, self.out_features), min((rank + 1) * size, self.out_features))
        missing = size - len(own)
        part = weight[own.start : own.stop]
        self.weight = _held(pad(part, (0, 0, 0, missing)) if missing else part, device, is_view=is_shared and not missing)
        self.bias = None if bias is None else _held(pad(bias[own.start : own.stop], (0, missing)), device)

    def forward(self, x: Tensor) -> Tensor:
        own = linear(x, self.weight, self.bias)
        last = own.dim() - 1
        joined = all_gather(own.permute(last, *range(last)), self.ranks, self.group)
        if joined.shape[0] != self.out_features:
            joined = joined[: self.out_features]
        return joined.permute(*range(1, last + 1), 0)


class Rows(nn.Module):
    """A linear layer of which each rank reads some inputs; what they make of them is added up.

    Args:
        weight: `[out in]`, whole.
        own: inputs of this rank.
        group: whose results are added up.
        device: where they are kept.
        takes_all: it is given all inputs, not this rank's alone.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, own: range, group: str, device: torch.device, *, takes_all: bool
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = len(own), weight.shape[0]
        self.first, self.group, self.takes_all = own.start, group, takes_all
        self.weight = _held(weight[:, own.start : own.stop], device)
        self.bias = None if bias is None else _held(bias, device)

    def forward(self, x: Tensor) -> Tensor:
        if self.takes_all:
            x = x[..., self.first : self.first + self.in_features]
        total = all_reduce(linear(x, self.weight), self.group)
        return total if self.bias is None else total + self.bias


def _held(x: Tensor, device: torch.device, is_view: bool = False) -> nn.Parameter:
    """A parameter with memory of its own, so that the whole tensor can go."""
    x = x.detach()
    kept = x if is_view else x.to(device, copy=True, memory_format=torch.contiguous_format)
    return nn.Parameter(kept, requires_grad=False)
