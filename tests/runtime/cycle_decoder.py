"""A decoder whose token t is followed by t + 1: nothing waits for the device, so that all waiting is the loop's."""

from __future__ import annotations

import torch
from torch import Tensor

from trilithon.runtime.protocol import Snapshot


class CycleDecoder:
    """Tokens count up modulo `vocabulary`."""

    cache_tokens, max_batch = 64, 4
    best: Tensor

    def __init__(self, vocabulary: int, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.vocabulary = torch.arange(vocabulary, device=device)
        self.lengths = torch.zeros(0, dtype=torch.int64, device=device)

    def prefill(self, input_ids: Tensor, pad: Tensor) -> Tensor:
        return self.decode(input_ids[:, -1])

    def decode(self, tokens: Tensor) -> Tensor:
        logits = self.extend(tokens[:, None])[:, 0]
        self.best = self.best[:, 0]
        return logits

    def extend(self, tokens: Tensor, counts: Tensor | None = None) -> Tensor:
        self.best = (tokens + 1) % len(self.vocabulary)
        return -(self.vocabulary - self.best[..., None]).abs().float()

    def rewind(self, lengths: Tensor) -> None: ...

    def save(self) -> Snapshot: ...

    def restore(self, snapshot: Snapshot) -> None: ...

    def select(self, rows: Tensor) -> None: ...
