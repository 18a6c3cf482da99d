"""The largest of many numbers, found by pieces, is where PyTorch's argmax says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from trilithon.lower.native.argmax import PIECE, argmax_in_pieces, spread_argmax

aten = torch.ops.aten


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1, 300, PIECE, PIECE + 1, 3 * PIECE, 5 * PIECE - 1])
def test_agrees_with_argmax(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(4, 2, size, generator=torch.Generator().manual_seed(size)).to(dtype)  # halves have equals
    x[1, 0, -1], x[1, 1, 0] = 99.0, 99.0
    x[2], x[3, 0], x[3, 1, size // 2] = -torch.inf, 0.0, torch.nan
    assert torch.equal(argmax_in_pieces(x), x.argmax(-1))


def test_the_first_of_equals_in_other_pieces() -> None:
    x = torch.zeros(1, 3 * PIECE)
    x[0, [PIECE + 5, PIECE + 9, 2 * PIECE]] = 1.0
    assert argmax_in_pieces(x).tolist() == [PIECE + 5]


def test_whole_numbers() -> None:
    x = torch.arange(2 * PIECE)[None]
    assert argmax_in_pieces(x).tolist() == [2 * PIECE - 1]


@pytest.mark.parametrize(("arguments", "is_spread"), [((-1,), True), ((0,), False), ((), False), ((-1, True), False)])
def test_only_along_a_last_axis(arguments: tuple[int, ...], is_spread: bool) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(aten.argmax.default, (x, *arguments)))
    gm = GraphModule(torch.nn.Module(), graph)
    spread_argmax(gm)
    assert [node.target for node in gm.graph.nodes][1] == (argmax_in_pieces if is_spread else aten.argmax.default)
    given: Tensor = torch.randn(3, 2 * PIECE + 7)
    assert torch.equal(gm(given), aten.argmax.default(given, *arguments))
