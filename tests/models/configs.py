"""One tiny configuration an architecture, with the head layout of the real model."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from trilithon.capture import hf

SMALL = {"num_hidden_layers": 2, "vocab_size": 300, "max_position_embeddings": 128}


def preset(name: str) -> Any:
    """A preset's own configuration with two layers, a small vocabulary and narrow layers: heads stay as they are."""
    make = hf.PRESETS[name].config
    assert make is not None
    config = make()
    config.num_hidden_layers, config.vocab_size, config.hidden_size, config.intermediate_size = 2, 300, 64, 96
    config.head_dim = 16
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    return config


def gpt2() -> Any:
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 300, "n_positions": 128}
    return transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)


def mistral() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.MistralConfig(**SMALL, **sizes, sliding_window=6, bos_token_id=None, eos_token_id=None)


def bert() -> Any:
    return transformers.BertConfig(**SMALL, hidden_size=32, intermediate_size=48, num_attention_heads=4)


CONFIGS = {
    "qwen2.5": lambda: preset("qwen2.5-0.5b"),
    "qwen3": lambda: preset("qwen3-0.6b"),
    "llama-3.2": lambda: preset("llama-3.2-1b"),
    "gpt2": gpt2,
    "mistral": mistral,
    "bert": bert,
}


def tiny(name: str, attention: str = "sdpa", layers: int = 2) -> nn.Module:
    """A random-weight model whose greedy tokens are not all alike."""
    config = CONFIGS[name]()
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    model = hf.from_config(config, attention=attention)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4.0)
    return model
