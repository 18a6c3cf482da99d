"""The oracle against torch's SDPA in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trilithon.spec.masks import Causal, Full, Mask, Padding, SlidingWindow
from trilithon.spec.reference import allowed_keys, reference_attention

CLOSE = 1e-12  # float64 sums of at most 16 products of numbers of size 1


def operands(b: int = 2, h: int = 4, g: int = 4, s: int = 5, t: int = 7, d: int = 8, e: int = 6) -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(shape, generator=make, dtype=torch.float64) for shape in ((b, h, s, d), (b, g, t, d), (b, g, t, e))
    )


def reference(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float | None = None) -> Tensor:
    return reference_attention(q, k, v, allowed, scale or 1 / math.sqrt(q.shape[-1]), torch.float64)


@pytest.mark.parametrize("g", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_agrees_with_sdpa(g: int, scale: float | None) -> None:
    q, k, v = operands(g=g)
    allowed = torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.6
    allowed[..., 0] = True
    want = scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=True)
    assert (reference(q, k, v, allowed, scale) - want).abs().max() < CLOSE


@pytest.mark.parametrize(("s", "t"), [(5, 5), (3, 7), (7, 3)])
def test_causal_is_torchs_upper_left(s: int, t: int) -> None:
    q, k, v = operands(s=s, t=t)
    allowed = allowed_keys(Causal(), s, t, q_start=None, key_mask=None, device=q.device)
    want = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (reference(q, k, v, allowed) - want).abs().max() < CLOSE


def test_a_row_without_keys_is_zero() -> None:
    q, k, v = operands()
    allowed = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    allowed[1, :, 3] = False
    got = reference(q, k, v, allowed)
    assert bool((got[1, :, 3] == 0).all())
    assert not bool(got.isnan().any())
    whole = reference(q, k, v, torch.ones_like(allowed))
    assert torch.equal(got[0], whole[0])


def test_dtype_of_the_result_is_the_querys() -> None:
    q, k, v = (x.to(torch.bfloat16) for x in operands())
    allowed = torch.ones(1, 1, 5, 7, dtype=torch.bool)
    assert reference_attention(q, k, v, allowed, 0.5).dtype == torch.bfloat16


@pytest.mark.parametrize("mask", [Full(), Causal(), SlidingWindow(3), Causal("lower_right")], ids=str)
def test_allowed_keys_is_materialize(mask: Mask) -> None:
    got = allowed_keys(mask, 4, 6, q_start=None, key_mask=None, device=torch.device("cpu"))
    assert torch.equal(got.expand(1, 1, 4, 6), mask.materialize(1, 1, 4, 6))


def test_start_moves_queries_row_by_row() -> None:
    whole = (SlidingWindow(3) & Causal()).materialize(1, 1, 8, 8)[0, 0]
    start = torch.tensor([2, 5])
    got = allowed_keys(SlidingWindow(3), 3, 8, q_start=start, key_mask=None, device=start.device)
    assert torch.equal(got[0, 0], whole[2:5]) and torch.equal(got[1, 0], whole[5:8])


def test_padding_reads_the_key_mask_whatever_its_table() -> None:
    keys = torch.tensor([[True, False, True], [False, False, True]])
    got = allowed_keys(Causal() & Padding("slots", "bool"), 3, 3, q_start=None, key_mask=keys, device=keys.device)
    want = Causal().materialize(2, 1, 3, 3) & keys[:, None, None, :]
    assert torch.equal(got, want)
