"""The canonical op through PyTorch's kernels: each argument, from position 0 and over a cache, against the op itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from trilithon.lower.native.lower import lower_native
from trilithon.rewrite.op import ATTENTION
from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.bias_text import write_bias
from trilithon.spec.masks import H, K, Q

B_, H_, G_, D_ = 2, 4, 2, 8
BIASES = {
    "slope": float_term.apply("mul", "float32", t.read("x", (H,), "float"), float_term.to_float(K, "float32")),
    "table": t.read("x", (t.maximum(t.minimum(K - Q, t.integer(1)), t.integer(-2)) + 2,), "float"),
    "logarithm": float_term.function("log", "float32", float_term.to_float(t.maximum(Q - K, t.ZERO) + 1, "float32")),
    "of_cases": t.ite(
        float_term.compare("lt", float_term.to_float(K * K, "float16"), t.real(9.0)), t.real(0.7), t.read("x", (H,), "float")
    ),
}
SCORES: dict[str, dict[str, Any]] = {
    "plain": {},
    **{name: {"bias": write_bias(term, ["x"]), "tables": ["table"]} for name, term in BIASES.items()},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": "sinks"},
    "all": {"bias": write_bias(BIASES["slope"], ["x"]), "tables": ["table"], "softcap": 0.7, "sinks": "sinks"},
}
PLACES: dict[str, tuple[str, ...]] = {
    "sequence": (),
    "padded": ("key_mask",),
    "start": ("q_start",),
    "ring": ("q_start", "k_positions"),
    "padded_ring": ("q_start", "k_positions", "key_mask"),
    "ring_from_0": ("k_positions",),
}


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B_, heads, 6, D_, generator=make).to(dtype) for heads in (H_, G_, G_))
    return {
        "q": q[:, :, :3],
        "k": k,
        "v": v,
        "table": torch.tensor([0.5, -0.25, 0.125, 1.0], dtype=dtype),
        "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=dtype),
        "q_start": torch.tensor([2, 4]),
        "k_positions": torch.tensor([[4, 1, 2, 3, -2, 0], [4, 5, 6, 1, 2, 3]]),
        "key_mask": torch.tensor([[False, True, True, True, True, True], [True] * 6]),
    }


def lowered(arguments: dict[str, Any], given: dict[str, Tensor]) -> GraphModule:
    """A graph of one canonical node, after lowering; text arguments that name an input stand for it."""
    graph = Graph()
    nodes = {name: graph.placeholder(name) for name in given}
    for name, node in nodes.items():
        node.meta["val"] = given[name]

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(x) for x in value]
        return nodes[value] if isinstance(value, str) and value in nodes else value

    names = [argument.name for argument in ATTENTION._schema.arguments]
    defaults = {argument.name: argument.default_value for argument in ATTENTION._schema.arguments}
    args = tuple(filled(arguments.get(name, defaults[name])) for name in names)
    graph.output(graph.call_function(ATTENTION, args))
    return lower_native(GraphModule(torch.nn.Module(), graph))


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_agrees_with_the_op(scores: str, place: str, dtype: torch.dtype) -> None:
    given = inputs(dtype)
    for mask in ("causal", "window(3)", "full"):
        text = f"{mask} & padding(m)" if "key_mask" in PLACES[place] else mask
        arguments = {"q": "q", "k": "k", "v": "v", "mask": text, "scale": 0.3} | {name: name for name in PLACES[place]}
        arguments |= SCORES[scores]
        got = lowered(arguments, given)(*given.values())
        filled = {name: given.get(value, value) if isinstance(value, str) else value for name, value in arguments.items()}
        if "tables" in filled:
            filled["tables"] = [given["table"]]
        want = ATTENTION(**filled)
        seen = ~(want == 0).all(-1)  # over a cache, nothing reads a row without a key
        rows = seen if "q_start" in PLACES[place] or "k_positions" in PLACES[place] else torch.ones_like(seen)
        close = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(got[rows], want[rows], rtol=close, atol=close)
