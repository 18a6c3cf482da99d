"""What the rows of a decoder read beside their tokens: keys and values of an encoder's output, made once a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trilithon.runtime.written import Written


@dataclass
class HeldContext:
    """The context of the present rows; empty but for an encoder-decoder.

    Attributes:
        module: the inputs by position to a tuple of tensors; None = there is no context.
        inputs: names of what it takes.
        has_rows: of each of its results, whether its axis 0 runs over rows.
        moved: called when tensors stand at other addresses than those before.
        tensors: what the rows read; their addresses stay while their sizes do.
    """

    module: Callable[..., Sequence[Tensor]] | None = None
    inputs: tuple[str, ...] = ()
    has_rows: tuple[bool, ...] = ()
    moved: Callable[[], None] = lambda: None
    tensors: tuple[Tensor, ...] = ()

    def take(self, given: tuple[Tensor, ...], rows: int) -> None:
        """Run the module on inputs of as many rows as there are prompts, and repeat each prompt to give `rows`."""
        made = () if self.module is None else self.module(*given)
        repeated = (
            x.repeat_interleave(rows // len(x), 0) if own and len(x) != rows else x
            for x, own in zip(made, self.has_rows, strict=True)
        )
        self.hold(tuple(repeated))

    def select(self, rows: Tensor) -> None:
        """Make row i a copy of what row `rows[i]` is."""
        pairs = zip(self.tensors, self.has_rows, strict=True)
        self.hold(tuple(x.index_select(0, rows) if own else x for x, own in pairs))

    def hold(self, made: tuple[Tensor, ...]) -> None:
        """Keep copies of these tensors."""
        if [x.shape for x in made] != [x.shape for x in self.tensors]:
            with torch.inference_mode(False):  # they outlive the mode that the caller is in
                self.tensors = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in made)
            self.moved()
        for kept, x in zip(self.tensors, made, strict=True):
            kept.copy_(x)


@dataclass(frozen=True)
class Snapshot:
    """What the rows of a decoder held.

    Attributes:
        lengths: tokens of each row.
        caches: the slots in use.
        context: what the rows read beside their tokens.
        written: how far they were.
    """

    lengths: tuple[int, ...]
    caches: tuple[Tensor, ...]
    context: tuple[Tensor, ...] = ()
    written: Written = field(default_factory=Written)
