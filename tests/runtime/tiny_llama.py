"""A Llama of two narrow layers whose tokens vary."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 61


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.6,  # large, so that the tokens vary
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()


def tiny_parrot(seed: int = 0) -> LlamaForCausalLM:
    """One that hardly attends: a token says most of what comes next, so that its text repeats itself for a while."""
    model = tiny_llama(seed)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.mul_(0.02)
    return model
