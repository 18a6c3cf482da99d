"""What one attention site keeps in the cache: the shape and type of each of its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

SPARE = 15  # slots of a ring beyond its window: tokens that one call may bring beside the first, and that may be taken back
VECTOR = 8  # turned values are read so many slots at a time


class CacheTensor(NamedTuple):
    """One of the tensors `[b heads slots width]` that a site keeps."""

    kind: str
    heads: int
    width: int
    dtype: torch.dtype


@dataclass(frozen=True)
class CacheShape:
    """What one attention site keeps for a token: `g` heads of `d` (keys) and `e` (values) numbers.

    Attributes:
        dtype: of keys and values in the program.
        window: the keys that a query sees at most, where the site keeps a ring of them; None = every position has a slot.
        stored: a type of 8 bits to keep them in, with one scale a token and head; None = `dtype`.
        turned: values are kept as `g * e` heads of one number (`cache_ops.turn`), so that those of one place in a head are
            contiguous from slot to slot; the number of slots is a multiple of 8. Not with `stored`.
    """

    g: int
    d: int
    e: int
    dtype: torch.dtype
    window: int | None = None
    stored: torch.dtype | None = None
    turned: bool = False

    def slots(self, cache_tokens: int) -> int:
        """Slots a row, of a cache for so many tokens."""
        slots = cache_tokens if self.window is None else min(self.window + SPARE, cache_tokens)
        return -(-slots // VECTOR) * VECTOR if self.turned else slots

    @property
    def tensors(self) -> tuple[CacheTensor, ...]:
        """What is kept, in the order of a module's inputs: keys and values, each with its scales where there are any."""
        kept: list[CacheTensor] = []
        values = (self.g * self.e, 1) if self.turned else (self.g, self.e)
        for kind, (heads, width) in (("k", (self.g, self.d)), ("v", values)):
            kept.append(CacheTensor(f"cache_{kind}", heads, width, self.stored or self.dtype))
            if self.stored is not None:
                kept.append(CacheTensor(f"scale_{kind}", heads, 1, torch.float32))
        return tuple(kept)

    def zeros(self, rows: int, slots: int, device: torch.device) -> list[torch.Tensor]:
        """Empty tensors."""
        return [torch.zeros(rows, x.heads, slots, x.width, dtype=x.dtype, device=device) for x in self.tensors]

    def bytes_of(self, cache_tokens: int) -> int:
        """Bytes a row, of a cache for so many tokens."""
        return self.slots(cache_tokens) * sum(x.heads * x.width * x.dtype.itemsize for x in self.tensors)
