"""What cached programs call beside ATen, as TensorRT layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from one_layer import trt  # noqa: F401 (skips without TensorRT)
from trilithon.lower.inputs import Axis, Input, fixed
from trilithon.lower.tensorrt.convert import convert
from trilithon.lower.tensorrt.interpret import interpret
from trilithon.rewrite.cache_ops import last_tokens, real_positions, token_positions


@pytest.mark.parametrize("tokens", [fixed(1), Axis(1, 5, 9)], ids=["one token", "several"])
def test_positions_and_last_tokens(tokens: Axis) -> None:
    graph = Graph()
    x, start, counts = (graph.placeholder(name) for name in ("x", "start", "counts"))
    size = graph.call_function(torch.ops.aten.sym_size.int, (x, 1))
    positions = graph.call_function(token_positions, (start, size))
    inside = graph.call_function(real_positions, (positions, start, counts))
    graph.output((positions, inside, graph.call_function(last_tokens, (x, counts))))
    gm, rows = GraphModule(nn.Module(), graph), Axis(1, 3, 4)
    own = [Input(name, torch.int64, (rows,)) for name in ("start", "counts")]
    net = convert(gm, [Input("x", torch.float32, (rows, tokens, fixed(6))), *own])
    s = tokens.best
    given = {"x": torch.randn(3, s, 6), "start": torch.tensor([0, 4, 7]), "counts": torch.tensor([s, 1, max(1, s - 2)])}
    got, want = interpret(net, given), gm(*given.values())
    for i, meant in enumerate(want):
        assert torch.equal(got[f"output_{i}"], meant)
