"""A KV cache goes in only where every value outside attention belongs to one token, and then gives equal logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from trilithon.compiler import analyse
from trilithon.errors import CannotCache
from trilithon.options import Options
from trilithon.prove.program import prover_of
from trilithon.rewrite.insert_cache import cache_shapes, insert_cache
from trilithon.rewrite.pipeline import rewrite

WIDTH, HEADS, VOCAB, CLOSE = 16, 2, 11, 1e-10
Twist = Callable[["Decoder", Tensor, Tensor], Tensor]


def causal(s: int) -> Tensor | None:
    return None


def window(s: int) -> Tensor:
    i = torch.arange(s)
    return (i[None] <= i[:, None]) & (i[None] > i[:, None] - 3)


def unproved(s: int) -> Tensor:
    i = torch.arange(s)
    return (i[None] <= i[:, None]) & ((i[:, None] - i[None]) % 3 == 0)


def full(s: int) -> Tensor:
    return torch.ones(s, s, dtype=torch.bool)


class Decoder(nn.Module):
    """Two layers of causal attention; `twist(self, x, position_ids)` stands between them."""

    def __init__(self, twist: Twist | None = None, mask: Callable[[int], Tensor | None] = causal) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(32, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB)
        self.twist, self.mask = twist, mask

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions(position_ids)
        for i in range(2):
            x = x + self.attend(self.norm(x), i)
            if self.twist is not None and i == 0:
                x = self.twist(self, x, position_ids)
        return self.head(F.silu(x))

    def attend(self, x: Tensor, i: int) -> Tensor:
        b, s, _ = x.shape
        y = self.qkv[i](x)
        q, k, v = (y[..., n : n + WIDTH].view(b, s, HEADS, -1).transpose(1, 2) for n in (0, WIDTH, 2 * WIDTH))
        mask = self.mask(s)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out[i](y.transpose(1, 2).reshape(b, s, WIDTH))


def canonical(model: nn.Module, static: bool = False) -> ExportedProgram:
    example = {"input_ids": torch.ones(2, 7, dtype=torch.long), "position_ids": torch.arange(7).expand(2, 7).contiguous()}
    axes = {0: Dim("b", max=8)} if static else {0: Dim("b", max=8), 1: Dim("s", min=2, max=30)}
    found = analyse(model, example, {"input_ids": axes, "position_ids": axes}, (), Options())
    return rewrite(found.captured.program, found.proved, prover_of(found.captured.program))[0]


@cache
def decoder(mask: Callable[[int], Tensor | None]) -> tuple[Decoder, ExportedProgram]:
    torch.manual_seed(0)
    model = Decoder(mask=mask).double().eval()
    return model, canonical(model)


def test_a_causal_decoder_may_have_a_cache() -> None:
    shapes = cache_shapes(decoder(causal)[1])
    assert [(c.g, c.d, c.e, c.dtype) for c in shapes] == [(2, 8, 8, torch.float64)] * 2


def shift(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def convolve(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), torch.ones(WIDTH, WIDTH, 3)).transpose(1, 2)


def batch_norm(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2)


def learned_by_index(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return x + m.positions(torch.arange(x.shape[1]))


def last_learned(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return x + m.positions.weight[x.shape[1] - 1 : x.shape[1]]


def vector_product(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    """A product with a vector drops an axis; the softmax after it runs over tokens."""
    return x * torch.softmax(torch.matmul(x, m.norm.weight), 1).unsqueeze(-1)


def gather_rows(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return x + F.embedding(p * 0, x.mean(0))


FORBIDDEN: dict[str, tuple[Twist, str]] = {
    "token_shift": (shift, "tokens"),
    "cumsum": (lambda m, x, p: x.cumsum(1), "cumsum.default is not known to keep tokens apart"),
    "mean": (lambda m, x, p: x + x.mean(1, keepdim=True), "it reduces over tokens"),
    "mean_of_all": (lambda m, x, p: x + x.mean(dim=(), keepdim=True), "it reduces over tokens"),
    "softmax": (lambda m, x, p: x.softmax(1), "it reduces over tokens"),
    "convolution": (convolve, "is not known to keep tokens apart"),
    "flip": (lambda m, x, p: x.flip(1), "flip.default is not known to keep tokens apart"),
    "roll": (lambda m, x, p: x.roll(1, 1), "is not known to keep tokens apart"),
    "batch_norm": (batch_norm, "batch_norm_legit.no_stats is not modelled"),
    "scaled_by_length": (lambda m, x, p: x / x.shape[1], "makes values from the number of tokens"),
    "scaled_by_root_of_length": (lambda m, x, p: x / math.sqrt(x.shape[1]), "makes values from the number of tokens"),
    "scaled_by_inverse_length": (lambda m, x, p: x * (1.0 / x.shape[1]), "makes values from the number of tokens"),
    "learned_by_index": (learned_by_index, "makes values from the number of tokens"),
    "last_learned": (last_learned, "makes values from the number of tokens"),
    "vector_product": (vector_product, "multiplies with a vector"),
    "gather_rows": (gather_rows, "looks tokens up"),
    "product_of_tokens": (lambda m, x, p: x + (x @ x.transpose(1, 2)) @ x, "it multiplies along tokens"),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_mixed_tokens_are_refused(name: str) -> None:
    twist, why = FORBIDDEN[name]
    program = canonical(Decoder(twist).eval())
    with pytest.raises(CannotCache) as caught:
        cache_shapes(program)
    assert why in caught.value.why
    assert caught.value.where is not None and caught.value.where.node
    assert "cannot insert a KV cache" in str(caught.value) and "test_locality.py" in str(caught.value)


@pytest.mark.parametrize(
    ("mask", "why"), [(full, "its mask is full, not causal"), (unproved, "the mask of this attention is not proved causal")]
)
def test_other_masks_are_refused(mask: Callable[[int], Tensor | None], why: str) -> None:
    with pytest.raises(CannotCache) as caught:
        cache_shapes(canonical(Decoder(mask=mask).eval()))
    assert why in caught.value.why or "tokens" in caught.value.why


def test_a_fixed_number_of_tokens_is_refused() -> None:
    with pytest.raises(CannotCache, match="number of tokens is fixed"):
        cache_shapes(canonical(Decoder().eval(), static=True))


def positions_of(pad: Tensor, s: int) -> Tensor:
    return (torch.arange(s)[None] - pad[:, None]).clamp(min=0)


class Cache:
    """Runs the two modules of one program over a cache of 16 slots."""

    def __init__(self, program: ExportedProgram, pad: Tensor, padded: bool) -> None:
        self.prefill = insert_cache(program, decode=False, padded=padded)
        self.decode = insert_cache(program, decode=True, padded=padded)
        b = len(pad)
        self.caches = [
            torch.full((b, c.g, 16, w), 99.0, dtype=c.dtype) for c in cache_shapes(program) for w in (c.d, c.e)
        ]  # what an unused slot holds must not matter
        self.pad, self.used = pad, 0

    def feed(self, ids: Tensor) -> Tensor:
        """Logits `[b v]` of the last of these tokens."""
        end = self.used + ids.shape[1]
        slots = torch.arange(16)[None] >= self.pad[:, None]
        positions = positions_of(self.pad, end)[:, self.used :]
        module = self.decode if self.used else self.prefill
        keys = slots if self.used else slots[:, :end]
        logits = module(ids, positions, torch.tensor(self.used), keys, *self.caches)
        assert logits.shape[1] == 1
        self.used = end
        return logits[:, 0]


IDS = torch.randint(1, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("chunks", [(12,), (5, 1, 1, 1, 1, 1, 1, 1), (5, 3, 1, 3), (1, 1, 10), (2, 10)], ids=str)
@pytest.mark.parametrize("mask", [causal, window])
@torch.no_grad()
def test_cached_logits_are_those_of_the_full_forward(mask: Callable[[int], Tensor | None], chunks: tuple[int, ...]) -> None:
    model, program = decoder(mask)
    pad = torch.zeros(2, dtype=torch.long)
    want = model(IDS, positions_of(pad, 12))
    cache = Cache(program, pad, padded=False)
    for n in chunks:
        got = cache.feed(IDS[:, cache.used : cache.used + n])
        assert (got - want[:, cache.used - 1]).abs().max() < CLOSE


@pytest.mark.parametrize("mask", [causal, window])
@torch.no_grad()
def test_left_padded_rows_are_as_if_alone(mask: Callable[[int], Tensor | None]) -> None:
    model, program = decoder(mask)
    pad = torch.tensor([3, 0])
    none = torch.zeros(1, dtype=torch.long)
    want = [model(IDS[i : i + 1, n:], positions_of(none, 12 - n))[0] for i, n in enumerate(pad.tolist())]
    cache = Cache(program, pad, padded=True)
    for n in (5, 1, 3, 1):
        got = cache.feed(IDS[:, cache.used : cache.used + n])
        for i, skipped in enumerate(pad.tolist()):
            assert (got[i] - want[i][cache.used - 1 - skipped]).abs().max() < CLOSE
