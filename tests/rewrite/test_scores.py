"""Biases by position, caps and sinks: rewritten programs compute what the exported ones do; near misses stay as exported."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from trilithon.capture.export import capture
from trilithon.compiler import lower
from trilithon.lower.native.emit import blocked
from trilithon.lower.native.lower import lower_native
from trilithon.options import Options
from trilithon.prove.program import Examined, examine_program
from trilithon.rewrite.fuse_attention import SITE, why_not_canonical
from trilithon.rewrite.op import ATTENTION
from trilithon.rewrite.unlift import unlift

HEADS, LONGEST = 2, 64
Scores = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # scores [b h s t], q [s 1], k [1 t], an input [b t]
SLOPES = torch.tensor([0.5, 0.3])[:, None, None]


def slopes(scores: Tensor) -> Tensor:
    return SLOPES.to(scores.dtype)


HEAD = torch.arange(HEADS)[:, None, None]


class Eager(nn.Module):
    """Attention written out, whose scores `change` turns into what the softmax sees."""

    def __init__(self, change: Scores) -> None:
        super().__init__()
        self.change = change

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        rows, keys = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
        scores = self.change((q @ k.transpose(2, 3)) * 0.5, rows, keys, x)
        return torch.softmax(scores + torch.where(keys <= rows, 0.0, -torch.inf), dim=-1) @ v


class Relative(nn.Module):
    """A learned number for each bucket of a distance and each head, added by SDPA."""

    def __init__(self, bucket: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.bucket, self.table = bucket, nn.Embedding(32, HEADS)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        rows, keys = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
        bias = self.table(self.bucket(keys - rows)).permute(2, 0, 1)[None]
        bias = bias + torch.where(keys <= rows, 0.0, -torch.inf).to(bias.dtype)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.5)


class Sinks(nn.Module):
    """One more column of scores, cut off after the softmax; `column` makes it of the learned sinks and the scores."""

    def __init__(self, column: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.column, self.sinks = column, nn.Parameter(torch.randn(HEADS))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        rows, keys = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
        scores = (q @ k.transpose(2, 3)) * 0.5 + torch.where(keys <= rows, 0.0, -torch.inf)
        joined = torch.cat([scores, self.column(self.sinks, scores)], dim=-1)
        joined = joined - joined.max(dim=-1, keepdim=True).values
        return torch.softmax(joined, dim=-1)[..., :-1] @ v


class Flat(nn.Module):
    """Batch and heads share one axis, and baddbmm adds ALiBi, as in Bloom."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        b, h, s, d = q.shape
        rows, keys = torch.arange(s)[:, None], torch.arange(s)[None, :]
        flat = [y.reshape(b * h, s, d) for y in (q, k, v)]
        bias = (slopes(q) * keys).expand(b, h, 1, s).reshape(b * h, 1, s)
        scores = torch.baddbmm(bias, flat[0], flat[1].transpose(1, 2), beta=1.0, alpha=0.5)
        weights = torch.softmax(scores.view(b, h, s, s) + torch.where(keys <= rows, 0.0, -torch.inf), dim=-1)
        return torch.bmm(weights.view(b * h, s, s), flat[2]).view(b, h, s, d)


def as_t5(distance: Tensor) -> Tensor:
    """Near distances one by one, far ones by their logarithm."""
    back = (-distance).clamp(min=0)
    far = 8 + (torch.log(back.float() / 8) / 1.5 * 8).to(torch.int64)
    return torch.where(back < 8, back, torch.minimum(far, torch.full_like(far, 15)))


def repeated(sinks: Tensor, scores: Tensor) -> Tensor:
    return sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)


def example(b: int, s: int, dtype: torch.dtype) -> dict[str, Any]:
    return {name: torch.randn(b, HEADS, s, 4, dtype=dtype) for name in "qkv"} | {"x": torch.randn(b, s, dtype=dtype)}


class All(nn.Module):
    """One program with a site for each case."""

    def __init__(self, cases: dict[str, nn.Module]) -> None:
        super().__init__()
        self.cases = nn.ModuleDict(cases)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> dict[str, Tensor]:
        return {name: case(q, k, v, x) for name, case in self.cases.items()}


def exported(cases: dict[str, nn.Module], dtype: torch.dtype = torch.float32) -> ExportedProgram:
    b, s = Dim("b", min=1, max=8), Dim("s", min=1, max=LONGEST)
    shapes = {name: {0: b, 2: s} for name in "qkv"} | {"x": {0: b, 1: s}}
    torch.manual_seed(0)
    return capture(All(cases).eval().to(dtype), example(2, 6, dtype), shapes).program


