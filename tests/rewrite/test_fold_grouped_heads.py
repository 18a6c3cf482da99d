"""Repeated key and value heads are folded only where the repetition is the canonical op's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import scaled_dot_product_attention

from trilithon.compiler import lower
from trilithon.rewrite.op import ATTENTION

Heads = Callable[[Tensor], Tensor]


def repeat_kv(x: Tensor, n: int = 2) -> Tensor:
    """As transformers writes it."""
    b, g, t, d = x.shape
    return x[:, :, None, :, :].expand(b, g, n, t, d).reshape(b, g * n, t, d)


def tiled(x: Tensor, n: int = 2) -> Tensor:
    """Head i of the result is head `i % g`: the other order."""
    b, g, t, d = x.shape
    return x[:, None].expand(b, n, g, t, d).reshape(b, g * n, t, d)


class Attend(nn.Module):
    def __init__(self, keys: Heads, values: Heads) -> None:
        super().__init__()
        self.keys, self.values = keys, values

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, self.keys(k), self.values(v), is_causal=True)


def inputs(b: int = 2, s: int = 6, h: int = 4, g: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    return tuple(torch.randn(b, n, s, 8, generator=make, dtype=torch.float64) for n in (h, g, g))  # type: ignore[return-value]


def rewritten(keys: Heads, values: Heads, h: int = 4) -> tuple[ExportedProgram, int, int]:
    """The rewritten program, and the heads that its attention gets of keys and values."""
    axes = {0: Dim("b", max=8), 2: Dim("s", max=64)}
    module = Attend(keys, values).eval()
    program = lower(torch.export.export(module, inputs(h=h), dynamic_shapes=(axes, axes, axes)))
    for sizes in ((2, 6), (3, 9)):
        args = inputs(*sizes, h=h)
        assert (program.module()(*args) - module(*args)).abs().max() < 1e-12
    (node,) = (n for n in program.graph.nodes if n.target is ATTENTION)
    return program, int(node.args[1].meta["val"].shape[1]), int(node.args[2].meta["val"].shape[1])


@pytest.mark.parametrize("n", [2, 3])
def test_repeat_kv_folds(n: int) -> None:
    program, keys, values = rewritten(lambda x: repeat_kv(x, n), lambda x: repeat_kv(x, n), h=2 * n)
    assert (keys, values) == (2, 2)
    assert "expand" not in str(program.graph)


def test_repeat_kv_of_a_permuted_tensor_folds_to_that_tensor() -> None:
    swap = lambda x: repeat_kv(x[:, [1, 0]])  # noqa: E731
    program, keys, values = rewritten(swap, repeat_kv)
    assert (keys, values) == (2, 2)
    assert "index" in str(program.graph)


def test_one_head_for_all_folds() -> None:
    one = lambda x: repeat_kv(x[:, :1], 4)  # noqa: E731
    assert rewritten(one, one)[1:] == (1, 1)


def test_repeat_interleave_keeps_its_meaning() -> None:
    interleave = lambda x: x.repeat_interleave(2, dim=1)  # noqa: E731
    _, keys, values = rewritten(interleave, interleave)
    assert keys == values and keys in (2, 4)


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (tiled, tiled),
        (tiled, repeat_kv),
        (repeat_kv, tiled),
        (lambda x: x.repeat(1, 2, 1, 1), lambda x: x.repeat(1, 2, 1, 1)),
        (lambda x: repeat_kv(x)[:, [1, 0, 2, 3]], repeat_kv),
        (lambda x: repeat_kv(x)[:, [2, 3, 0, 1]], repeat_kv),
        (lambda x: repeat_kv(x).flip(2), repeat_kv),
    ],
    ids=["tiled", "tiled_keys", "tiled_values", "repeat", "permuted", "groups_swapped", "tokens_flipped"],
)
def test_near_misses_stay(keys: Heads, values: Heads) -> None:
    assert rewritten(keys, values)[1:] == (4, 4)


def test_keys_and_values_with_other_head_counts_stay() -> None:
    one = lambda x: repeat_kv(x[:, :1], 4)  # noqa: E731
    assert rewritten(repeat_kv, one)[1:] == (4, 4)
