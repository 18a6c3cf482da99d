"""Any causal token model generates over a cache: families of transformers, hand-written modules, exported programs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import trilithon
from trilithon import CannotCache, InputError, Options
from zoo.families import FAMILIES

NAMES = ("gpt-neox", "opt", "bloom", "mpt", "falcon", "gemma2", "gemma3", "mixtral", "llama4")
COLUMNS = ("llama4",)  # transformers counts its chunks from the first column, padding included
NEW = 16


def lively(name: str) -> Any:
    """A random model of a family, one layer, whose greedy tokens are not all alike and that never stops."""
    family = FAMILIES[name]
    first = {key: value[:1] for key, value in family.extra.items() if isinstance(value, list)}
    family = replace(family, extra=family.extra | first | ({"num_hidden_layers": 1} if len(family.masks) > 1 else {}))
    model: Any = family.make("eager" if family.eager_only else "sdpa")
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(std=0.25)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.randn_like(head.weight))  # of its own, where it was tied to the embeddings
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model


def greedy(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """What transformers generates."""
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("name", NAMES)
def test_families(name: str) -> None:
    """Batch 3 of unequal lengths; windows and chunks are shorter than the rows."""
    model = lively(name)
    llm = trilithon.compile(model, max_tokens=32, options=Options(max_batch=3))
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[2, :5] = 0
    got = llm.generate(ids, attention_mask=mask, max_new_tokens=NEW, pad_token_id=0)
    if name not in COLUMNS:
        assert torch.equal(got, greedy(model, ids, mask))
    for row, pad in enumerate((0, 2, 5)) if name in COLUMNS else ():
        alone = ids[row : row + 1, pad:]
        assert torch.equal(got[row : row + 1, pad:], greedy(model, alone, torch.ones_like(alone)))
    assert len(set(got[:, 9:].flatten().tolist())) > 5


class Nano(nn.Module):
    """As nanoGPT: `forward(idx, targets=None) -> (logits of the last token, loss)`."""

    def __init__(self, causal: bool = True, reads_length: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.wpe = nn.Embedding(50, 32), nn.Embedding(48, 32)
        self.c_attn, self.c_proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.ln_1, self.ln_f = nn.LayerNorm(32), nn.LayerNorm(32)
        self.head = nn.Linear(32, 50, bias=False)
        self.causal, self.reads_length = causal, reads_length

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        b, t = idx.shape
        assert t <= 48
        x = self.wte(idx) + self.wpe(torch.arange(t, device=idx.device))
        if self.reads_length:
            x = x / t
        q, k, v = (y.view(b, t, 4, 8).transpose(1, 2) for y in self.c_attn(self.ln_1(x)).split(32, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(b, t, 32))
        return self.head(self.ln_f(x[:, [-1], :])), None


class Parallel(nn.Module):
    """Blocks as GPT-NeoX has them, attention beside the feed-forward, a part of each head rotated, its mask written out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norms = nn.Embedding(50, 32), nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.qkv, self.up, self.down = nn.Linear(32, 96), nn.Linear(32, 64), nn.Linear(64, 32)
        self.unembed = nn.Linear(32, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        (b, s), x = tokens.shape, self.embed(tokens)
        angles = torch.outer(torch.arange(s).float(), 10.0 ** -torch.arange(2).float()).repeat(1, 2)
        later = torch.arange(s)[None, :] > torch.arange(s)[:, None]
        for norm in self.norms:
            q, k, v = (y.view(b, s, 4, 8).transpose(1, 2) for y in self.qkv(norm(x)).chunk(3, dim=-1))
            q, k = (rotated(y, angles) for y in (q, k))
            scores = (q @ k.transpose(-2, -1) / math.sqrt(8)).masked_fill(later, float("-inf"))
            y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, 32)
            x = x + y + self.down(F.gelu(self.up(norm(x))))
        return self.unembed(x)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    turned, kept = x[..., :4], x[..., 4:]
    half = torch.cat([-turned[..., 2:], turned[..., :2]], -1)
    return torch.cat([turned * angles.cos() + half * angles.sin(), kept], -1)


@torch.no_grad()
def by_hand(model: nn.Module, ids: Tensor) -> Tensor:
    """The argmax of the whole row, token by token."""
    for _ in range(NEW):
        output = model(ids)
        logits = output[0] if isinstance(output, tuple) else output
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def prompts() -> Tensor:
    return torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("make", "name"), [(Nano, "idx"), (Parallel, "tokens")])
