"""What runs a prompt that Inductor is asked for: compiled once for all lengths, or op by op where that cannot be."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental import _config as shape_config
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

from trilithon.lower.native.layers import in_layers
from trilithon.lower.native.lower import is_lowered_site
from trilithon.lower.native.writes import write_tokens

log = logging.getLogger(__name__)


class Prompt:
    """A prompt of any length, over an empty cache.

    It is compiled at the first call, each kind of layer once for a single row and once for several. Where Dynamo or Inductor
    refuses, it runs op by op from then on, and a warning says why. A refusal may come when layers have written to their
    caches: the call op by op writes the same again.

    Attributes:
        plain: lowered; takes `(tokens, start, counts, *caches)`.
        compiled: None where it cannot be.
        note: for the report.
    """

    def __init__(self, plain: GraphModule) -> None:
        self.plain = plain
        self.compiled: Callable[..., Any] | None = in_layers(plain, is_lowered_site, _compiled, _is_write)
        self.note = "prefill: to be compiled by Inductor at its first call, once for all lengths"

    def __call__(self, tokens: Tensor, *rest: Tensor) -> Any:
        if self.compiled is None:
            return self.plain(tokens, *rest)
        try:
            with shape_config.patch(use_duck_shape=False):  # type: ignore[attr-defined] # equal sizes may differ in the next call
                made = self.compiled(_of_any_length(tokens), *_of_any_rows(rest))
        except _refusals() as error:
            self.compiled = None
            self.note = f"prefill: runs op by op, since Inductor cannot compile it: {_reason(error)}"
            log.warning("%s", self.note)
            return self.plain(tokens, *rest)
        self.note = "prefill: compiled by Inductor, once for all lengths"
        return made


def _refusals() -> tuple[type[Exception], ...]:
    """Dynamo's own are found when something failed: who compiles nothing does not wait for it to be imported."""
    exc = torch._dynamo.exc
    return exc.TorchDynamoException, exc.FailOnRecompileLimitHit, ConstraintViolationError, GuardOnDataDependentSymNode


def _compiled(part: GraphModule) -> nn.Module:
    made: nn.Module = torch.compile(part, dynamic=True, fullgraph=True)  # type: ignore[assignment]
    return made


def _is_write(node: Node) -> bool:
    return node.target is write_tokens


def _of_any_length(tokens: Tensor) -> Tensor:
    """The tokens `[b s]` such that no code is made for their s alone: 1 is padded to 2, others are marked.

    A mark makes Dynamo refuse what holds for one length only, instead of compiling each length anew.
    """
    tokens = tokens.repeat(1, 2) if tokens.shape[1] == 1 else tokens.clone()  # the caller's own gets no mark
    torch._dynamo.mark_dynamic(tokens, 1)
    return tokens


def _of_any_rows(rest: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Start, counts and caches; of a size that equals the number of rows by chance Dynamo would make one symbol with it."""
    if rest[0].shape[0] > 1:
        for cache in rest[2:]:
            torch._dynamo.mark_static(cache, [1, 2, 3])
    return rest


def _reason(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return f"{type(error).__name__}: {next((line for line in lines if line), 'no message')}"
