"""How each kind of model is exported: the inputs of a call, with or without a static cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import StaticCache

from trilithon.capture import hf
from zoo.families import Family, Kind

PLAIN: dict[Kind, dict[str, tuple[str, ...]]] = {
    "decoder": {
        "ids": ("input_ids",),
        "ids+positions": ("input_ids", "position_ids"),
        "ids+padding": ("input_ids", "attention_mask"),
        "ids+both": ("input_ids", "attention_mask", "position_ids"),
        "embeds": ("inputs_embeds",),
    },
    "encoder": {
        "ids": ("input_ids",),
        "ids+padding": ("input_ids", "attention_mask"),
        "embeds": ("inputs_embeds",),
    },
    "seq2seq": {
        "ids": ("input_ids", "decoder_input_ids"),
        "ids+padding": ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"),
    },
    "vision": {"pixels": ("pixel_values",)},
}
CACHED = ("static-prefill", "static-step")
CAPACITY = 32


class WithStaticCache(nn.Module):
    """A causal model over a static cache that it writes at `start`, in place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
        with torch.no_grad():  # the first call makes the buffers, of whatever heads the model has
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64), past_key_values=self.cache, use_cache=True)
        self.cache.reset()
        for i, layer in enumerate(self.cache.layers):
            self.register_buffer(f"key_{i}", layer.keys, persistent=False)
            self.register_buffer(f"value_{i}", layer.values, persistent=False)
            self.register_buffer(f"length_{i}", layer.cumulative_length, persistent=False)

    def forward(self, input_ids: Tensor, start: Tensor) -> Tensor:
        for i, layer in enumerate(self.cache.layers):
            layer.keys, layer.values, layer.cumulative_length = (getattr(self, f"{n}_{i}") for n in ("key", "value", "length"))
            layer.cumulative_length.copy_(start[0])
        positions = (start + torch.arange(input_ids.shape[1], device=input_ids.device))[None]
        return self.model(input_ids=input_ids, position_ids=positions, past_key_values=self.cache, use_cache=True).logits  # type: ignore[no-any-return]


def modes_of(family: Family) -> tuple[str, ...]:
    return (*PLAIN[family.kind], *(CACHED if family.kind == "decoder" else ()))


def call_of(family: Family, model: nn.Module, mode: str) -> tuple[nn.Module, dict[str, Any], Any]:
    """The module to export, its example and its dynamic shapes."""
    if mode in CACHED:
        tokens = 1 if mode == "static-step" else 5
        example = {"input_ids": torch.arange(tokens)[None], "start": torch.zeros(1, dtype=torch.int64)}
        fixed = tokens == 1 or getattr(model.config, "sliding_window", None)  # a window's cache branches on the length
        dynamic = {} if fixed else {1: Dim("s", min=1, max=CAPACITY)}
        return WithStaticCache(model).eval(), example, {"input_ids": dynamic, "start": {}}
    inputs = PLAIN[family.kind][mode]
    if family.config == "Whisper":
        inputs = tuple("input_features" if name == "input_ids" else name for name in inputs if name != "attention_mask")
    return model, *hf.example_for(model, inputs)
