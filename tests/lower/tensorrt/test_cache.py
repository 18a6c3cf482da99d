"""What cached programs call beside ATen, as TensorRT layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from models.configs import tiny
from one_layer import trt  # noqa: F401 (skips without TensorRT)
from trilithon.capture import hf
from trilithon.compiler import analyse
from trilithon.lower.inputs import Axis, Input, cached_inputs, fixed
from trilithon.lower.tensorrt.convert import convert
from trilithon.lower.tensorrt.interpret import interpret
from trilithon.lower.tensorrt.lower import _infer
from trilithon.lower.tensorrt.partition import engines, split
from trilithon.options import Options
from trilithon.rewrite.cache_ops import last_tokens, real_positions, token_positions
from trilithon.rewrite.insert_cache import cache_shapes, insert_cache


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


def prompt_of_ids() -> tuple[Any, tuple[Input, ...]]:
    """A prompt's program of a Llama that was exported with ids alone: its rows get positions of their own."""
    model = tiny("llama-3.2")
    example, shapes = hf.example_for(model, ("input_ids",))
    program = analyse(model, example, shapes, (), Options()).rewritten
    gm = insert_cache(program, "prompt", rings=False)
    return gm, cached_inputs(gm, cache_shapes(program, rings=False), 32, 2)


def test_positions_of_rows_need_no_pytorch() -> None:
    gm, inputs = prompt_of_ids()
    assert len(convert(gm, inputs).sites) == 2


def test_parts_are_in_order() -> None:
    """A part may be given a size before the tensor that it is read off."""
    gm, inputs = prompt_of_ids()
    _infer(gm, inputs)
    lost = next(n.name for n in gm.graph.nodes if n.target is torch.ops.aten.squeeze.dim)
    whole = split(gm, {lost: "for a test"})
    parts = engines(whole)
    assert parts
    for _, part in parts:
        part.graph.lint()
