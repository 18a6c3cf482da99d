"""A compiled model gives its memory back when nobody refers to it."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

import trilithon
from runtime.dropped import compiled_and_dropped, holders
from trilithon.lower.native.fused.launch import TUNED_SLOTS

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


def test_a_compilation_leaves_no_memory_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even until Python looks for cycles: kernels are measured with caches of full size."""
    monkeypatch.setenv("TRILITHON_CACHE", str(tmp_path))  # else they may have been measured before
    model = trilithon.load_model("qwen3-0.6b", device="cuda", layers=8, dtype=torch.float16)
    gc.collect()
    gc.disable()
    try:
        before = torch.cuda.memory_allocated()
        llm = trilithon.compile(model, max_tokens=TUNED_SLOTS)
        left = torch.cuda.memory_allocated() - before - llm.decoder.cache_bytes
    finally:
        gc.enable()
    caches = 8 * 2 * 8 * TUNED_SLOTS * 128 * 2  # 71 MB
    assert left < 2**26 + caches / 2, f"{left / 1e6:.0f} MB"  # cuBLAS has workspaces of 64 MB
