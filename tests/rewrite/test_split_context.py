"""Encoder-decoders: the context once a prompt, then a cached decoder, gives the logits of the whole program."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from rewrite.cached_run import CachedRun
from rewrite.test_insert_cache import CANONICAL, worst
from trilithon.capture import hf
from trilithon.compiler import analyse
from trilithon.errors import CannotCache
from trilithon.options import Options
from trilithon.rewrite.insert_cache import cache_shapes
from trilithon.rewrite.split_context import split_context
from zoo.families import FAMILIES

LENGTH = 40


@pytest.mark.parametrize("name", ["bart", "whisper", *(["t5"] if CANONICAL else [])])
@torch.no_grad()
def test_families(name: str) -> None:
    family = FAMILIES[name]
    model = family.make()
    first = "input_features" if name == "whisper" else "input_ids"
    program = analyse(model, *hf.example_for(model, (first, "decoder_input_ids")), (), Options()).rewritten
    generator = torch.Generator().manual_seed(1)
    given = (
        torch.randn(3, 8, 32, generator=generator) if name == "whisper" else torch.randint(3, 60, (3, 11), generator=generator)
    )
    ids = torch.randint(3, 60, (3, LENGTH), generator=generator)
    want = model(**{first: given, "decoder_input_ids": ids}, use_cache=False).logits
    context = split_context(program)
    assert context.inputs == (first,)
    held = context.module(given)
    assert len(held) == len(context.names) and all(len(x) == 3 for x in held)
    run = CachedRun(program, ids, LENGTH, rings=False, context=held)
    assert worst(run.schedule(0), want) < 1e-4


class Conditioned(nn.Module):
    """A decoder whose tokens attend to what is given, of which a part is added too."""

    def __init__(self, leak: bool) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(11, 16), nn.Linear(16, 11)
        self.qkv, self.kv = nn.Linear(16, 48), nn.Linear(8, 32)
        self.leak = leak

    def forward(self, words: Tensor, image: Tensor) -> Tensor:
        (b, s), t = words.shape, image.shape[1]
        x = self.tokens(words)
        q, k, v = (y.view(b, s, 2, 8).transpose(1, 2) for y in self.qkv(x).split(16, dim=-1))
        y = torch.ops.trilithon.attention(q, k, v, "causal", 0.5)
        k, v = (y.view(b, t, 2, 8).transpose(1, 2) for y in self.kv(image).split(16, dim=-1))
        y = torch.ops.trilithon.attention(y, k, v, "causal" if self.leak else "full", 0.5)
        return self.head(y.transpose(1, 2).reshape(b, s, 16) + self.kv(image)[:, :1, :16])


def conditioned(leak: bool) -> tuple[Conditioned, torch.export.ExportedProgram]:
    torch.manual_seed(0)
    model = Conditioned(leak).double().eval()
    example = {"words": torch.ones(2, 7, dtype=torch.long), "image": torch.ones(2, 5, 8, dtype=torch.double)}
    b = Dim("b", max=8)
    shapes = {"words": {0: b, 1: Dim("s", min=2, max=60)}, "image": {0: b, 1: Dim("t", min=2, max=60)}}
    with torch.no_grad():
        return model, torch.export.export(model, (), example, dynamic_shapes=shapes, strict=False)


@torch.no_grad()
def test_a_hand_written_decoder_over_an_image() -> None:
    model, program = conditioned(leak=False)
    image, ids = torch.randn(3, 6, 8).double(), torch.randint(0, 11, (3, LENGTH))
    held = split_context(program, "words").module(image)
    run = CachedRun(program, ids, LENGTH, rings=False, context=held, tokens="words")
    assert worst(run.schedule(0), model(ids, image)) < 1e-9


def test_cross_attention_by_position_is_refused() -> None:
    _, program = conditioned(leak=True)
    with pytest.raises(CannotCache, match="over the context is causal, which depends on positions"):
        cache_shapes(program, tokens="words")


def test_a_token_input_that_is_not_there_is_refused() -> None:
    _, program = conditioned(leak=False)
    with pytest.raises(CannotCache, match="no decoder_input_ids"):
        split_context(program)
