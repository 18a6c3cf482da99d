"""Rows of a decoder that begin and end each on its own: a prompt takes the place of a finished one while the others go on."""

from __future__ import annotations

import torch
from torch import Tensor

from trilithon.errors import CapacityExceeded
from trilithon.runtime.decoder import CachedDecoder
from trilithon.runtime.prompt import PromptGraphs, bucket
from trilithon.runtime.step import make_step


class Slots:
    """Rows of a cache, each of which holds a text of its own or is empty.

    A row counts its own tokens from 0, and its mask keeps out of sight what stands behind them. So a prompt is taken in by the
    program of prompts over a cache of one row, and what that then holds is copied to the row; and a step is the program of
    steps on all rows. An empty row takes part in each step as a text of one token, which nobody reads.

    All of the cache is allocated at once, and one row more: a row's place within the cache may be no address that an engine
    takes (TensorRT wants multiples of 256), nor one that a CUDA graph of a prompt has recorded.

    Args:
        decoder: nobody else may use it in the meantime; it has no context.
        rows: how many.

    Raises:
        CapacityExceeded: the cache holds fewer rows.
    """

    def __init__(self, decoder: CachedDecoder, rows: int) -> None:
        decoder.check_rows(rows)
        decoder.reserve()
        self.decoder, self.rows = decoder, rows
        self._step = make_step(rows, decoder.device)
        with torch.inference_mode(False):  # they outlive the mode that the caller is in
            self._taken = torch.zeros_like(self._step.start)
            self._alone = [torch.zeros_like(x[:1]) for x in decoder.caches]
        prefill = decoder.modules.prefill
        self._prefill = prefill if decoder.prompts is None else PromptGraphs(prefill)

    @torch.no_grad()
    def fill(self, row: int, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Take a prompt `[1 s]` into a row, whatever that held; the other rows stay as they are.

        Returns:
            The logits `[1 v]` behind its last token, and the token `[1]` of the highest; valid until the next prompt.

        Raises:
            CapacityExceeded: more tokens than a row can hold.
        """
        decoder, s = self.decoder, input_ids.shape[1]
        if s > decoder.cache_tokens:
            raise CapacityExceeded(f"{s} tokens do not fit a cache of {decoder.cache_tokens}")
        width = s if decoder.prompts is None else bucket(s, decoder.cache_tokens)
        tokens = torch.nn.functional.pad(input_ids, (0, width - s))  # behind the prompt, where no token sees it
        counts = torch.full((1,), s, dtype=torch.int64, device=decoder.device)
        logits = self._prefill(tokens, torch.zeros_like(counts), counts, *self._alone)
        for cache, made in zip(decoder.caches, self._alone, strict=True):
            used = min(s, cache.shape[2])
            cache[row, :, :used].copy_(made[0, :, :used])
        self._step.start[row], self._taken[row] = s, 1
        return logits[:, -1], logits[:, -1].argmax(-1)

    def free(self, row: int) -> None:
        """Make a row an empty one."""
        self._step.start[row] = self._taken[row] = 0

    @torch.no_grad()
    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Take in one token `[b]` a row; what an empty row is given means nothing.

        A row that holds as many tokens as the cache takes must have been freed.

        Returns:
            The logits `[b v]` behind each, and the token `[b]` of the highest; both are valid until the next step.
        """
        self._step.tokens.copy_(tokens[:, None])
        held = [x[: self.rows] for x in self.decoder.caches]
        logits, best = self._step.run(self.decoder.modules.decode, held, self.decoder.cuda_graphs)
        self._step.start.mul_(self._taken)  # an empty row does not grow
        return logits[:, -1], best
