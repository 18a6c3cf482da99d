"""The canonical op has one key mask of shape [b t]: a proved mask that needs more stays as it was, and stays right."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import scaled_dot_product_attention

import trilithon


class TwoPaddings(nn.Module):
    """Keys must be allowed by two inputs."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, first: Tensor, second: Tensor) -> Tensor:
        mask = (first != 0)[:, None, None, :] & (second != 0)[:, None, None, :]
        return scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(-1, -1, q.shape[2], -1))


class LongPadding(nn.Module):
    """The padding input is longer than the keys."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> Tensor:
        mask = (first[:, : k.shape[2]] != 0)[:, None, None, :]
        return scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(-1, -1, q.shape[2], -1))


def given(*lengths: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    operands = {name: torch.randn(2, 2, 6, 4, generator=generator) for name in "qkv"}
    flags = {
        name: torch.randint(0, 2, (2, n), generator=generator) for name, n in zip(("first", "second"), lengths, strict=False)
    }
    return {**operands, **flags}


def check(module: nn.Module, example: dict[str, Tensor]) -> str:
    batch = Dim("b", min=1, max=8)
    program = torch.export.export(module.eval(), (), example, dynamic_shapes={name: {0: batch} for name in example})
    (site,) = trilithon.explain(program).sites
    assert site.verdict is trilithon.Verdict.PROVED
    want = module(**example)
    torch.testing.assert_close(trilithon.lower(program).module()(**example), want)
    torch.testing.assert_close(trilithon.compile(program)(**example), want)
    return site.runs_on


def test_two_paddings_are_both_kept() -> None:
    assert "one key mask" in check(TwoPaddings(), given(6, 6))


def test_a_longer_padding_is_kept() -> None:
    assert "[b t]" in check(LongPadding(), given(9))
