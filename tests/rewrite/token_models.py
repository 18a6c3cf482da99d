"""Hand-written causal models: each makes its positions, views and logits in another way that people write."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, VOCAB, LONGEST = 16, 2, 23, 64
HEAD = WIDTH // HEADS
Positions = Callable[["TokenModel", Tensor, Tensor], Tensor]
Rotate = Callable[["TokenModel", Tensor], Tensor]


def frequencies() -> Tensor:
    return 1.0 / 100 ** (torch.arange(0, HEAD, 2).double() / HEAD)


class TokenModel(nn.Module):
    """Two layers; the parts that differ are given.

    Args:
        add: the embedded tokens `[b s c]` and the tokens, to the same with positions added.
        rotate: queries or keys `[b h s d]` rotated by position.
        attend: q, k, v to the attention's result, all `[b h s d]`.
        head: the last hidden state to logits.
    """

    def __init__(
        self,
        add: Positions = lambda m, x, ids: x,
        rotate: Rotate = lambda m, x: x,
        attend: Callable[[TokenModel, Tensor, Tensor, Tensor], Tensor] | None = None,
        head: Callable[[TokenModel, Tensor], Tensor] | None = None,
        mix: Callable[[TokenModel, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LONGEST + 2, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.register_buffer("inv_freq", frequencies())
        angles = torch.outer(torch.arange(LONGEST).double(), frequencies())
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin())
        self.register_buffer("cis", torch.polar(torch.ones_like(angles), angles))
        self.register_buffer("tril", torch.tril(torch.ones(LONGEST, LONGEST)).view(1, 1, LONGEST, LONGEST))
        self.add, self.rotate, self.attend, self.mix = add, rotate, attend or fused, mix or feed_forward
        self.head = head or (lambda m, x: m.lm_head(x))

    def forward(self, idx: Tensor) -> Tensor:
        x = self.add(self, self.wte(idx), idx)
        for i in range(2):
            b, s, _ = x.shape
            q, k, v = self.qkv[i](self.norm(x)).split(WIDTH, dim=2)
            q, k, v = (y.view(b, s, HEADS, HEAD).transpose(1, 2) for y in (q, k, v))
            y = self.attend(self, self.rotate(self, q), self.rotate(self, k), v)
            x = x + self.out[i](y.transpose(1, 2).contiguous().view(b, s, WIDTH))
            x = x + self.mix(self, self.norm(x))
        return self.head(self, self.norm(x))


def fused(m: TokenModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.trilithon.attention(q, k, v, "causal", 0.3)  # type: ignore[no-any-return]


def by_triangle(m: TokenModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q.shape[2]
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(HEAD))
    scores = scores.masked_fill(m.tril[:, :, :s, :s] == 0, float("-inf"))  # type: ignore[index]
    return F.softmax(scores, dim=-1) @ v


def windowed(m: TokenModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.trilithon.attention(q, k, v, "window(3)", 0.3)  # type: ignore[no-any-return]


def chunked(m: TokenModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.trilithon.attention(q, k, v, "causal & chunked(4)", 0.3)  # type: ignore[no-any-return]


def feed_forward(m: TokenModel, x: Tensor) -> Tensor:
    return m.down(F.gelu(m.up(x)))


def merged(m: TokenModel, x: Tensor) -> Tensor:
    """As GPT-2's Conv1D does."""
    b, s, c = x.shape
    flat = torch.addmm(m.up.bias, x.view(-1, c), m.up.weight.t())
    return m.down(F.silu(flat.view(b, s, 2 * c)))


def grouped(m: TokenModel, x: Tensor) -> Tensor:
    b, s, c = x.shape
    return F.group_norm(x.reshape(b * s, c), 4).view(b, s, c)


def routed(m: TokenModel, x: Tensor) -> Tensor:
    """The best two of four gates of each token."""
    gates, chosen = x[..., :4].softmax(-1).topk(2, dim=-1)
    weights = torch.zeros_like(x[..., :4]).scatter(-1, chosen, gates)
    return (x.unsqueeze(-2) * weights.unsqueeze(-1)).sum(-2) + x.cumsum(-1)


# ------------------------------------------------------------ positions that are added


def by_index(m: TokenModel, x: Tensor, ids: Tensor) -> Tensor:
    return x + m.wpe(torch.arange(0, x.shape[1], dtype=torch.long))


def by_row_of_indices(m: TokenModel, x: Tensor, ids: Tensor) -> Tensor:
    return x + m.wpe(torch.arange(ids.shape[1]).unsqueeze(0).expand(ids.shape[0], -1))


def by_repeated_indices(m: TokenModel, x: Tensor, ids: Tensor) -> Tensor:
    return x + m.wpe(torch.arange(ids.shape[1]).repeat(ids.shape[0], 1))


def by_slice(m: TokenModel, x: Tensor, ids: Tensor) -> Tensor:
    return x + m.wpe.weight[: x.shape[1]]


def by_shifted_slice(m: TokenModel, x: Tensor, ids: Tensor) -> Tensor:
    return x + m.wpe.weight[None][:, 2 : x.shape[1] + 2]


