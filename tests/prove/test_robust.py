"""Odd programs get a verdict or a refusal, never an exception of another kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import scaled_dot_product_attention

import trilithon
from batch import Batch
from trilithon.capture.export import capture
from trilithon.prove.program import examine_program
from trilithon.prove.prove import claim, examine
from trilithon.prove.verdict import Verdict
from trilithon.spec.masks import Padding

S = Dim("s", min=1, max=64)
SHAPES = {name: {2: S} for name in "qkv"}


def qkv(tokens: int = 6) -> dict[str, Tensor]:
    return {name: torch.randn(2, 2, tokens, 4) for name in "qkv"}


def counted_below_length(q: Tensor, k: Tensor, x: dict[str, Tensor]) -> Tensor:
    length = torch.ones_like(k).sum(-1, keepdim=True)
    count = ((k >= 0) & (k < length)).long().cumsum(-1)
    return count <= count.t()


def visible_below_length(q: Tensor, k: Tensor, x: dict[str, Tensor]) -> Tensor:
    length = torch.ones_like(k).sum(-1, keepdim=True)
    return ((k < length) & x["visible"]).long().cumsum(-1)[:, None, None] <= q


def test_a_sum_of_sums_is_examined() -> None:
    batch = Batch((counted_below_length,))
    assert examine(batch.meaning(0), batch.ranges).proof.verdict is not Verdict.VACUOUS


def test_a_sum_over_data_of_sums_is_examined() -> None:
    batch = Batch((visible_below_length,))
    assert examine(batch.meaning(0), batch.ranges).proof.verdict is not Verdict.VACUOUS


def test_a_claim_may_read_a_table_that_the_mask_does_not() -> None:
    batch = Batch((lambda q, k, x: k <= q,))
    proof = claim(batch.meaning(0), Padding("attention_mask"), batch.ranges)
    assert proof.verdict is Verdict.UNKNOWN
    assert proof.reason == "the site's mask does not read attention_mask"


class FiveAxes(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        return scaled_dot_product_attention(q, k, v, attn_mask=(i <= i[:, None])[None, None, None])


def test_a_mask_of_five_axes_is_refused() -> None:
    (found,) = examine_program(capture(FiveAxes().eval(), qkv(), SHAPES).program)
    assert found.refusal is not None


class KeepsByParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.Parameter(torch.ones(2, 64, dtype=torch.int64), requires_grad=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        kept = self.kept[:, : q.shape[2]][:, None, :, None] != 0
        return scaled_dot_product_attention(q, k, v, attn_mask=(i <= i[:, None]) & kept)


def test_a_parameter_that_masks_queries_has_no_guard() -> None:
    model, inputs = KeepsByParameter().eval(), qkv()
    compiled = trilithon.compile(model, inputs, dynamic_shapes=SHAPES)
    torch.testing.assert_close(compiled(**inputs), model(**inputs))
