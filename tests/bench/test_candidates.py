"""What the rows of a benchmark are made of: the sizes behind the floor, and the guards against a row that misleads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trilithon.bench.candidates import ROWS, candidates, decoder_size
from trilithon.capture import hf
from trilithon.errors import InputError


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "gpt2", "mistral-7b"])
def test_the_floor_counts_the_matrices_that_the_model_has(name):
    model = hf.load_model(name, device="meta", layers=2)
    size = decoder_size(model)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n and "lm_head" not in n)
    matrices -= sum(p.numel() for n, p in model.named_parameters() if n.split(".")[-2] in ("wte", "wpe"))
    assert size.layer_values == matrices
    assert size.head_values == model.get_output_embeddings().weight.numel()
    assert size.window_keys == (4096 if name == "mistral-7b" else None)


def test_rows_are_named_after_the_mask():
    model = hf.load_model("mistral-7b", device="meta", layers=1)
    names = [c.name for c in candidates(model, torch.zeros(1, 4, dtype=torch.int64), 2)]
    assert "Trilithon window(4096), no cache" in names
    assert len(names) == len(ROWS)


def test_only_a_causal_language_model_can_be_measured():
    with pytest.raises(InputError, match="cannot measure generation with Linear"):
        candidates(nn.Linear(2, 2), torch.zeros(1, 4, dtype=torch.int64), 2)
