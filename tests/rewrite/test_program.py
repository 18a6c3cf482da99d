"""A rewritten program is an ordinary ExportedProgram; and sites are read right, whatever op makes them."""

from __future__ import annotations

import io
from operator import getitem
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, Node
from torch.nn.functional import scaled_dot_product_attention

from trilithon.capture.sites import FUSED, Site, find_sites
from trilithon.compiler import lower
from trilithon.rewrite.op import ATTENTION

aten = torch.ops.aten


class Eager(nn.Module):
    """Attention written out, as transformers' eager attention does it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q.shape[2]
        mask = torch.triu(torch.full((s, s), -torch.inf, dtype=q.dtype), diagonal=1)
        weights = torch.softmax(q @ k.transpose(2, 3) * 0.25 + mask, dim=-1)
        return weights @ v


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        mask = (i[None] <= i[:, None]) & (i[None] > i[:, None] - 3)
        return scaled_dot_product_attention(q * self.scale, k, v, attn_mask=mask)


def inputs(b: int = 2, s: int = 6) -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(0)
    return tuple(torch.randn(b, 2, s, 8, generator=make, dtype=torch.float64) for _ in "qkv")


def exported(module: nn.Module) -> ExportedProgram:
    axes = {0: Dim("b", min=1, max=8), 2: Dim("s", min=1, max=64)}
    return torch.export.export(module.eval(), inputs(), dynamic_shapes=(axes, axes, axes))


@pytest.mark.parametrize(("module", "mask", "scale"), [(Eager(), "causal", 0.25), (Fused(), "window(3)", 8**-0.5)])
def test_rewritten_equals_the_original(module: nn.Module, mask: str, scale: float) -> None:
    program = exported(module)
    before = str(program.graph)
    changed = lower(program)
    (node,) = (n for n in changed.graph.nodes if n.target is ATTENTION)
    assert node.args[3] == mask and node.args[4] == pytest.approx(scale)
    assert "softmax" not in str(changed.graph) and "scaled_dot_product" not in str(changed.graph)
    for sizes in ((2, 6), (1, 1), (3, 17)):
        got, want = changed.module()(*inputs(*sizes)), module(*inputs(*sizes))
        assert (got - want).abs().max() < 1e-12
    assert str(program.graph) == before
    assert torch.equal(program.module()(*inputs()), module(*inputs()))


def test_rewritten_can_be_saved_and_loaded() -> None:
    changed = lower(exported(Fused()))
    held = io.BytesIO()
    torch.export.save(changed, held)
    held.seek(0)
    loaded = torch.export.load(held)
    assert any(n.target is ATTENTION for n in loaded.graph.nodes)
    assert torch.equal(loaded.module()(*inputs(3, 9)), changed.module()(*inputs(3, 9)))


def test_rewriting_again_changes_nothing() -> None:
    once = lower(exported(Eager()))
    twice = lower(once)
    assert [n.target for n in twice.graph.nodes] == [n.target for n in once.graph.nodes]


OVERLOADS = {kind: target for target, kind in FUSED.items()}


def built(kind: str, masked: bool, positional: tuple[Any, ...], outputs: int, **named: Any) -> tuple[Graph, Node | None]:
    """A graph with one fused call, as torch's own decompositions and compilers leave it; and its mask."""
    graph = Graph()
    q, k, v, mask = (graph.placeholder(name) for name in ("q", "k", "v", "mask"))
    for node, shape in ((q, (2, 4, 6, 8)), (k, (2, 4, 7, 8)), (v, (2, 4, 7, 8)), (mask, (2, 1, 6, 7))):
        node.meta["val"] = torch.empty(shape, device="meta")
    given = mask if masked else None
    fill = {a: given if a == "MASK" else a for a in ("MASK",)}
    args = tuple(fill.get(a, a) if isinstance(a, str) else a for a in positional)
    kwargs = {name: given if value == "MASK" else value for name, value in named.items()}
    call = graph.call_function(OVERLOADS[kind], (q, k, v, *args), kwargs)
    result = torch.empty(2, 4, 6, 8, device="meta")
    call.meta["val"] = result if outputs == 1 else (result,) * outputs
    first = call
    if outputs > 1:
        first = graph.call_function(getitem, (call, 0))
        first.meta["val"] = result
    graph.output((first,))
    return graph, given


