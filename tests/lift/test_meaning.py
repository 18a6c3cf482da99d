"""What a site's call says beside its mask: flags, kernels, rows without a key, the factor on the scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import scaled_dot_product_attention as attention

from trilithon.capture.sites import Site, find_sites
from trilithon.errors import CannotLift
from trilithon.lift.meaning import Meaning, lift_site
from trilithon.spec import term as t
from trilithon.spec.evaluate import evaluate
from trilithon.spec.masks import K, Q
from trilithon.spec.term import Term

aten = torch.ops.aten
INF, MIN = math.inf, torch.finfo(torch.float32).min
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
B, H, S, T, D = 2, 3, 5, 7, 4


@dataclass(frozen=True)
class Row:
    """A call with `q [b h s d]`, `k v [b h t d]` and the indices `i [s 1]`, `j [1 t]`; and what it means."""

    attend: Attend
    keep: Term = Q >= K
    drops: tuple[str, ...] = ()
    needs_key: bool = False
    scale: float = 0.5


def low(i: Tensor, j: Tensor, value: float) -> Tensor:
    return torch.where(j <= i, 0.0, value)


def written_out(softmax: Callable[[Tensor], Tensor], value: float) -> Attend:
    return lambda q, k, v, i, j: softmax(q @ k.transpose(-1, -2) * 0.25 + low(i, j, value)) @ v


ROWS: dict[str, Row] = {
    "no_mask": Row(lambda q, k, v, i, j: attention(q, k, v), t.TRUE),
    "causal_flag": Row(lambda q, k, v, i, j: attention(q, k, v, is_causal=True)),
    "own_scale": Row(lambda q, k, v, i, j: attention(q, k, v, is_causal=True, scale=0.125), scale=0.125),
    "bool": Row(lambda q, k, v, i, j: attention(q, k, v, j <= i), drops=("False",)),
    "additive": Row(lambda q, k, v, i, j: attention(q, k, v, low(i, j, -INF)), drops=("-inf",)),
    "lowest": Row(lambda q, k, v, i, j: attention(q, k, v, low(i, j, MIN)), drops=("-3.40282e+38",), needs_key=True),
    "both_drops": Row(
        lambda q, k, v, i, j: attention(q, k, v, low(i, j, MIN) + low(i + 1, j, -INF)),
        drops=("-3.40282e+38", "-inf"),
        needs_key=True,
    ),
    "half_low_enough": Row(
        lambda q, k, v, i, j: attention(q.half(), k.half(), v.half(), low(i, j, -40000.0).half()),
        drops=("-40000",),
        needs_key=True,
    ),
    "written_out": Row(written_out(lambda x: x.softmax(-1), -INF), drops=("-inf",), needs_key=True, scale=0.25),
    "safe_softmax": Row(written_out(lambda x: aten._safe_softmax(x, -1), -INF), drops=("-inf",), scale=0.25),
    "safe_but_lowest": Row(
        written_out(lambda x: aten._safe_softmax(x, -1), MIN), drops=("-3.40282e+38",), needs_key=True, scale=0.25
    ),
    "cpu_kernel": Row(lambda q, k, v, i, j: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0], t.TRUE),
}
REFUSED: dict[str, tuple[Attend, str]] = {
    "causal_kernel_of_other_lengths": (
        lambda q, k, v, i, j: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0],
        "the causal alignment of this kernel",
    ),
    "dropout": (lambda q, k, v, i, j: attention(q, k, v, dropout_p=0.5), "dropout_p=0.5"),
    "half_too_weak": (
        lambda q, k, v, i, j: attention(q.half(), k.half(), v.half(), low(i, j, -32000.0).half()),
        "it adds -32000, which is a bias",
    ),
    "data": (lambda q, k, v, i, j: attention(q, k, v, q @ k.transpose(-1, -2)), "has no handler"),
}


class Program(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
        attends = [row.attend for row in ROWS.values()] + [attend for attend, _ in REFUSED.values()]
        return [attend(q, k, v, i, j) for attend in attends]


@cache
def program() -> tuple[ExportedProgram, dict[str, Site]]:
    s, n = Dim("s", min=2, max=64), Dim("n", min=2, max=64)
    example = (torch.randn(B, H, S, D), torch.randn(B, H, T, D), torch.randn(B, H, T, D))
    exported = torch.export.export(Program().eval(), example, dynamic_shapes=({2: s}, {2: n}, {2: n}), strict=False)
    return exported, dict(zip([*ROWS, *REFUSED], find_sites(exported.graph), strict=True))


def meaning_of(name: str) -> Meaning:
    exported, sites = program()
    return lift_site(exported, sites[name])


@pytest.mark.parametrize("name", ROWS)
def test_what_a_call_means(name: str) -> None:
    row, meaning = ROWS[name], meaning_of(name)
    env: dict[str, Tensor | int] = {"b": 1, "h": 1, "q": torch.arange(S)[:, None], "k": torch.arange(T)}
    assert torch.equal(evaluate(meaning.keep, env).expand(S, T), evaluate(row.keep, env).expand(S, T))
    assert (meaning.drops, meaning.needs_key, meaning.scale) == (row.drops, row.needs_key, row.scale)
    assert (meaning.bias, meaning.softcap, meaning.sinks, meaning.flat) == (None, None, False, False)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    with pytest.raises(CannotLift, match=REFUSED[name][1]):
        meaning_of(name)
