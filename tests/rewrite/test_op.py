"""`trilithon::attention`: a lawful custom op, aligned by positions, with readable shape errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trilithon.errors import ShapeError
from trilithon.rewrite.op import ATTENTION, attention

CLOSE = 1e-12


def operands(b: int = 2, h: int = 4, g: int = 2, s: int = 6, t: int = 6, d: int = 8, e: int = 4) -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(shape, generator=make, dtype=torch.float64) for shape in ((b, h, s, d), (b, g, t, d), (b, g, t, e))
    )


CALLS: dict[str, tuple[Any, ...]] = {
    "causal": (*operands(), "causal", 0.3),
    "window": (*operands(s=3, t=9), "window(4)", 0.3),
    "padding": (*operands(), "causal & padding(m)", 0.3, None, torch.rand(2, 6) < 0.7),
    "start": (*operands(s=2), "causal", 0.3, torch.tensor(4)),
    "start_of_each_row": (*operands(s=2), "causal & padding(m)", 0.3, torch.tensor([4, 1]), torch.ones(2, 6, dtype=torch.bool)),
    "half": (*(x.to(torch.float16) for x in operands()), "full", 0.3),
}


@pytest.mark.parametrize("name", CALLS)
def test_is_a_lawful_custom_op(name: str) -> None:
    torch.library.opcheck(ATTENTION, CALLS[name], test_utils=("test_schema", "test_faketensor"))


def test_agrees_with_sdpa() -> None:
    q, k, v = operands()
    want = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    assert (attention(q, k, v, "causal", 0.3) - want).abs().max() < CLOSE


@pytest.mark.parametrize("mask", ["causal", "window(3)"])
def test_start_places_the_queries(mask: str) -> None:
    q, k, v = operands()
    whole = attention(q, k, v, mask, 0.3)
    for start in range(6):
        part = attention(q[:, :, start:], k, v, mask, 0.3, torch.tensor(start))
        assert (part - whole[:, :, start:]).abs().max() < CLOSE


def test_start_of_each_row() -> None:
    q, k, v = operands()
    whole = attention(q, k, v, "causal", 0.3)
    picked = torch.stack([q[0, :, 4:5], q[1, :, 1:2]])
    got = attention(picked, k, v, "causal", 0.3, torch.tensor([4, 1]))
    assert (got[0] - whole[0, :, 4:5]).abs().max() < CLOSE
    assert (got[1] - whole[1, :, 1:2]).abs().max() < CLOSE


def test_capacity_beyond_the_tokens_is_not_seen() -> None:
    """The key length of a static cache is a capacity: alignment must not depend on it."""
    q, k, v = operands()
    room = [torch.cat([x, torch.full_like(x, 1e6)], 2) for x in (k, v)]
    got = attention(q[:, :, 5:], room[0], room[1], "causal", 0.3, torch.tensor(5))
    assert (got - attention(q, k, v, "causal", 0.3)[:, :, 5:]).abs().max() < CLOSE


def test_key_mask_hides_keys() -> None:
    q, k, v = operands(b=1)
    keys = torch.tensor([[False, True, True, False, True, True]])
    got = attention(q, k, v, "padding(m)", 0.3, None, keys)
    seen = keys[0].nonzero().flatten()
    want = attention(q, k[:, :, seen], v[:, :, seen], "full", 0.3)
    assert (got - want).abs().max() < CLOSE
    none = attention(q, k, v, "padding(m)", 0.3, None, torch.zeros_like(keys))
    assert bool((none == 0).all())


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        (((4, 6, 8), (4, 6, 8), (4, 6, 8)), "q, k, v must have 4 axes, got [4, 6, 8], [4, 6, 8], [4, 6, 8]"),
        (
            ((2, 4, 6, 8), (1, 2, 6, 8), (2, 2, 6, 8)),
            "k must be [b g t d] with b=2 (from q), d=8 and g dividing 4, got [1, 2, 6, 8]",
        ),
        (
            ((2, 4, 6, 8), (2, 3, 6, 8), (2, 3, 6, 8)),
            "k must be [b g t d] with b=2 (from q), d=8 and g dividing 4, got [2, 3, 6, 8]",
        ),
        (
            ((2, 4, 6, 8), (2, 2, 6, 7), (2, 2, 6, 8)),
            "k must be [b g t d] with b=2 (from q), d=8 and g dividing 4, got [2, 2, 6, 7]",
        ),
        (((2, 4, 6, 8), (2, 2, 6, 8), (2, 1, 6, 8)), "v must be [b g t e] with b=2, g=2, t=6 (from k), got [2, 1, 6, 8]"),
        (((2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 5, 8)), "v must be [b g t e] with b=2, g=2, t=6 (from k), got [2, 2, 5, 8]"),
    ],
    ids=["rank", "batch", "heads", "width", "value_heads", "value_tokens"],
)
def test_shape_errors(shapes: tuple[tuple[int, ...], ...], text: str) -> None:
    q, k, v = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ShapeError) as caught:
        attention(q, k, v, "full", 1.0)
    assert str(caught.value) == text
