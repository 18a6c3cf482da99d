"""Runs the programs that `insert_cache` makes on plain tensors, rows of unlike lengths together."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor
from torch.export import ExportedProgram

from trilithon.rewrite.cache_shape import SPARE
from trilithon.rewrite.insert_cache import cache_shapes, insert_cache

Found = list[tuple[int, int, Tensor]]  # row, position, logits [v]


class CachedRun:
    """A cache and the three programs over it.

    Args:
        program: its proved attention canonical.
        ids: `[b n]`: what each row is fed, from the left.
        most: tokens a row that the cache is for.
        context: of an encoder-decoder.
        tokens: name of the token input, where it must be given.
    """

    def __init__(
        self,
        program: ExportedProgram,
        ids: Tensor,
        most: int,
        *,
        rings: bool,
        turned: bool = False,
        context: Sequence[Tensor] = (),
        tokens: str | None = None,
    ) -> None:
        self.ids, self.start, self.most, self.context = ids, [0] * len(ids), most, context
        self.shapes = cache_shapes(program, rings=rings, turned=turned, tokens=tokens)
        self.prompt = insert_cache(program, "prompt", rings=rings, turned=turned, tokens=tokens)
        self.step = insert_cache(program, "step", rings=rings, turned=turned, tokens=tokens)
        self.extend = insert_cache(program, "extend", rings=rings, turned=turned, all_logits=True, tokens=tokens)
        self.last = insert_cache(program, "extend", rings=rings, turned=turned, tokens=tokens)
        self.caches = [  # what an unused slot holds must not matter
            torch.full((len(ids), x.heads, c.slots(most), x.width), 99.0, dtype=x.dtype) for c in self.shapes for x in c.tensors
        ]

    def feed(self, counts: Sequence[int], random: Random) -> Found:
        """Feed so many tokens to each row, with some padding, and give the logits that come out."""
        width = max(counts) + random.choice([0, 0, 3])
        tokens = torch.randint(0, int(self.ids.max()) + 1, (len(counts), width))
        for row, (start, count) in enumerate(zip(self.start, counts, strict=True)):
            tokens[row, :count] = self.ids[row, start : start + count]
        choices = [self.extend, self.last, *([self.prompt] * 4 if not any(self.start) else [])]
        module = self.step if width == 1 else random.choice(choices)
        with torch.no_grad():
            made = module(tokens, torch.tensor(self.start), torch.tensor(counts), *self.context, *self.caches)
        logits = made
        if module is self.step:
            logits, best = made
            assert torch.equal(best, logits[:, -1].argmax(-1))
        found: Found = []
        for row, (start, count) in enumerate(zip(self.start, counts, strict=True)):
            if module is self.extend:
                found += [(row, start + i, logits[row, i]) for i in range(count)]
            else:
                assert logits.shape[1] == 1
                found.append((row, start + count - 1, logits[row, 0]))
            self.start[row] = start + count
        return found

    def rewind(self, random: Random) -> None:
        """Forget some tokens of each row."""
        self.start = [max(start - random.randint(0, SPARE), 1) for start in self.start]

    def schedule(self, seed: int) -> Found:
        """A prompt, then calls of 1 to 16 tokens a row and some that are taken back, until a row is full."""
        random = Random(seed)
        rows, length = len(self.ids), self.ids.shape[1]
        found = self.feed([random.randint(1, 12) for _ in range(rows)], random)
        for n in range(40):
            left = min(length, self.most) - max(self.start)
            if left <= 0:
                break
            most = 1 if random.random() < 0.3 else min(16, left)
            found += self.feed([random.randint(1, most) for _ in range(rows)], random)
            if n % 5 == 3:
                self.rewind(random)
        return found