def test_hand_written_modules(make: type[nn.Module], name: str) -> None:
    model = make().eval()
    llm = trilithon.compile(model, {name: torch.ones(2, 6, dtype=torch.int64)}, options=Options(max_batch=3))
    ids = prompts()
    want = by_hand(model, ids)
    assert torch.equal(llm.generate(ids, max_new_tokens=NEW), want)
    assert torch.equal(torch.stack(list(llm.stream(ids, max_new_tokens=NEW)), 1), want[:, 7:])
    assert torch.equal(llm.generate(ids[:1], max_new_tokens=NEW, prompt_lookup_num_tokens=4), want[:1])
    talk = llm.conversation()
    talk.generate(ids[:1, :4], max_new_tokens=2)
    after = torch.cat([talk.tokens, ids[:1, 4:]], 1)
    assert torch.equal(talk.generate(ids[:1, 4:], max_new_tokens=NEW), by_hand(model, after))
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.int64), ids[1:2, 2:]], 1)
    got = llm.generate(torch.cat([ids[:1], padded]), max_new_tokens=NEW, pad_token_id=0)
    assert torch.equal(got[1:, 2:], by_hand(model, ids[1:2, 2:]))


class Placed(Nano):
    """Positions `[s]` are an input, of which all rows have the same."""

    def forward(self, idx: Tensor, position_ids: Tensor) -> Tensor:  # type: ignore[override]
        (b, t), x = idx.shape, self.wte(idx) + self.wpe(position_ids)
        q, k, v = (y.view(b, t, 4, 8).transpose(1, 2) for y in self.c_attn(self.ln_1(x)).split(32, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, 32)
        return self.head(self.ln_f(x + self.c_proj(y)))


def test_positions_without_rows() -> None:
    model = Placed().eval()
    example = {"idx": torch.ones(2, 6, dtype=torch.int64), "position_ids": torch.arange(6)}
    s = Dim("s", min=2, max=48)
    llm = trilithon.compile(model, example, dynamic_shapes={"idx": {0: Dim("b", max=8), 1: s}, "position_ids": {0: s}})
    got = llm.generate(prompts()[:1], max_new_tokens=5)
    assert torch.equal(got[:, 7:], model(got, torch.arange(12)).argmax(-1)[:, 6:-1])


def test_the_export_says_how_many_tokens_fit() -> None:
    model = Nano().eval()
    example = {"idx": torch.ones(2, 6, dtype=torch.int64)}
    shapes = {"idx": {0: Dim("b", max=4), 1: Dim("t", max=40)}}
    with torch.no_grad():
        program = torch.export.export(model, (), example, dynamic_shapes=shapes, strict=False)
    llm = trilithon.compile(program, options=Options(max_batch=3))
    assert llm.max_tokens == 40
    assert torch.equal(llm.generate(prompts(), max_new_tokens=NEW), by_hand(model, prompts()))
    with pytest.raises(InputError, match="max_tokens=41 must be between 2 and 40"):
        trilithon.compile(program, max_tokens=41)


def test_mpt_generates_up_to_the_size_that_its_export_leaves_out() -> None:
    """Of 64 positions export leaves out the last: `max(0, 64 - s)` is then 0, and the bias not a slice."""
    model = lively("mpt")
    llm = trilithon.compile(model, options=Options(max_batch=2))
    assert llm.max_tokens == 63
    ids = torch.randint(3, 60, (2, 63), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    llm.decoder.prefill(ids[:, :5], torch.zeros(2, dtype=torch.int64))
    for i in range(5, 63):
        torch.testing.assert_close(llm.decoder.decode(ids[:, i]), want[:, i], rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="must have 1 to 63 entries, got 64"):
        llm(torch.ones(1, 64, dtype=torch.int64))


@pytest.mark.parametrize(
    ("model", "why"),
    [(Nano(causal=False), "its mask is full, not causal"), (Nano(reads_length=True), r"x = x / t`[\s\S]*number of tokens")],
    ids=["bidirectional", "reads the number of tokens"],
)
def test_what_has_no_cache_says_where(model: nn.Module, why: str) -> None:
    llm = trilithon.compile(model.eval(), {"idx": torch.ones(2, 6, dtype=torch.int64)})
    assert any("no KV cache" in note for note in llm.report.notes)
    torch.testing.assert_close(llm(idx=prompts())[0], model(prompts())[0])
    with pytest.raises(CannotCache, match=why):
        llm.generate(prompts(), max_new_tokens=2)
