"""Example calls of Hugging Face models to export them with: a tensor and its dynamic axes for each usual input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from trilithon.errors import InputError

# The dynamic axes of each input: batch, tokens (of the decoder, where there are two stacks), tokens of the encoder.
AXES: dict[str, tuple[str, ...]] = {
    "input_ids": ("b", "s"),
    "position_ids": ("b", "s"),
    "attention_mask": ("b", "s"),
    "token_type_ids": ("b", "s"),
    "inputs_embeds": ("b", "s"),
    "decoder_input_ids": ("b", "t"),
    "decoder_attention_mask": ("b", "t"),
    "pixel_values": ("b",),
    "input_features": ("b",),
}
TOKENS = {"s": 16, "t": 12}  # axis -> size in the example


def make_example(
    config: Any, inputs: tuple[str, ...], longest: int, max_batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments and dynamic shapes for `inputs`, names among `AXES`.

    Args:
        longest: upper bound of the token axes.
        max_batch: upper bound of the batch axis.
        dtype: of embeddings, pixels and features.
    """
    unknown = [name for name in inputs if name not in AXES]
    if unknown:
        raise InputError(
            f"no example for the input {unknown[0]!r}", todo=f"pass example_kwargs; known names: {', '.join(AXES)}"
        )
    dims = {"b": Dim("b", min=1, max=max_batch)} | {name: Dim(name, min=1, max=longest) for name in TOKENS}
    example = {name: _tensor(name, config, longest, dtype).to(device) for name in inputs}
    shapes = {name: {i: dims[axis] for i, axis in enumerate(AXES[name])} for name in inputs}
    return example, shapes


def _tensor(name: str, config: Any, longest: int, dtype: torch.dtype) -> Tensor:
    b, axes = 2, AXES[name]
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        height, width = (vision.image_size,) * 2 if isinstance(vision.image_size, int) else vision.image_size
        return torch.zeros(b, getattr(vision, "num_channels", 3), height, width, dtype=dtype)
    if name == "input_features":
        return torch.zeros(b, config.num_mel_bins, 2 * config.max_source_positions, dtype=dtype)
    tokens = min(TOKENS[axes[1]], longest)
    if name == "inputs_embeds":
        text = config.get_text_config()
        return torch.zeros(b, tokens, getattr(text, "embedding_size", None) or text.hidden_size, dtype=dtype)
    if name == "position_ids":
        return torch.arange(tokens).expand(b, tokens).contiguous()
    if name in ("attention_mask", "decoder_attention_mask"):
        return torch.ones(b, tokens, dtype=torch.int64)
    if name == "token_type_ids":
        return torch.zeros(b, tokens, dtype=torch.int64)
    return torch.arange(b * tokens).view(b, tokens) % 7
