"""What runs a decode step on a GPU: generated kernels for one row, Inductor's for several."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from trilithon.capture.collectives import MEETINGS, alone, any_of_ranks, group_of
from trilithon.errors import VerificationFailed
from trilithon.lower.inputs import Input
from trilithon.lower.native.argmax import spread_argmax
from trilithon.lower.native.compared import compare_once
from trilithon.lower.native.fused.fuse import fuse_step
from trilithon.lower.native.fused.launch import TUNED_SLOTS, Attention
from trilithon.lower.native.fused.meet import CannotMeet, meet_in_memory
from trilithon.lower.native.fused.operations import CannotFuse
from trilithon.lower.native.fused.tune import tune
from trilithon.lower.native.lower import compiled
from trilithon.lower.native.one_product import one_product
from trilithon.rewrite.unlift import device_of
from trilithon.stages import stage

AGREED = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-4}  # most relative error of logits, one against other
TRIED_SLOTS = 300  # of the caches on which both forms of a step are compared
log = logging.getLogger(__name__)


class NativeStep:
    """A decode step.

    Attributes:
        general: takes any number of rows.
        one_row: of generated kernels; None where they cannot make the step.
        note: for the report.
        tuned: settings of the kernels, by their key.
    """

    def __init__(
        self,
        general: Callable[..., Any],
        one_row: GraphModule | None,
        note: str,
        tuned: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        self.general, self.one_row, self.note, self.tuned = general, one_row, note, tuned or {}

    def __call__(self, tokens: Tensor, *rest: Tensor) -> Any:
        chosen = self.general if self.one_row is None or tokens.shape[0] > 1 else self.one_row
        return chosen(tokens, *rest)


def make_step(gm: GraphModule, inputs: tuple[Input, ...]) -> NativeStep:
    """A step for a GPU. Ranks that share the model come to steps of one kind, and measure and compare each for itself.

    Args:
        gm: lowered; it is changed.
        inputs: what it takes.
    """
    refused, chosen = "", dict[str, dict[str, int]]()
    fused: GraphModule | None = None
    try:
        fused = fuse_step(gm, inputs)
        with stage("tune"):
            tune(alone(fused), _tried(inputs, gm, TUNED_SLOTS), chosen=chosen)
        with stage("verify"):
            compare_once(_compare, alone(gm), alone(fused), inputs)
    except CannotFuse as refusal:
        log.info("%s", refusal)
        refused = refusal.why + (f" at {refusal.where}" if refusal.where else "")
    except Exception as error:  # wrong ones; and Triton's errors have no common class, e.g. of a GPU that lacks a type
        refused = f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no message')}"
        log.warning("generated kernels cannot be used here: %s", refused)
    refused = _of_all_ranks(refused, gm)
    if refused:
        fused = None
    how = ""
    if fused is not None:
        kernels = sum(
            getattr(fused.get_submodule(str(n.target)), "launches", 1) for n in fused.graph.find_nodes(op="call_module")
        )
        fused, gm, how = _meeting(fused, gm, inputs)
    spread_argmax(gm)
    general = compiled_step(one_product(gm), inputs)  # those of one row read several matrices as they are
    if fused is None:
        return NativeStep(general, None, f"decode: compiled by Inductor; no generated kernels: {refused}")
    note = f"decode: {kernels} generated kernels a token for one row; for more, compiled by Inductor{how}"
    return NativeStep(general, fused, note, chosen)


def _meeting(fused: GraphModule, gm: GraphModule, inputs: tuple[Input, ...]) -> tuple[GraphModule, GraphModule, str]:
    """A step and what it was made of, with the fastest way to meet that all ranks have, and which that is."""
    if group_of(gm.graph) is None:
        return fused, gm, ""
    one, several, refused = fused, gm, ""
    try:
        one, several = meet_in_memory(fused, gm, inputs[0].axes[0].high)
    except CannotMeet as refusal:
        refused = str(refusal)
    refused = _of_all_ranks(refused, gm)
    for before, made in ((fused, one), (gm, several)):
        if not refused and made is not before:
            refused = _of_all_ranks(_differs(before, made, inputs), gm)
    text = f"; ranks meet {sum(str(n.target) in MEETINGS for n in fused.graph.nodes)} times"
    if refused:
        log.info("ranks do not meet in each other's memory: %s", refused)
        return fused, gm, f"{text} by torch.distributed ({refused})"
    return one, several, f"{text} in each other's memory{', with several rows by torch.distributed' if several is gm else ''}"


@torch.no_grad()
def _differs(before: GraphModule, made: GraphModule, inputs: tuple[Input, ...]) -> str:
    """Why two forms of a step that ranks run together are not the same; a rank that finds so has run all that others run."""
    tokens, last, counts, *caches = _tried(inputs, before, TRIED_SLOTS)
    expected, *found = ([x.clone() for x in caches] for _ in range(3))
    want = _results(before, [tokens, last, counts, *expected])
    got = [_results(made, [tokens, last, counts, *held]) for held in found]  # the second finds what the first left behind
    try:
        for each in got:
            check_equal(want, each, f"{int(last)} tokens in the cache")
    except VerificationFailed as error:
        return error.what
    return ""


def _of_all_ranks(refused: str, gm: GraphModule) -> str:
    """Why generated kernels are not used, on this rank or on another."""
    group = group_of(gm.graph)
    if group is None:
        return refused
    (found,) = any_of_ranks([bool(refused)], group, device_of(gm))
    return refused or ("another rank cannot use them" if found else "")


def compiled_step(gm: GraphModule, inputs: tuple[Input, ...]) -> Callable[..., Any]:
    """A step compiled by Inductor, once for each number of rows; caches may be of any size."""
    free = [(place, i) for place, x in enumerate(inputs) for i, axis in enumerate(x.axes) if i and not axis.is_fixed]
    return _Marked(gm, tuple(free))


@dataclass
class _Marked:
    """A module compiled for the sizes that it is called with, save `free` ones, which may be any.

    Attributes:
        free: which input, and which of its axes.
    """

    plain: GraphModule
    free: tuple[tuple[int, int], ...]

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        """Made at the first call: Dynamo takes seconds to import."""
        return compiled(self.plain, dynamic=False)

    def __call__(self, *inputs: Tensor) -> Any:
        for place, axis in self.free:  # a mark is of a tensor object, and views of a cache are new in each call
            torch._dynamo.maybe_mark_dynamic(inputs[place], axis)
        return self.compiled(*inputs)


@torch.no_grad()
def _compare(plain: GraphModule, fused: GraphModule, inputs: tuple[Input, ...]) -> None:
    """Run both on random caches, short and full.

    Raises:
        VerificationFailed: they disagree.
    """
    tokens, last, counts, *caches = _tried(inputs, plain, TRIED_SLOTS)
    slots = int(last) + 1
    for start in (0, 1, slots // 2, slots - 1):
        held = [x.clone() for x in caches]
        expected = _results(plain, [tokens, torch.full_like(last, start), counts, *held])
        for parts in (None, 2):  # few parts of the keys hold several tiles
            held = [x.clone() for x in caches]
            with _in_parts(fused, parts):
                found = _results(fused, [tokens, torch.full_like(last, start), counts, *held])
            check_equal(expected, found, f"{start} tokens in the cache")


def _results(module: GraphModule, inputs: list[Tensor]) -> list[Tensor]:
    """The logits, and of each cache what holds tokens afterwards."""
    logits, _ = module(*inputs)
    return [logits, *(x[:, :, : int(inputs[1]) + 1] for x in inputs[3:])]


def check_equal(expected: list[Tensor], found: list[Tensor], given: str) -> None:
    """Logits and caches of two forms of a program.

    Args:
        given: with what they were made, for the error.

    Raises:
        VerificationFailed: they disagree.
    """
    for want, got in zip(expected, found, strict=True):
        error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-9))
        if not error <= AGREED.get(want.dtype, 0.0):
            raise VerificationFailed(f"they disagree with what they are made of, off by {error:.1e}, with {given}")


@contextmanager
def _in_parts(fused: GraphModule, parts: int | None) -> Iterator[None]:
    """With so many parts of the keys in each attention; None = its own number."""
    sites = [x for x in fused.children() if isinstance(x, Attention)] if parts else []
    kept = [x.splits for x in sites]
    for x in sites:
        x.splits = parts or x.splits
    try:
        yield
    finally:
        for x, splits in zip(sites, kept, strict=True):
            x.splits = splits


def _tried(inputs: tuple[Input, ...], gm: GraphModule, most: int) -> list[Tensor]:
    """A token, the last that fits, and random caches of at most so many slots."""
    device = device_of(gm)
    generator = torch.Generator(device).manual_seed(0)
    shapes = [[1, *(axis.high for axis in x.axes[1:])] for x in inputs[3:]]
    slots = min([most, *(shape[2] for shape in shapes)])
    sizes = [[b, g, min(t, most), width] for b, g, t, width in shapes]
    caches = [torch.randn(s, generator=generator, device=device).to(x.dtype) for s, x in zip(sizes, inputs[3:], strict=True)]
    one = torch.ones(1, dtype=torch.int64, device=device)
    return [one[:, None], one * (slots - 1), one, *caches]
