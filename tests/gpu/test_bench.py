"""What rows of a bench leave behind on a GPU."""

from __future__ import annotations

import pytest
import torch

from trilithon.bench.rows import free
from trilithon.lower.cuda_graph import captured

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_workspaces_are_given_back_where_no_graph_reads_them() -> None:
    """A row is not charged with the workspaces of rows before; a graph that is alive makes the same as before."""
    free()
    before = torch.cuda.memory_allocated()
    x = torch.randn(256, 256, device="cuda").half()
    with torch.cuda.stream(torch.cuda.Stream()):
        expected = x @ x
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() > before + 2**20, "there is no workspace to give back"
    graph, made = captured(lambda: x @ x)
    free()
    held = torch.cuda.memory_allocated()
    filler = torch.full((2**27,), 7, dtype=torch.uint8, device="cuda")
    graph.replay()
    assert torch.equal(made, expected) and bool((filler == 7).all())
    del graph, made, filler
    free()
    assert torch.cuda.memory_allocated() < min(held, before + 2**20)
