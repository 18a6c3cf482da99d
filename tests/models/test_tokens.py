"""Greedy tokens of `generate` equal Hugging Face eager's, token by token, in float32."""

from __future__ import annotations

from pydoc_data.topics import topics

import pytest
import torch

import trilithon
from models.configs import tiny
from trilithon import Options, Verdict
from zoo.families import FAMILIES

CACHED = [
    ("qwen2.5", "sdpa"),
    ("qwen3", "eager"),
    ("llama-3.2", "sdpa"),
    ("mistral", "sdpa"),
    ("mistral", "eager"),
    ("gpt2", "sdpa"),
]


@pytest.mark.parametrize(("name", "attention"), CACHED)
def test_greedy_tokens_equal_eager(name: str, attention: str) -> None:
    """Batch 3 of unequal lengths; for mistral the rows run past the window of 6."""
    model = tiny(name, attention)
    llm = trilithon.compile(model, max_tokens=48, options=Options(max_batch=3))
    ids = torch.randint(3, 300, (3, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, :11] = 0
    for given in (None, mask):
        want = model.generate(ids, attention_mask=given, max_new_tokens=24, do_sample=False, pad_token_id=0)
        got = llm.generate(ids, attention_mask=given, max_new_tokens=24, pad_token_id=0)
        assert torch.equal(got, want)
        assert len(set(got[:, 14:].flatten().tolist())) > 3  # not one token over and over


@pytest.mark.timeout(300)
def test_trained_checkpoint_over_twenty_prompts() -> None:
    model, tokenizer = trilithon.load_model("byte-llama"), trilithon.load_tokenizer("byte-llama")
    assert tokenizer is not None
    llm = trilithon.compile(model, max_tokens=128, options=Options(max_batch=10))
    prompts = tokenizer([topics[name].strip()[:40] for name in sorted(topics)[:20]], return_tensors="pt").input_ids
    for ids in prompts.split([1, 1, 3, 5, 10]):
        want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, eos_token_id=None)
        assert torch.equal(llm.generate(ids, max_new_tokens=64, eos_token_id=None), want)


def test_a_used_decoder_starts_afresh() -> None:
    model = tiny("llama-3.2")
    llm = trilithon.compile(model, max_tokens=40)
    ids = torch.randint(3, 300, (1, 12), generator=torch.Generator().manual_seed(2))
    first = llm.generate(ids, max_new_tokens=20)
    llm.generate(ids[:, :5], max_new_tokens=30)
    assert torch.equal(llm.generate(ids, max_new_tokens=20), first)


@pytest.mark.timeout(300)
def test_inductor_prompts_and_steps_equal_eager() -> None:
    model = tiny("llama-3.2", layers=1)
    llm = trilithon.compile(model, max_tokens=40, options=Options(inductor=True))
    assert "prefill: compiled by Inductor, once for all lengths" in llm.report.notes
    ids = torch.randint(3, 300, (1, 12), generator=torch.Generator().manual_seed(3))
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(llm.generate(ids, max_new_tokens=20), want)


def test_minilm_with_real_weights() -> None:
    """A real encoder: its padding mask is proved, embeddings equal eager's, and it has no cache."""
    model, tokenizer = trilithon.load_model("minilm"), trilithon.load_tokenizer("minilm")
    assert tokenizer is not None
    llm = trilithon.compile(model)
    assert {str(site.mask) for site in llm.report.sites} == {"padding(attention_mask)"}
    assert all(site.verdict is Verdict.PROVED for site in llm.report.sites)
    batch = tokenizer(["attention is a matrix", "masks say who may look at whom, and when"], padding=True, return_tensors="pt")
    ids, mask = batch.input_ids, batch.attention_mask
    assert int(mask.sum()) < mask.numel()
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask).last_hidden_state
    output = llm(ids, attention_mask=mask)
    got = output[0] if isinstance(output, tuple) else output
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)
    with pytest.raises(trilithon.CannotCache, match="without attention_mask"):
        llm.generate(ids, max_new_tokens=3)


def test_lfm2_says_why_it_has_no_cache() -> None:
    """Its convolutions run over tokens."""
    model = FAMILIES["lfm2"].make()
    llm = trilithon.compile(model, max_tokens=32)
    with pytest.raises(trilithon.CannotCache, match=r"modeling_lfm2\.py:"):
        llm.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=2)
    assert any("no KV cache" in note for note in llm.report.notes)
