"""The table of masks: each row is torch code that makes a mask, and what it must be proved to be.

A row's function gets `q [s 1]` and `k [1 t]` (token indices, int64) and the tables by name, and returns a bool
or additive mask that broadcasts to `[b h s t]`. Adding a test is adding a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import scaled_dot_product_attention

from trilithon.capture.export import Captured, capture
from trilithon.spec import term as t
from trilithon.spec.masks import (
    B,
    CacheLength,
    Causal,
    Chunked,
    Documents,
    Full,
    LocalWindow,
    Mask,
    Or,
    Padding,
    PrefixLM,
    Q,
    SlidingWindow,
)

LOWEST = torch.finfo(torch.float32).min
MaskFn = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
INT, BOOL = torch.int64, torch.bool


@dataclass(frozen=True)
class Case:
    """`make` builds the mask; `expected` is its name, or None where no name may be proved."""

    make: MaskFn
    expected: Mask | type[Documents] | None
    tables: dict[str, torch.dtype] = field(default_factory=dict)
    square: bool = True
    guard: str | None = None
    heads: int = 2


def additive(allowed: Tensor, low: float) -> Tensor:
    return torch.where(allowed, 0.0, low)


def packed(q: Tensor, k: Tensor, x: dict[str, Tensor]) -> Tensor:
    """What transformers does with explicit position_ids: a new document wherever positions do not go on by one."""
    positions = x["position_ids"]
    document = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    same = document[:, None, :, None] == document[:, None, None, :]
    return same & (positions[:, None, None, :] <= positions[:, None, :, None])


def tril(q: Tensor, k: Tensor, x: dict[str, Tensor]) -> Tensor:
    return torch.tril(torch.ones(q.shape[0], k.shape[1], dtype=torch.bool))


def keys(x: dict[str, Tensor], name: str = "attention_mask") -> Tensor:
    return x[name][:, None, None, :].to(torch.bool)


PROVED = {
    "full": Case(lambda q, k, x: (k >= 0) & (q >= 0), Full()),
    "causal": Case(lambda q, k, x: k <= q, Causal()),
    "causal_rectangular": Case(lambda q, k, x: k <= q, Causal(), square=False),
    "causal_negated": Case(lambda q, k, x: ~(k > q), Causal()),
    "causal_shifted_both": Case(lambda q, k, x: k + 7 < q + 8, Causal()),
    "causal_tril": Case(tril, Causal()),
    "causal_triu_inf": Case(lambda q, k, x: torch.triu(torch.full((q.shape[0], k.shape[1]), -torch.inf), diagonal=1), Causal()),
    "causal_finfo_min": Case(lambda q, k, x: additive(k <= q, LOWEST), Causal()),
    "causal_inf": Case(lambda q, k, x: additive(k <= q, -torch.inf), Causal()),
    "causal_masked_fill": Case(lambda q, k, x: torch.zeros(q.shape[0], k.shape[1]).masked_fill(k > q, -torch.inf), Causal()),
    "causal_cumsum": Case(lambda q, k, x: torch.ones_like(k).cumsum(-1) <= torch.ones_like(q).cumsum(0), Causal()),
    "lower_right": Case(lambda q, k, x: k <= q + (k.shape[1] - q.shape[0]), Causal("lower_right"), square=False),
    "window_4": Case(lambda q, k, x: (k <= q) & (k > q - 4), SlidingWindow(4)),
    "window_4_by_distance": Case(lambda q, k, x: (q - k >= 0) & (q - k < 4), SlidingWindow(4)),
    "window_1": Case(lambda q, k, x: k == q, SlidingWindow(1)),
    "window_1000": Case(lambda q, k, x: additive((k <= q) & (k > q - 1000), -torch.inf), SlidingWindow(1000)),
    "window_lower_right": Case(
        lambda q, k, x: (k <= q + k.shape[1] - q.shape[0]) & (k > q + k.shape[1] - q.shape[0] - 3),
        SlidingWindow(3, "lower_right"),
        square=False,
    ),
    "padding_int": Case(lambda q, k, x: keys(x), Padding("attention_mask"), {"attention_mask": INT}),
    "padding_bool": Case(lambda q, k, x: keys(x), Padding("attention_mask", "bool"), {"attention_mask": BOOL}),
    "padding_ne": Case(
        lambda q, k, x: x["attention_mask"][:, None, None, :] != 0, Padding("attention_mask"), {"attention_mask": INT}
    ),
    "padding_inf": Case(lambda q, k, x: additive(keys(x), -torch.inf), Padding("attention_mask"), {"attention_mask": INT}),
    "padding_finfo_min": Case(
        lambda q, k, x: (1.0 - keys(x).float()) * LOWEST, Padding("attention_mask"), {"attention_mask": INT}, guard="nonempty"
    ),
    "causal_padding_finfo_min": Case(
        lambda q, k, x: additive((k <= q) & keys(x), LOWEST),
        Causal() & Padding("attention_mask"),
        {"attention_mask": INT},
        guard="right_padded",
    ),
    "local_window": Case(lambda q, k, x: (q - k).abs() <= 3, LocalWindow(3, 3)),
    "chunked": Case(lambda q, k, x: (q // 4 == k // 4) & (k <= q), Causal() & Chunked(4)),
    "chunked_both_ways": Case(lambda q, k, x: q // 4 == k // 4, Chunked(4)),
    "chunked_by_remainder": Case(lambda q, k, x: (k >= q - q % 4) & (k <= q), Causal() & Chunked(4)),
    "prefix_lm": Case(lambda q, k, x: (k <= q) | (k < 3), PrefixLM(t.integer(3))),
    "prefix_lm_of_row": Case(
        lambda q, k, x: (k <= q) | (k < x["segments"][:, :1, None, None]),
        PrefixLM(t.read("segments", (B, t.ZERO), "int")),
        {"segments": INT},
    ),
    "cache_length": Case(
        lambda q, k, x: k <= x["position_ids"][:, None, : q.shape[0], None],
        CacheLength(t.read("position_ids", (B, Q), "int")),
        {"position_ids": INT},
    ),
    "cache_length_window": Case(
        lambda q, k, x: (k <= (own := x["position_ids"][:, None, : q.shape[0], None])) & (k > own - 4),
        CacheLength(t.read("position_ids", (B, Q), "int"), 4),
        {"position_ids": INT},
        guard="bounded",
    ),
    "causal_or_padding": Case(
        lambda q, k, x: (k <= q) | keys(x), Or((Causal(), Padding("attention_mask"))), {"attention_mask": INT}
    ),
    "causal_padding": Case(lambda q, k, x: (k <= q) & keys(x), Causal() & Padding("attention_mask"), {"attention_mask": INT}),
    "window_padding": Case(
        lambda q, k, x: (k <= q) & (k > q - 5) & keys(x), SlidingWindow(5) & Padding("attention_mask"), {"attention_mask": INT}
    ),
    "documents": Case(
        lambda q, k, x: x["segments"][:, None, :, None] == x["segments"][:, None, None, :], Documents, {"segments": INT}
    ),
    "query_padding": Case(
        lambda q, k, x: (k <= q) & x["attention_mask"][:, None, :, None].to(torch.bool),
        Causal(),
        {"attention_mask": INT},
        guard="all_ones",
    ),
    "packed_positions": Case(packed, Causal(), {"position_ids": INT}, guard="consecutive"),
}

# None of these may ever be called causal (or anything else it is not).
NEVER = {
    "one_more": Case(lambda q, k, x: k <= q + 1, None),
    "strict": Case(lambda q, k, x: k < q, None),
    "swapped": Case(lambda q, k, x: q <= k, None),
    "lower_right_off_by_one": Case(lambda q, k, x: k <= q + (k.shape[1] - q.shape[0]) + 1, None, square=False),
    "one_head_full": Case(lambda q, k, x: (k <= q) | (torch.arange(2)[:, None, None] == 1), None),
    "one_head_shifted": Case(lambda q, k, x: k <= q + (torch.arange(2)[:, None, None] == 1), None),
    "flipped_cell": Case(lambda q, k, x: (k <= q) & ~((q == 40) & (k == 3)), None),
    "opened_cell": Case(lambda q, k, x: (k <= q) | ((q == 3) & (k == 40)), None),
    "bends_late": Case(lambda q, k, x: k <= q + q // 50, None),
    "full_when_long": Case(lambda q, k, x: (k <= q) | (torch.full_like(k, k.shape[1]) > 100), None),
    "dilated": Case(lambda q, k, x: (k <= q) & ((q - k) % 3 == 0), None),
    "first_row_of_batch": Case(
        lambda q, k, x: (k <= q) | (torch.arange(x["attention_mask"].shape[0])[:, None, None, None] > 0),
        None,
        {"attention_mask": INT},
    ),
    "random_bias": Case(lambda q, k, x: x["bias"], None, {"bias": torch.float32}),
    "weak_drop": Case(lambda q, k, x: additive(k <= q, -1.0), None),
    "weak_drop_10000": Case(lambda q, k, x: additive(k <= q, -10000.0), None),
    "open_plus_one": Case(lambda q, k, x: torch.where(k <= q, 1.0, -torch.inf), None),
    "nan_cells": Case(lambda q, k, x: (1.0 - torch.tril(torch.ones(q.shape[0], k.shape[1]))) * -torch.inf, None),
    "int8_wraps": Case(lambda q, k, x: (q.to(torch.int8) - k.to(torch.int8)) >= 0, None),
    "bfloat16_collides": Case(lambda q, k, x: k.to(torch.bfloat16) <= q.to(torch.bfloat16), None),
    "strict_finfo_min": Case(lambda q, k, x: additive(k < q, LOWEST), None),
}


class Attend(nn.Module):
    """Attention whose mask a row of the table makes."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def mask(self, s: int, t: int, tables: dict[str, Tensor]) -> Tensor:
        return self.case.make(torch.arange(s)[:, None], torch.arange(t)[None, :], tables)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segments: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "segments": segments, "bias": bias}
        tables = {name: value for name, value in given.items() if value is not None}
        mask = self.mask(q.shape[2], k.shape[2], tables)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2]))


