"""A compiled model gives its memory back when nobody refers to it."""

from __future__ import annotations

import gc

import pytest
import torch

from runtime.dropped import compiled_and_dropped, holders

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("by", ["op by op", "inductor", "torch's caches emptied"])
def test_a_dropped_model_gives_its_memory_back(by: str) -> None:
    """Torch's compiler may keep what it has compiled until it is told to forget."""
    before = torch.cuda.memory_allocated()
    refs = compiled_and_dropped("cuda", inductor=by != "op by op")
    if by == "torch's caches emptied":
        torch._dynamo.reset()
    gc.collect()
    for each in refs:
        assert each() is None, holders(each())
    assert torch.cuda.memory_allocated() - before < 2**26  # workspaces of cuBLAS
