"""What a lowered module takes: the data type of each input, and the sizes that each of its axes may have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from trilithon.rewrite.cache_shape import CacheShape
from trilithon.rewrite.split_context import CONTEXT

LARGEST = 1 << 31
USUAL_TOKENS = 2048  # the length to be fast at, where more are allowed


@dataclass(frozen=True)
class Axis:
    """Sizes that an axis of an input may have, and the one to be fast at."""

    low: int
    best: int
    high: int

    @property
    def is_fixed(self) -> bool:
        return self.low == self.high


@dataclass(frozen=True)
class Input:
    """One input of a lowered module."""

    name: str
    dtype: torch.dtype
    axes: tuple[Axis, ...]


def fixed(size: int) -> Axis:
    return Axis(size, size, size)


def tokens(high: int, low: int = 1) -> Axis:
    return Axis(low, max(low, min(high, USUAL_TOKENS)), high)


def rows(high: int, low: int = 1) -> Axis:
    return Axis(low, high, high)


def sequence_inputs(
    held: Mapping[str, Tensor], ranges: Mapping[str, tuple[int, int | None]], max_batch: int, max_tokens: int
) -> tuple[Input, ...]:
    """The inputs of a captured call.

    Args:
        held: fake tensors by name, in order, as `fake_inputs` gives them.
        ranges: size symbol -> least and greatest value.
        max_batch: most rows: sizes of first axes that export left dynamic.
        max_tokens: most entries along any other dynamic axis.
    """

    def axis(size: Any, place: int) -> Axis:
        if isinstance(size, int):
            return fixed(size)
        low, high = _bounds(size, ranges)
        if place == 0:
            return rows(max(low, min(high, max_batch)), low)
        return tokens(max(low, min(high, max_tokens)), low)

    return tuple(
        Input(name, value.dtype, tuple(axis(size, i) for i, size in enumerate(value.shape))) for name, value in held.items()
    )


def _bounds(size: torch.SymInt, ranges: Mapping[str, tuple[int, int | None]]) -> tuple[int, int]:
    """Least and greatest value of a size that export left dynamic."""
    if str(size) in ranges:
        low, most = ranges[str(size)]
        return max(1, low), LARGEST if most is None else most
    found = size.node.shape_env.bound_sympy(size.node.expr)
    return max(1, int(found.lower)), int(found.upper) if found.upper.is_Integer else LARGEST


def cached_inputs(
    gm: GraphModule,
    shapes: Iterable[CacheShape],
    cache_tokens: int,
    max_batch: int,
    most_tokens: int | None = None,
    context_tokens: int = LARGEST,
    first_tokens: int | None = None,
) -> tuple[Input, ...]:
    """The inputs of a module that `insert_cache` made.

    Args:
        gm: the module.
        shapes: one entry a site.
        cache_tokens: tokens a row that the cache is for.
        most_tokens: tokens that a call brings at most (1 for a step); None = as many as the cache is for.
        context_tokens: most entries along the axes of the context that export left dynamic, rows apart.
        first_tokens: tokens a row that a cache that grows is allocated for at first; None = it is allocated at once.
    """
    batch, (first, *others) = rows(max_batch), [n for n in gm.graph.nodes if n.op == "placeholder"]
    length = fixed(1) if most_tokens == 1 else tokens(most_tokens or cache_tokens)
    own = [Input(first.name, first.meta["val"].dtype, (batch, length))]
    own += [Input(name, torch.int64, (batch,)) for name in ("start", "counts")]
    for node in others:
        if node.name.startswith(CONTEXT):
            held = node.meta["val"]
            free = [tokens(context_tokens) if i else batch for i in range(held.dim())]
            sizes = [fixed(n) if isinstance(n, int) else axis for n, axis in zip(held.shape, free, strict=True)]
            own.append(Input(node.name, held.dtype, tuple(sizes)))
    caches = [
        Input(f"{kind}_{i}", dtype, (batch, fixed(heads), _slots(shape, cache_tokens, first_tokens), fixed(width)))
        for i, shape in enumerate(shapes)
        for kind, heads, width, dtype in shape.tensors
    ]
    return (*own, *caches)


def _slots(shape: CacheShape, cache_tokens: int, first_tokens: int | None) -> Axis:
    """A ring has its size from the start."""
    most = shape.slots(cache_tokens)
    least = most if first_tokens is None or shape.window is not None else shape.slots(first_tokens)
    return Axis(least, most, most)
