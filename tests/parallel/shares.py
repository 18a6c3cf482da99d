"""Small models, their tokens in one process, and what ranks compile of them; each made once in a process."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.export import ExportedProgram

import trilithon
from models import configs
from trilithon import Options, compiler
from trilithon.capture import hf

NEW, CAPACITY = 12, 32


def small(name: str) -> nn.Module:
    """One layer; weights so large that tokens differ. `qwen3-0.6b:9:3` has 9 query heads and 3 of keys and values."""
    preset, *heads = name.split(":")
    config = configs.preset(preset)
    if heads:
        config.num_attention_heads, config.num_key_value_heads = map(int, heads)
    config.max_position_embeddings = 16384  # masks of all presets are proved for the same sizes, once
    config.num_hidden_layers, config.initializer_range, config.vocab_size = 1, 0.3, 301  # which does not divide
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    return hf.from_config(config)


def prompts() -> Tensor:
    return torch.randint(0, 301, (2, 7), generator=torch.Generator().manual_seed(0))


@cache
def alone(preset: str) -> list[list[int]]:
    model: Any = small(preset)
    return model.generate(prompts(), max_new_tokens=NEW, do_sample=False).tolist()  # type: ignore[no-any-return]


def parallelised(model: Any) -> nn.Module:
    """By PyTorch's own styles."""
    layer = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
    layer |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        parallelize_module(block, mesh, layer)
    return model  # type: ignore[no-any-return]


@cache  # of a rank that lives through several tests
def compiled(preset: str, by_hand: bool = False) -> tuple[trilithon.Compiled, ExportedProgram]:
    """The share, and the program that it was made of."""
    model, kept = small(preset), list[compiler.Analysis]()
    given = parallelised(model) if by_hand else trilithon.tensor_parallel(model)

    def analyse(*arguments: Any, **more: Any) -> compiler.Analysis:
        kept.append(own(*arguments, **more))
        return kept[-1]

    own = compiler.analyse
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "analyse", analyse)
        made = trilithon.compile(given, max_tokens=CAPACITY, backend="native", options=Options(max_batch=2))
    return made, kept[0].rewritten
