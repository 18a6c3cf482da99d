"""Models that are not Hugging Face's: a tril buffer as nanoGPT has it, PyTorch's own layers, and an image-prefix model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from trilithon.compiler import explain
from trilithon.report.report import Report
from trilithon.spec.masks import Formula

TOKENS, WIDTH, HEADS = 64, 16, 2
DYNAMIC = {0: Dim("b", min=1, max=64), 1: Dim("s", min=1, max=TOKENS)}


class TrilBuffer(nn.Module):
    """nanoGPT's attention without flash: a buffer of ones, cut to the length, and masked_fill."""

    bias: Tensor

    def __init__(self, diagonal: int = 0) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        ones = torch.tril(torch.ones(TOKENS, TOKENS), diagonal=diagonal)
        self.register_buffer("bias", ones.view(1, 1, TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        b, s, c = x.shape
        q, k, v = (y.view(b, s, HEADS, c // HEADS).transpose(1, 2) for y in self.qkv(x).split(c, dim=2))
        scores = (q @ k.transpose(-2, -1)) * (c // HEADS) ** -0.5
        scores = scores.masked_fill(self.bias[:, :, :s, :s] == 0, float("-inf"))
        return (functional.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(b, s, c)


class Layer(nn.Module):
    """`nn.TransformerEncoderLayer` with the mask that PyTorch's tutorials give it."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.layer, self.shift = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True), shift

    def forward(self, x: Tensor) -> Tensor:
        blocked = torch.triu(torch.full((x.shape[1], x.shape[1]), float("-inf")), diagonal=1 + self.shift)
        return self.layer(x, src_mask=blocked)  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention`, with weights (its own products and softmax) or without (SDPA)."""

    def __init__(self, need_weights: bool, masked: bool) -> None:
        super().__init__()
        self.attention, self.need_weights = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), need_weights
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        s = x.shape[1]
        blocked = torch.triu(torch.ones(s, s, dtype=torch.bool), diagonal=1) if self.masked else None
        return self.attention(x, x, x, attn_mask=blocked, need_weights=self.need_weights)[0]  # type: ignore[no-any-return]


def explained(module: nn.Module) -> Report:
    return explain(module.eval(), {"x": torch.randn(2, 12, WIDTH)}, {"x": DYNAMIC})


@pytest.mark.parametrize(
    ("module", "form"),
    [
        (TrilBuffer(), "causal"),
        (Layer(), "causal"),
        (SelfAttention(need_weights=False, masked=True), "causal"),
        (SelfAttention(need_weights=True, masked=True), "causal"),
        (SelfAttention(need_weights=True, masked=False), "full"),
    ],
    ids=["nanogpt", "encoder-layer", "mha", "mha-weights", "mha-weights-full"],
)
def test_is_proved(module: nn.Module, form: str) -> None:
    (site,) = explained(module).sites
    assert str(site.mask) == form, site.reason


@pytest.mark.parametrize("module", [TrilBuffer(1), TrilBuffer(-1), Layer(1)], ids=["tril+1", "tril-1", "triu+1"])
def test_a_neighbour_is_not(module: nn.Module) -> None:
    (site,) = explained(module).sites
    assert str(site.mask) in ("formula", "None") or "formula" in str(site.mask)
    assert "causal" in str(site.nearest) or "not causal" in site.reason


def image_prefix() -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A PaliGemma whose first tokens (token_type_ids 0) see each other both ways."""
    text = transformers.GemmaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=256,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = transformers.PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=63, projection_dim=32)
    model = transformers.PaliGemmaForConditionalGeneration(config).eval()
    example = {"input_ids": torch.arange(24).view(2, 12), "token_type_ids": torch.zeros(2, 12, dtype=torch.int64)}
    example["token_type_ids"][:, 6:] = 1
    return model, example | {"use_cache": False}, dict.fromkeys(example, DYNAMIC) | {"use_cache": None}


def test_a_prefix_model_is_proved_to_be_what_it_is() -> None:
    """Causal for text alone, as a guard; and without any, the formula in which tokens of type 0 see each other."""
    sites = [site for site in explain(*image_prefix()).sites if "language_model" in site.name]
    assert sites
    for site in sites:
        assert str(site.mask) == "causal"
        assert [a.kind for a in site.assumptions if a.source == "guard"] == ["all_ones"]
        (general,) = (p for p in site.alternatives if isinstance(p.mask, Formula))
        assert not [a for a in general.assumptions if a.source == "guard"]
        types = torch.tensor([[0, 0, 0, 1, 1]])
        allowed = general.mask.materialize(1, 1, 5, 5, {"token_type_ids": types})[0, 0]
        assert torch.equal(allowed, torch.ones(5, 5).tril().bool() | ((types == 0).T & (types == 0)))
