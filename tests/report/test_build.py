"""What a report takes from the program: heads before repetition, and the axes that size symbols stand for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import trilithon
from trilithon.caching import cache_notes
from trilithon.report.groups import groups, pictured
from trilithon.report.picture import Drawing, draw
from trilithon.spec.masks import Causal, Formula


class Grouped(nn.Module):
    """Four query heads on two key/value heads; `skew` moves the diagonal, so that no named mask fits."""

    def __init__(self, skew: bool) -> None:
        super().__init__()
        self.skew = skew

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = x.view(b, s, 4, 2).transpose(1, 2)
        k = x[..., :4].view(b, s, 2, 2).transpose(1, 2)[:, :, None].expand(b, 2, 2, s, 2).reshape(b, 4, s, 2)
        i = torch.arange(s)
        keep = i[None, :] <= i[:, None]
        if self.skew:
            keep = keep | (i[None, :] * 3 == i[:, None] * 2 + 7)
        return nn.functional.scaled_dot_product_attention(q, k, k, keep)


@pytest.mark.parametrize(("skew", "heads"), [(False, (4, 2)), (True, (4, None))], ids=["rewritten", "kept"])
def test_key_heads_are_known_where_a_site_was_rewritten(skew: bool, heads: tuple[int, int | None]) -> None:
    shapes = {"x": {0: Dim("b", min=1, max=8), 1: Dim("s", min=1, max=64)}}
    report = trilithon.explain(Grouped(skew).eval(), {"x": torch.randn(2, 5, 8)}, shapes)
    assert [site.heads for site in report.sites] == [heads]
    assert (report.passes["fuse-attention"] == 1) is not skew
    assert sorted(report.sizes.values()) == ["x axis 0", "x axis 1"]


def test_a_formula_comes_with_what_tells_it_from_the_nearest_name() -> None:
    shapes = {"x": {0: Dim("b", min=1, max=8), 1: Dim("s", min=1, max=64)}}
    report = trilithon.explain(Grouped(skew=True).eval(), {"x": torch.randn(2, 5, 8)}, shapes)
    (site,) = report.sites
    assert isinstance(site.mask, Formula) and site.nearest == Causal()
    assert "not causal: at " in site.reason and {"b", "h", "q", "k", "s", "t"} == set(site.witness)
    assert site.validated_cells
    (group,) = groups(report)
    ((_, _, subject),) = pictured(group)
    (drawing,) = draw(subject)
    assert isinstance(drawing, Drawing)
    assert drawing.witness == (site.witness["q"], site.witness["k"])


@pytest.mark.parametrize(("batch", "words"), [(1, "x 1 row,"), (2, "x 2 rows,")])
def test_rows_of_the_cache_are_counted(batch: int, words: str) -> None:
    (note,) = cache_notes(SimpleNamespace(cache_tokens=32, max_batch=batch, cache_bytes=1e6))  # type: ignore[arg-type]
    assert words in note