def table_shape(name: str, b: int, h: int, s: int, t: int) -> tuple[int, ...]:
    return (b, h, s, t) if name == "bias" else (b, t)


def inputs(case: Case, b: int, s: int, t: int) -> dict[str, Tensor]:
    """Random q, k, v, and ones for the tables: only sizes matter to export."""
    h, d = case.heads, 4
    tables = {name: torch.ones(table_shape(name, b, h, s, t), dtype=dtype) for name, dtype in case.tables.items()}
    return {"q": torch.randn(b, h, s, d), "k": torch.randn(b, h, t, d), "v": torch.randn(b, h, t, d), **tables}


def export_case(case: Case) -> Captured:
    """The row's module, exported with dynamic batch and lengths."""
    b, s, t = Dim("b", min=1, max=64), Dim("s", min=1, max=4096), Dim("t", min=1, max=4096)
    t = s if case.square else t
    shapes: dict[str, object] = {"q": {0: b, 2: s}, "k": {0: b, 2: t}, "v": {0: b, 2: t}}
    shapes.update({name: {0: b, 2: s, 3: t} if name == "bias" else {0: b, 1: t} for name in case.tables})
    module = Attend(case).eval()
    example = inputs(case, 2, 6, 6 if case.square else 9)
    return capture(module, example, shapes)