CARRIED: dict[str, nn.Module] = {
    "slope_times_key": Eager(lambda a, q, k, x: a + slopes(a) * k),
    "slope_times_distance": Eager(lambda a, q, k, x: a + slopes(a) * (k - q)),
    "slope_from_the_end": Eager(lambda a, q, k, x: a + slopes(a) * (k - k.shape[1] + 1)),
    "a_number_a_row_beside_it": Eager(lambda a, q, k, x: a + slopes(a) * k + slopes(a) * (1 - k.shape[1])),
    "heads_from_both_ends": Eager(lambda a, q, k, x: a + torch.where(HEAD == 0, k - k.shape[1], k) * slopes(a)),
    "a_number_a_row": Eager(lambda a, q, k, x: a + slopes(a) * (q - k.shape[1])),
    "symmetric": Eager(lambda a, q, k, x: a - slopes(a) * (k - q).abs()),
    "of_both_positions": Eager(lambda a, q, k, x: a - slopes(a) * ((q * k) % 7)),
    "two_biases": Eager(lambda a, q, k, x: a + slopes(a) * k + (q + k).sqrt()),
    "half_precision_steps": Eager(lambda a, q, k, x: a + (SLOPES.bfloat16() * k.bfloat16()).to(a.dtype)),
    "softcap": Eager(lambda a, q, k, x: torch.tanh(a / 3.0) * 3.0),
    "softcap_and_slope": Eager(lambda a, q, k, x: torch.tanh(a / 3.0) * 3.0 + slopes(a) * k),
    "clamped_distance": Relative(lambda d: d.clamp(-8, 8) + 8),
    "t5": Relative(as_t5),
    "sinks": Sinks(repeated),
    "flat": Flat(),
}
KEPT: dict[str, tuple[nn.Module, str]] = {
    "input_of_keys": (Eager(lambda a, q, k, x: a + x[:, None, None, :]), "its bias reads the input x"),
    "input_of_rows": (Eager(lambda a, q, k, x: a + x[:, None, :, None]), "its bias reads the input x"),
    "counted_by_an_input": (
        Eager(lambda a, q, k, x: a + slopes(a) * (x > 0).long().cumsum(-1)[:, None, None]),
        "its bias reads the input x",
    ),
    "activations": (
        Eager(lambda a, q, k, x: a + torch.fft.fft(x).real[:, None, None, :]),
        "its bias is computed from activations, by ",
    ),
    "slope_by_the_length": (Eager(lambda a, q, k, x: a + slopes(a) * (k * k.shape[1])), "its bias depends on s"),
    "rounded_by_the_length": (
        Eager(lambda a, q, k, x: a + slopes(a) * ((k + k.shape[1]) // 2)),
        "its bias depends on s",
    ),
    "one_head_by_the_length": (
        Eager(lambda a, q, k, x: a + torch.where(HEAD == 0, k - k.shape[1], k * k.shape[1]) * slopes(a)),
        "its bias depends on s",
    ),
    "some_keys_from_the_end": (
        Eager(lambda a, q, k, x: a + torch.where(k < 3, k - k.shape[1], k) * slopes(a)),
        "its bias depends on s",
    ),
    "sinks_of_rows": (
        Sinks(lambda sinks, a: repeated(sinks, a) * torch.arange(a.shape[2])[:, None]),
        "its sinks are not a tensor of the program",
    ),
    "sinks_of_scores": (Sinks(lambda sinks, a: a[..., :1]), "its sinks are not a tensor of the program"),
    "sinks_in_another_order": (
        Sinks(lambda sinks, a: repeated(sinks.flip(0), a)),
        "its sinks are not a tensor of the program",
    ),
}


@cache
def values_of_carried(dtype: torch.dtype) -> dict[str, tuple[bool, Tensor, Tensor, Tensor]]:
    """Of each case: is it rewritten; the exported program's value, the rewritten one's, and that of PyTorch's kernels.

    The sizes are not those of the export's example.
    """
    program = exported(CARRIED, dtype)
    rewritten = lower(program, options=Options(proof_cache=False))
    sites = {n.meta[SITE].rpartition(".")[2] for n in rewritten.graph.nodes if n.target is ATTENTION}
    call = example(3, 19, dtype)
    with torch.no_grad():
        want, got = program.module()(**call), rewritten.module()(**call)
        native = lower_native(unlift(rewritten))(*call.values())
    return {name: (name in sites, want[name], got[name], value) for name, value in zip(CARRIED, native, strict=True)}


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_rewritten_program_is_the_exported_one(name: str, dtype: torch.dtype) -> None:
    is_rewritten, want, got, native = values_of_carried(dtype)[name]
    assert is_rewritten
    close = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got, want, rtol=close, atol=close)
    torch.testing.assert_close(native, want, rtol=close, atol=close)


def test_nothing_of_the_sinks_is_left() -> None:
    """The maximum of the joined scores, which has two results, dies with them."""
    rewritten = lower(exported({"sinks": CARRIED["sinks"]}), options=Options(proof_cache=False))
    assert not [n for n in rewritten.graph.nodes if n.op == "call_function" and n.target is not ATTENTION]


@cache
def kept() -> dict[str, Examined]:
    program = exported({name: module for name, (module, _) in KEPT.items()})
    return {found.site.name.rpartition(".")[2]: found for found in examine_program(program)}


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_carried_stays_as_exported(name: str) -> None:
    found = kept()[name]
    assert found.is_proved, found.refusal
    assert (why_not_canonical(found) or "").startswith(KEPT[name][1])


def test_layers_share_one_bias() -> None:
    """Two sites that add the same bias, and one that adds another: two tensors are made."""
    program = exported({name: CARRIED[other] for name, other in (("a", "t5"), ("b", "t5"), ("c", "symmetric"))})
    native = lower_native(unlift(lower(program, options=Options(proof_cache=False))))
    assert [n.target for n in native.graph.nodes].count(blocked) == 2
