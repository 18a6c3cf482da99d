"""`trilithon::attention`: a lawful custom op, aligned by positions, with readable shape errors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trilithon.errors import InputError, ShapeError
from trilithon.rewrite.op import ATTENTION, attention
from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.bias_text import write_bias
from trilithon.spec.masks import H, K, Q, T

CLOSE = 1e-12


def operands(b: int = 2, h: int = 4, g: int = 2, s: int = 6, total: int = 6, d: int = 8, e: int = 4) -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(shape, generator=make, dtype=torch.float64) for shape in ((b, h, s, d), (b, g, total, d), (b, g, total, e))
    )


# table[clamp(k - q, -5, 5) + 5, h], and slope[h] * k
DISTANCE = t.maximum(t.minimum(K - Q, t.integer(5)), t.integer(-5)) + 5
RELATIVE = write_bias(t.read("table", (DISTANCE, H), "float"), ["table"])
ALIBI = write_bias(
    float_term.apply("mul", "float64", t.read("slope", (H,), "float"), float_term.to_float(K, "float64")), ["slope"]
)


CALLS: dict[str, tuple[Any, ...]] = {
    "causal": (*operands(), "causal", 0.3),
    "window": (*operands(s=3, total=9), "window(4)", 0.3),
    "padding": (*operands(), "causal & padding(m)", 0.3, None, torch.rand(2, 6) < 0.7),
    "start": (*operands(s=2), "causal", 0.3, torch.tensor(4)),
    "start_of_each_row": (*operands(s=2), "causal & padding(m)", 0.3, torch.tensor([4, 1]), torch.ones(2, 6, dtype=torch.bool)),
    "positions_of_keys": (*operands(s=2), "window(3)", 0.3, torch.tensor([4, 7]), None, torch.tensor([[6, 1, 2, 3, 4, 5]] * 2)),
    "bias": (*operands(), "causal", 0.3, None, None, None, RELATIVE, [torch.randn(11, 4)]),
    "softcap": (*operands(), "causal", 0.3, None, None, None, "", None, 5.0),
    "sinks": (*operands(), "causal", 0.3, None, None, None, "", None, 0.0, torch.randn(4)),
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


def eager(scores: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Softmax and second product of scores `[b h s t]`, -inf where a key is forbidden; v `[b g t e]`."""
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = torch.softmax(scores, -1)[..., : v.shape[2]]
    return weights @ v.repeat_interleave(scores.shape[1] // v.shape[1], 1)


def scores_of(q: Tensor, k: Tensor, softcap: float = 0.0) -> Tensor:
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3) * 0.3
    return softcap * torch.tanh(scores / softcap) if softcap else scores


TRIANGLE = torch.ones(6, 6, dtype=torch.bool).tril()


def test_a_relative_bias_reads_its_table() -> None:
    q, k, v = operands()
    table = torch.randn(11, 4, dtype=torch.float64)
    index = torch.arange(6)
    added = table[(index[None, :] - index[:, None]).clamp(-5, 5) + 5].permute(2, 0, 1)
    want = eager((scores_of(q, k) + added).masked_fill(~TRIANGLE, -torch.inf), v)
    got = attention(q, k, v, "causal", 0.3, bias=RELATIVE, tables=[table])
    assert (got - want).abs().max() < CLOSE
    assert (got - attention(q, k, v, "causal", 0.3, bias=RELATIVE, tables=[table.flip(0)])).abs().max() > 1e-3


def test_a_softcap_comes_before_the_bias() -> None:
    q, k, v = operands()
    slope = torch.tensor([1.0, 0.5, 0.25, 0.125], dtype=torch.float64)
    added = slope[:, None, None] * torch.arange(6)
    want = eager((scores_of(q, k, 0.7) + added).masked_fill(~TRIANGLE, -torch.inf), v)
    got = attention(q, k, v, "causal", 0.3, bias=ALIBI, tables=[slope], softcap=0.7)
    assert (got - want).abs().max() < CLOSE
    inside = 0.7 * torch.tanh((scores_of(q, k) + added) / 0.7)
    assert (got - eager(inside.masked_fill(~TRIANGLE, -torch.inf), v)).abs().max() > 1e-3


def test_sinks_take_weight_away() -> None:
    q, k, v = operands()
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    want = eager(scores_of(q, k).masked_fill(~TRIANGLE, -torch.inf), v, sinks)
    got = attention(q, k, v, "causal", 0.3, sinks=sinks)
    assert (got - want).abs().max() < CLOSE
    assert (got - attention(q, k, v, "causal", 0.3)).abs().max() > 1e-3
    hidden = torch.zeros(2, 6, dtype=torch.bool)
    assert bool((attention(q, k, v, "padding(m)", 0.3, None, hidden, sinks=sinks) == 0).all())


@pytest.mark.parametrize("mask", ["causal", "window(3)", "chunked(4)"])
def test_keys_stand_where_their_positions_say(mask: str) -> None:
    """A ring: keys in any order, some places empty."""
    q, k, v = operands()
    slope = torch.tensor([1.0, 0.5, 0.25, 0.125], dtype=torch.float64)
    given = {"bias": ALIBI, "tables": [slope]}
    whole = attention(q, k, v, mask, 0.3, **given)
    order = torch.tensor([4, 5, 0, 1, 2, 3])
    ring = [torch.cat([x[:, :, order], torch.full_like(x[:, :, :2], 1e6)], 2) for x in (k, v)]
    positions = torch.cat([order, torch.tensor([-1, -3])]).expand(2, -1)
    start = torch.tensor([4, 4])
    got = attention(q[:, :, 4:], *ring, mask, 0.3, start, None, positions, **given)
    assert (got - whole[:, :, 4:]).abs().max() < CLOSE
    unordered = attention(q[:, :, 4:], *ring, mask, 0.3, start, None, None, **given)
    assert (got - unordered).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"key_mask": torch.ones(2, 5, dtype=torch.bool)}, "key_mask must be [b t] with b=2, t=6 (from k), got [2, 5]"),
        ({"k_positions": torch.zeros(6, dtype=torch.int64)}, "k_positions must be [b t] with b=2, t=6 (from k), got [6]"),
        ({"q_start": torch.zeros(3, dtype=torch.int64)}, "q_start must be [] or [b] with b=2 (from k), got [3]"),
        ({"sinks": torch.zeros(1, 4)}, "sinks must be [h] with h=4 (from q), got [1, 4]"),
    ],
    ids=["key_mask", "k_positions", "q_start", "sinks"],
)
def test_shape_errors_of_the_rest(given: dict[str, Any], text: str) -> None:
    q, k, v = operands()
    with pytest.raises(ShapeError) as caught:
        attention(q, k, v, "full", 1.0, **given)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"softcap": -1.0}, "softcap must be positive, or 0 for none, got -1"),
        ({"bias": "k - q"}, "not the text of a term"),
        ({"bias": write_bias(K, [])}, "its value is int, not float"),
        ({"bias": write_bias(float_term.to_float(K - T, "float32"), [])}, "it depends on t, not on h, q and k alone"),
        ({"bias": ALIBI}, "it reads table 0 of 0"),
    ],
    ids=["softcap", "no_term", "no_float", "length", "no_table"],
)
def test_what_means_nothing_is_refused(given: dict[str, Any], text: str) -> None:
    q, k, v = operands()
    with pytest.raises(InputError, match=re.escape(text)):
        attention(q, k, v, "full", 1.0, **given)


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
