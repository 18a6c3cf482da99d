"""Runs the programs that `insert_cache` makes on plain tensors, rows of unlike lengths together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.export import ExportedProgram

from trilithon.rewrite.insert_cache import cache_shapes, insert_cache


class CachedRun:
    """A cache of `tokens` slots a row and the three programs over it.

    Args:
        program: its proved attention canonical.
        ids: `[b n]`: what each row is fed, from the left.
        all_logits: of "extend".
    """

    def __init__(self, program: ExportedProgram, ids: Tensor, tokens: int, *, rings: bool, all_logits: bool = True) -> None:
        self.ids, self.start = ids, torch.zeros(len(ids), dtype=torch.long)
        self.shapes = cache_shapes(program, rings=rings)
        self.prompt, self.step = (insert_cache(program, mode, rings=rings) for mode in ("prompt", "step"))
        self.extend = insert_cache(program, "extend", rings=rings, all_logits=all_logits)
        self.caches = [  # what an unused slot holds must not matter
            torch.full((len(ids), c.g, c.slots(tokens), width), 99.0, dtype=c.dtype)
            for c in self.shapes
            for width in (c.d, c.e)
        ]
        self.generator = torch.Generator().manual_seed(0)

    def feed(self, counts: Sequence[int], width: int) -> list[tuple[int, int, Tensor]]:
        """Feed so many tokens to each row, with padding up to `width`; gives (row, position, logits)."""
        many = torch.tensor(counts)
        tokens = torch.randint(0, int(self.ids.max()) + 1, (len(counts), width), generator=self.generator)
        for row, (start, count) in enumerate(zip(self.start.tolist(), counts, strict=True)):
            tokens[row, :count] = self.ids[row, start : start + count]
        is_first = not bool(self.start.any())
        module = self.prompt if is_first else self.step if width == 1 else self.extend
        with torch.no_grad():
            logits = module(tokens, self.start.clone(), many, *self.caches)
        found = []
        for row, (start, count) in enumerate(zip(self.start.tolist(), counts, strict=True)):
            if logits.shape[1] == 1:
                found.append((row, start + count - 1, logits[row, 0]))
            else:
                found += [(row, start + i, logits[row, i]) for i in range(count)]
        self.start = self.start + many
        return found