CALLS: dict[str, tuple[str, bool, tuple[Any, ...], int, dict[str, Any], bool, float | None]] = {
    "sdpa_mask": ("sdpa", True, ("MASK",), 1, {"scale": 0.5}, False, 0.5),
    "sdpa_causal": ("sdpa", False, (None, 0.0, True), 1, {}, True, None),
    "efficient_mask": ("efficient", True, ("MASK", False), 4, {"scale": 0.5}, False, 0.5),
    "efficient_causal": ("efficient", False, (None, True, 0.0, True), 4, {}, True, None),
    "flash": ("flash", False, (0.0, False), 9, {"scale": 0.25}, False, 0.25),
    "flash_causal": ("flash", False, (0.0, True), 9, {}, True, None),
    "flash_for_cpu_mask": ("flash_for_cpu", True, (0.0, False), 2, {"attn_mask": "MASK", "scale": 0.5}, False, 0.5),
    "flash_for_cpu_causal": ("flash_for_cpu", False, (0.0, True), 2, {}, True, None),
    "cudnn_mask": ("cudnn", True, ("MASK", False), 9, {"scale": 2.0}, False, 2.0),
    "cudnn_causal": ("cudnn", False, (None, True, 0.0, True), 9, {}, True, None),
}


@pytest.mark.parametrize("name", CALLS)
def test_fused_calls_are_read_by_their_schema(name: str) -> None:
    kind, masked, positional, outputs, named, is_causal, scale = CALLS[name]
    graph, mask = built(kind, masked, positional, outputs, **named)
    (site,) = find_sites(graph)
    assert (site.kind, site.is_causal, site.scale, site.problem) == (kind, is_causal, scale, "")
    assert site.mask is mask
    assert site.softmax_scale == pytest.approx(scale if scale is not None else 8**-0.5)
    assert [n.name for n in (site.q, site.k, site.v)] == ["q", "k", "v"]
    assert site.dims == (2, 4, 6, 7)
    assert site.output.meta["val"].shape == (2, 4, 6, 8)


def test_every_fused_kind_has_a_row() -> None:
    assert {kind for kind, *_ in CALLS.values()} == set(FUSED.values())


def only(graph: Graph) -> Site:
    (site,) = find_sites(graph)
    return site


def test_dropout_is_a_problem() -> None:
    graph, _ = built("flash", False, (0.1, True), 9)
    assert only(graph).problem == "dropout_p=0.1: call model.eval() before exporting"


def test_a_used_log_sum_exp_is_a_problem() -> None:
    graph, _ = built("efficient", True, ("MASK", True), 4)
    call = next(n for n in graph.nodes if n.target is OVERLOADS["efficient"])
    output = graph.output_node()
    with graph.inserting_before(output):
        second = graph.call_function(getitem, (call, 1))
    output.args = ((*output.args[0], second),)
    assert only(graph).problem == "its log-sum-exp or debug outputs are used"


class Broadcast(nn.Module):
    """Keys and values of one batch row serve every query row."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q @ k[:1].transpose(2, 3), dim=-1)
        return weights @ v[:1]


def test_operands_that_only_broadcast_stay() -> None:
    module = Broadcast()
    changed = lower(exported(module))
    assert (changed.module()(*inputs()) - module(*inputs())).abs().max() < 1e-12


def test_an_input_may_be_called_input() -> None:
    """fx takes the names of Python's own functions for itself."""

    class Model(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return scaled_dot_product_attention(input, input, input, is_causal=True)

    program = torch.export.export(Model().eval(), (torch.randn(1, 2, 5, 8),), dynamic_shapes={"input": {2: Dim("s")}})
    lowered = lower(program)
    assert lowered.graph.find_nodes(op="call_function", target=ATTENTION)
    longer = torch.randn(1, 2, 9, 8)
    torch.testing.assert_close(lowered.module()(longer), Model()(longer))
