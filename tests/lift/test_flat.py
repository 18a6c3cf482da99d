"""Scores of which batch and heads share the first axis, put together again from what was lifted."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lift.rows_scores import Logits, causal
from lift.test_scores import reconstructed
from trilithon.capture.sites import Site, find_sites
from trilithon.lift.meaning import lift_site

X = dict[str, Tensor]
B, H, D, INF = 3, 2, 4, float("inf")
HEAD = torch.arange(H).repeat(B)[:, None, None]

# name: what reaches the softmax, from `q` and `k` (in `x`, of three axes), the indices, and inputs; the first argument is q @ k
ROWS: dict[str, Logits] = {
    "scaled": lambda w, i, j, x: w * 0.5 + causal(i, j),
    "padded": lambda w, i, j, x: w.masked_fill(~x["kept"].repeat_interleave(H, 0)[:, None, :], -INF),
    "by_head": lambda w, i, j, x: w.masked_fill(j > i + HEAD, -INF),
    "in_four_axes": lambda w, i, j, x: (w.view(B, H, -1, w.shape[2]) + causal(i, j)).view(B * H, -1, w.shape[2]),
    "joined": lambda w, i, j, x: torch.baddbmm(x["bias"], x["q"], x["k"].transpose(1, 2), alpha=0.25) + causal(i, j),
    "joined_in_part": lambda w, i, j, x: torch.baddbmm(x["bias"], x["q"], x["k"].transpose(1, 2), beta=0.5) + causal(i, j),
    "joined_to_nothing": lambda w, i, j, x: torch.baddbmm(x["bias"], x["q"], x["k"].transpose(1, 2), beta=0) + causal(i, j),
}


class Attends(nn.Module):
    def __init__(self, logits: Logits) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, v: Tensor, x: X) -> tuple[Tensor, Tensor]:
        i = torch.arange(v.shape[1])
        logits = self.logits(torch.bmm(x["q"], x["k"].transpose(1, 2)), i[:, None], i[None, :], x)
        return torch.bmm(logits.softmax(-1), v), logits


class Program(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: Attends(logits) for name, logits in ROWS.items()})

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kept: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        q, k, v = (y.reshape(B * H, y.shape[2], D) for y in (q, k, v))
        x = {"q": q, "k": k, "bias": bias, "kept": kept}
        return {name: part(v, x) for name, part in self.parts.items()}


def inputs(s: int) -> X:
    g = torch.Generator().manual_seed(s)
    heads = {name: torch.randn(B, H, s, D, generator=g) for name in "qkv"}
    return {**heads, "bias": torch.randn(B * H, s, s, generator=g), "kept": torch.randint(0, 2, (B, s), generator=g).bool()}


@cache
def program() -> tuple[ExportedProgram, dict[str, Site]]:
    s = Dim("s", min=2, max=64)
    shapes = {name: {d: s for d, n in enumerate(x.shape) if n == 7} for name, x in inputs(7).items()}
    exported = torch.export.export(Program().eval(), (), inputs(7), dynamic_shapes=shapes, strict=False)
    return exported, {site.name.removeprefix("parts."): site for site in find_sites(exported.graph)}


@pytest.mark.parametrize("name", ROWS)
def test_flat_scores_are_put_together_again(name: str) -> None:
    exported, sites = program()
    meaning = lift_site(exported, sites[name])
    given = inputs(5)
    kept, value = reconstructed(meaning, given["q"] @ given["k"].transpose(-1, -2), given)
    logits = Program()(**given)[name][1].view(B, H, 5, 5).double()
    torch.testing.assert_close(logits[kept], value[kept], rtol=1e-5, atol=1e-5)
    assert bool((logits[~kept] == -INF).all())
    assert meaning.flat