def by_slice_of_columns(m: TokenModel, x: Tensor, ids: Tensor) -> Tensor:
    return x + m.wpe.weight.t()[:, : x.shape[1]].t()


def by_counting(m: TokenModel, x: Tensor, ids: Tensor) -> Tensor:
    return x + m.wpe(torch.ones_like(ids).cumsum(1) - 1)


def by_counting_one_row(m: TokenModel, x: Tensor, ids: Tensor) -> Tensor:
    return x + m.wpe(torch.ones(x.shape[1], dtype=torch.long).cumsum(0))


def by_sines(m: TokenModel, x: Tensor, ids: Tensor) -> Tensor:
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * m.inv_freq[None, :]  # type: ignore[index]
    waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return x + torch.cat([waves, waves * 0.5], dim=1).to(x.dtype)


def into_heads(m: TokenModel, x: Tensor, ids: Tensor) -> Tensor:
    """Positions `[s 1 d]` meet tokens `[b s h d]`."""
    b, s, c = x.shape
    table = m.cos[:s].to(x.dtype).view(s, 1, HEAD)  # type: ignore[index]
    return (x.view(b, s, HEADS, HEAD) * table).reshape(b, s, c)


# ------------------------------------------------------------ positions that rotate


def half_turned(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos.to(x.dtype) + half_turned(x) * sin.to(x.dtype)


def by_tables(m: TokenModel, x: Tensor) -> Tensor:
    s = x.shape[2]
    return rotated(x, m.cos[:s], m.sin[:s])  # type: ignore[index]


def by_outer(m: TokenModel, x: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(x.shape[2], dtype=x.dtype), m.inv_freq.to(x.dtype))  # type: ignore[operator]
    angles = torch.cat([angles, angles], dim=-1)[None, None]
    return rotated(x, angles.cos(), angles.sin())


def by_einsum(m: TokenModel, x: Tensor) -> Tensor:
    angles = torch.einsum("i,j->ij", torch.arange(x.shape[2], dtype=x.dtype), m.inv_freq.to(x.dtype))  # type: ignore[operator]
    angles = torch.cat([angles, angles], dim=-1)
    return rotated(x, angles.cos(), angles.sin())


def by_product(m: TokenModel, x: Tensor) -> Tensor:
    """As Hugging Face's rotary embeddings once did."""
    positions = torch.arange(x.shape[2])[None]
    wide = m.inv_freq[None, :, None].to(x.dtype).expand(positions.shape[0], -1, 1)  # type: ignore[index]
    angles = (wide @ positions[:, None, :].to(x.dtype)).transpose(1, 2)
    angles = torch.cat([angles, angles], dim=-1)
    return rotated(x, angles.cos().unsqueeze(1), angles.sin().unsqueeze(1))


def by_complex(m: TokenModel, x: Tensor) -> Tensor:
    """As Llama's own code does, on `[b s h d]`."""
    x = x.transpose(1, 2)
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
    cis = m.cis[: x.shape[1]].view(1, x.shape[1], 1, -1)  # type: ignore[index]
    return torch.view_as_real(pairs * cis).flatten(3).to(x.dtype).transpose(1, 2)


# ------------------------------------------------------------ logits


def of_last_list(m: TokenModel, x: Tensor) -> Tensor:
    return m.lm_head(x[:, [-1], :])


def of_last(m: TokenModel, x: Tensor) -> Tensor:
    return torch.tanh(m.lm_head(x[:, -1]) / 3.0) * 3.0


def of_last_slice(m: TokenModel, x: Tensor) -> Tensor:
    return m.lm_head(x)[:, -1:]


def capped(m: TokenModel, x: Tensor) -> Tensor:
    return torch.tanh(F.linear(x, m.wte.weight) / 3.0) * 3.0


MODELS: dict[str, Callable[[], TokenModel]] = {
    "no positions": TokenModel,
    "nanoGPT": lambda: TokenModel(by_index, head=of_last_list),
    "nanoGPT, triangle": lambda: TokenModel(by_index, attend=by_triangle),
    "row of indices": lambda: TokenModel(by_row_of_indices, head=of_last),
    "repeated indices": lambda: TokenModel(by_repeated_indices, mix=merged),
    "slice of a table": lambda: TokenModel(by_slice, head=of_last_slice),
    "shifted slice": lambda: TokenModel(by_shifted_slice, mix=grouped),
    "slice of columns": lambda: TokenModel(by_slice_of_columns),
    "counting": lambda: TokenModel(by_counting, mix=routed),
    "counting one row": lambda: TokenModel(by_counting_one_row),
    "sines": lambda: TokenModel(by_sines, head=capped),
    "into heads": lambda: TokenModel(into_heads),
    "rotary tables": lambda: TokenModel(rotate=by_tables, attend=windowed),
    "rotary, outer": lambda: TokenModel(rotate=by_outer, attend=chunked),
    "rotary, einsum": lambda: TokenModel(rotate=by_einsum),
    "rotary, product": lambda: TokenModel(rotate=by_product),
    "rotary, complex": lambda: TokenModel(rotate=by_complex),
}
