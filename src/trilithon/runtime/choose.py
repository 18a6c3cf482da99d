"""From a step's logits to its tokens: all of a request that changes the scores, in Hugging Face's order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from trilithon.runtime.agree import agreed
from trilithon.runtime.request import Request
from trilithon.runtime.sampling import SeenTokens, penalise, pick, warp


class Chooser:
    """Chooses the next token of each row as `request` says.

    Attributes:
        changes_scores: whether the scores are other than the logits, or are asked for.
        group: ranks that share the model; what the first of them chooses counts.
    """

    def __init__(self, request: Request, vocabulary: int, group: str | None = None) -> None:
        self.request, self.group = request, group
        self.changes_scores = (
            request.sampling.do_sample
            or request.sampling.penalises
            or bool(request.processors)
            or (request.eos is not None and request.min_new_tokens > 0)
            or request.output_scores
        )
        self.seen: SeenTokens | None = None
        if request.sampling.penalises:
            rows, tokens = request.input_ids.shape
            self.seen = SeenTokens(rows, vocabulary, request.input_ids.device)
            place = torch.arange(tokens, device=request.input_ids.device)
            self.seen.add(request.input_ids, valid=place >= request.pad[:, None])

    def scores(self, logits: Tensor, made: int | Tensor, ids: Callable[[], Tensor]) -> Tensor:
        """The scores `[b v]` float32 that the token is taken from.

        Args:
            logits: `[b v]`.
            made: new tokens that the rows have, one number or `[b 1]`.
            ids: gives `[b n]`, prompt and new tokens; called only where a processor reads it.
        """
        request = self.request
        scores = penalise(
            logits.to(torch.float32, copy=bool(request.processors)), request.sampling, self.seen.mask if self.seen else None
        )
        if request.eos is not None and request.min_new_tokens:
            scores = _block(scores, request.eos, made, request.min_new_tokens)
        for processor in request.processors:
            scores = processor(ids(), scores)
        return warp(scores, request.sampling)

    def window(self, logits: Tensor, best: Tensor, drafts: Tensor, made: Tensor, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The token behind each token of a window, given that the drafts before it are right.

        Args:
            logits: `[b w v]`.
            best: `[b w]`, the token with the highest of each.
            drafts: `[b w-1]`, the tokens of the window but the first.
            made: `[b 1]`, new tokens that the rows have, without the drafts.
            ids: `[b n]`, what processors read, without the drafts.

        Returns:
            Tokens `[b w]`, and the scores `[b v]` of each; no scores where they are the logits.
        """
        if not self.changes_scores:
            return best, []
        known, self.seen = self.seen, self.seen.copy() if self.seen else None
        scores = []
        for i, behind in enumerate(logits.unbind(1)):
            if i:
                self.add(drafts[:, i - 1 : i])
            scores.append(self.scores(behind, made + i, partial(_joined, ids, drafts[:, :i])))
        self.seen = known
        return torch.stack([self.pick(s) for s in scores], 1), scores

    def pick(self, scores: Tensor) -> Tensor:
        return self.agreed(pick(scores, self.request.sampling, self.request.generator))

    def agreed(self, x: Tensor) -> Tensor:
        """What the first rank found: draws, processors and clocks may be others on other ranks."""
        return agreed(x, self.group)

    def add(self, tokens: Tensor, valid: Tensor | None = None) -> None:
        """Note that the rows hold these tokens `[b n]`, of which those count that are `valid [b n]`."""
        if self.seen:
            self.seen.add(tokens, valid)


def _joined(ids: Tensor, drafts: Tensor) -> Tensor:
    return torch.cat([ids, drafts], 1)


def _block(scores: Tensor, eos: Tensor, made: int | Tensor, least: int) -> Tensor:
    """-inf for tokens that would end a row too early."""
    if isinstance(made, int):
        return scores.index_fill(-1, eos, -torch.inf) if made < least else scores
    return torch.where(made < least, scores.index_fill(-1, eos, -torch.inf), scores)
