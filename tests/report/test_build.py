"""What a report takes from the program: heads before repetition, and the axes that size symbols stand for."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import trilithon
from trilithon.report.groups import groups, pictured
from trilithon.report.picture import Drawing, draw
from trilithon.runtime.cache_notes import cache_notes
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


class Scores(nn.Module):
    """Causal attention written out; `change` makes of the scores, key indices and the input what the softmax sees."""

    def __init__(self, change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, i = x.view(b, s, 2, 4).transpose(1, 2), torch.arange(s)
        scores = self.change(q @ q.transpose(2, 3), i, x)
        return torch.softmax(scores + torch.where(i[None, :] <= i[:, None], 0.0, -torch.inf), dim=-1) @ q


RUNS_ON: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    "bias": (lambda a, k, x: a + 0.5 * k, "SDPA, mask and bias made once for all layers"),
    "softcap": (
        lambda a, k, x: torch.tanh(a / 5.0) * 5.0,
        "matmul-softmax-matmul with softcap; mask made once for all layers",
    ),
    "both": (
        lambda a, k, x: torch.tanh(a / 5.0) * 5.0 + 0.5 * k,
        "matmul-softmax-matmul with bias and softcap; mask and bias made once for all layers",
    ),
    "a_number_a_row": (lambda a, k, x: a + 0.5 * k[:, None], "SDPA, is_causal=True, grouped heads"),
    "input": (lambda a, k, x: a + x[:, None, None, :, 0], "matmul-softmax-matmul as exported (its bias reads the input x)"),
}


@pytest.mark.parametrize("name", RUNS_ON)
def test_what_changed_scores_run_on(name: str) -> None:
    change, kernel = RUNS_ON[name]
    shapes = {"x": {0: Dim("b", min=1, max=8), 1: Dim("s", min=1, max=64)}}
    (site,) = trilithon.explain(Scores(change).eval(), {"x": torch.randn(2, 5, 8)}, shapes).sites
    assert site.runs_on == kernel


@pytest.mark.parametrize(("batch", "words"), [(1, "x 1 row,"), (2, "x 2 rows,")])
def test_rows_of_the_cache_are_counted(batch: int, words: str) -> None:
    (note,) = cache_notes(SimpleNamespace(cache_tokens=32, max_batch=batch, most_cache_bytes=1e6))  # type: ignore[arg-type]
    assert words in note
