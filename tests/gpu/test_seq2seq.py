"""Encoder-decoders on a GPU: steps are CUDA graphs over a context that moves from prompt to prompt."""

from __future__ import annotations

import pytest
import torch

import trilithon
from models.test_seq2seq import NEW, lively
from trilithon import Options

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_prompts_one_behind_the_other(name: str) -> None:
    """In float32: transformers' greedy tokens for prompts of other lengths and rows, with and without padding."""
    model = lively(name).cuda()
    llm = trilithon.compile(model, max_tokens=32, options=Options(max_batch=3))
    for rows, tokens in ((3, 9), (3, 9), (1, 5), (2, 14), (3, 9)):
        ids = torch.randint(3, 60, (rows, tokens), generator=torch.Generator().manual_seed(tokens)).cuda()
        mask = torch.ones_like(ids)
        mask[rows - 1, tokens - 2 :] = 0
        want = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(llm.generate(ids, attention_mask=mask, max_new_tokens=NEW), want)


@pytest.mark.timeout(300)
def test_speech() -> None:
    model = lively("whisper").cuda()
    llm = trilithon.compile(model, max_tokens=32, options=Options(max_batch=3))
    for seed in range(3):
        sound = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(seed)).cuda()
        want = model.generate(sound, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True).sequences
        assert torch.equal(llm.generate(input_features=sound, max_new_tokens=NEW), want)
