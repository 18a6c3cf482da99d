"""What runs a prompt: generated kernels beside PyTorch's for one row; for more, Inductor's, compiled once for all lengths.

Where neither can be, it runs op by op.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental import _config as shape_config

from trilithon.lower.inputs import Input
from trilithon.lower.native.compared import compare_once
from trilithon.lower.native.fused.ahead import prepare_all
from trilithon.lower.native.fused.fuse_prompt import fuse_prompt
from trilithon.lower.native.fused.operations import CannotFuse
from trilithon.lower.native.gated import gate_products
from trilithon.lower.native.hopper import LEAST_TOKENS
from trilithon.lower.native.layers import in_layers
from trilithon.lower.native.lower import compiled, is_lowered_site
from trilithon.lower.native.step import check_equal
from trilithon.lower.native.writes import write_tokens
from trilithon.rewrite.unlift import device_of
from trilithon.stages import stage

TRIED_TOKENS, TRIED_PADDING = LEAST_TOKENS + 33, 5  # of the prompt on which both forms are compared
LEAST_WORDS = 2  # that any vocabulary has
log = logging.getLogger(__name__)


class Prompt:
    """A prompt of any length, over an empty cache.

    What has no generated kernels is compiled at the first call, each kind of layer once for a single row and once for several.
    Where Dynamo or Inductor refuses, it runs op by op from then on, and a warning says why. A refusal may come when layers have
    written to their caches: the call op by op writes the same again.

    Attributes:
        plain: lowered; takes `(tokens, start, counts, *caches)`.
        one_row: of generated kernels; None where they cannot make it.
        note: for the report.
    """

    def __init__(self, plain: GraphModule, one_row: GraphModule | None = None, refused: str = "") -> None:
        self.plain, self.one_row = plain, one_row
        self._start = "prefill:"
        if one_row is not None:
            kernels = len(one_row.graph.find_nodes(op="call_module"))
            self._start = f"prefill: {kernels} generated kernels beside products and attention for one row; for more"
        self._end = f"; no generated kernels: {refused}" if refused else ""
        self.note = self._told("to be compiled by Inductor at its first call, once for all lengths")

    @cached_property
    def compiled(self) -> Callable[..., Any] | None:
        """None where it cannot be."""
        return in_layers(self.plain, is_lowered_site, _compiled, _is_write)

    def _told(self, how: str) -> str:
        return f"{self._start} {how}{self._end}"

    def __call__(self, tokens: Tensor, *rest: Tensor) -> Any:
        if self.one_row is not None and tokens.shape[0] == 1:
            return self.one_row(tokens, *rest)
        if self.compiled is None:
            return self.plain(tokens, *rest)
        try:
            with shape_config.patch(use_duck_shape=False):  # type: ignore[attr-defined] # equal sizes may differ in the next call
                made = self.compiled(_of_any_length(tokens), *_of_any_rows(rest))
        except _refusals() as error:
            self.compiled = None
            self.note = self._told(f"runs op by op, since Inductor cannot compile it: {_reason(error)}")
            log.warning("%s", self.note)
            return self.plain(tokens, *rest)
        self.note = self._told("compiled by Inductor, once for all lengths")
        return made


def make_prompt(gm: GraphModule, inputs: tuple[Input, ...]) -> Prompt:
    """A prompt for a GPU.

    Args:
        gm: lowered, with `separate_writes`; it is changed.
        inputs: what it takes.
    """
    gate_products(gm)
    try:
        one_row = fuse_prompt(gm, inputs)
        with stage("verify"):
            compare_once(_compare, gm, one_row, inputs)
    except CannotFuse as refusal:
        log.info("%s", refusal)
        return Prompt(gm, None, refusal.why + (f" at {refusal.where}" if refusal.where else ""))
    except Exception as error:  # wrong ones; and Triton's errors have no common class
        refused = f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no message')}"
        log.warning("generated kernels of prompts cannot be used here: %s", refused)
        return Prompt(gm, None, refused)
    return Prompt(gm, one_row)


@torch.no_grad()
def _compare(plain: GraphModule, fused: GraphModule, inputs: tuple[Input, ...]) -> None:
    """Run both on a random prompt with padding, long enough for all that only long ones use, and on a single token.

    Raises:
        VerificationFailed: they disagree.
    """
    device, most = device_of(plain), inputs[0].axes[1].high
    generator = torch.Generator(device).manual_seed(0)
    slots = [min(x.axes[2].high, TRIED_TOKENS) for x in inputs[3:]]
    for length in dict.fromkeys((min(most, TRIED_TOKENS), 1)):
        real = max(1, length - TRIED_PADDING)
        tokens = torch.randint(LEAST_WORDS, (1, length), generator=generator, device=device).to(inputs[0].dtype)
        start, counts = (torch.full((1,), n, dtype=torch.int64, device=device) for n in (0, real))
        found = []
        for module in (plain, fused):
            caches = [
                torch.zeros((1, x.axes[1].high, t, x.axes[3].high), dtype=x.dtype, device=device)
                for x, t in zip(inputs[3:], slots, strict=True)
            ]
            if module is fused:
                prepare_all(fused, [tokens, start, counts, *caches])
            found.append([module(tokens, start, counts, *caches), *caches])
        expected, made = found
        check_equal(expected, made, f"a prompt of {real} tokens")


def _refusals() -> tuple[type[Exception], ...]:
    """Found when something failed: who compiles nothing does not wait for Dynamo and SymPy to be imported."""
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

    exc = torch._dynamo.exc
    return exc.TorchDynamoException, exc.FailOnRecompileLimitHit, ConstraintViolationError, GuardOnDataDependentSymNode


def _compiled(part: GraphModule) -> nn.Module:
    return compiled(part, dynamic=True)


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
