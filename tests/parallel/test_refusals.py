"""What ranks cannot share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import trilithon
from parallel.together import Together
from trilithon.errors import CaptureError, InputError


class Sloped(nn.Module):
    """Attention with ALiBi, whose slopes follow from how many heads there are."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.num_heads, self.num_key_value_groups = 8, 4, 1
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (p(x).view(b, s, -1, 8).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        slopes = torch.arange(1, q.shape[1] + 1).view(-1, 1, 1).float() * self.slope
        places = torch.arange(s)
        bias = (slopes * places).masked_fill(places > places[:, None], float("-inf"))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        return self.o_proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    slope = 0.5


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Sloped()

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)  # type: ignore[no-any-return]


def sloped(slope: float) -> str:
    """The text that refuses it."""
    torch.manual_seed(0)
    model: Any = Model().eval()
    model.attn.slope = slope
    plan = {f"attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {"attn.o_proj": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    example = {"x": torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))}
    with pytest.raises(trilithon.TrilithonError) as refused:
        trilithon.explain(model, example)
    return f"{type(refused.value).__name__}: {refused.value}"


def test_slopes_of_heads_are_refused(pair: Together):
    for slope in (0.5, 1e-7):  # the second is too small for the comparison of shares with the model to see
        for text in pair(sloped, slope):
            assert "CaptureError: cannot share the heads of attn among ranks" in text or "VerificationFailed" in text, text
    assert "its mask, bias or sinks differ from head to head, and a rank counts its heads from 0" in text


def test_without_a_process_group_nothing_is_shared():
    with pytest.raises(InputError) as refused:
        trilithon.tensor_parallel(nn.Linear(2, 2))
    assert str(refused.value) == (
        "cannot share a model among ranks\n  because there is no process group\n"
        "  start with torchrun, and call torch.distributed.init_process_group() first"
    )


def unplanned() -> str:
    with pytest.raises(CaptureError) as refused:
        trilithon.tensor_parallel(nn.Linear(2, 2))
    return str(refused.value)


def test_a_model_without_a_plan_is_refused(pair: Together):
    text = (
        "cannot share Linear among ranks\n  because it has no tp_plan, and none of its parameters is a DTensor\n"
        "  use torch.distributed.tensor.parallel.parallelize_module on it first, or run it on one rank"
    )
    assert pair(unplanned) == [text] * 2
