"""A dynamic head count is restored where the sizes around it decide it, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node

from trilithon.rewrite.program import seal, working_copy
from trilithon.rewrite.restore_static_heads import VIEW, RestoreStaticHeads


class Split(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        heads = x.view(x.shape[0], x.shape[1], -1, 4)
        return heads.transpose(1, 2) * 2


class Merge(nn.Module):
    """The leading sizes change: the number of heads is not decided by the width."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0] * x.shape[1], -1, 4) * 2


def exported(module: nn.Module) -> ExportedProgram:
    axes = {0: Dim("b", max=8), 1: Dim("s", max=64)}
    return torch.export.export(module, (torch.randn(2, 6, 16),), dynamic_shapes=(axes,)).run_decompositions({})


def forget(gm: GraphModule, *axes: int) -> Node:
    """Make sizes of the view dynamic, as a model does whose head count comes from a tensor's shape."""
    (node,) = (n for n in gm.graph.nodes if n.target in VIEW)
    mode: Any = detect_fake_mode([node.meta["val"]])
    sizes = list(node.meta["val"].shape)
    for axis in axes:
        sizes[axis] = mode.shape_env.create_unbacked_symint()
    with mode:
        node.meta["val"] = torch.empty(sizes)
    arguments = list(node.args[1])
    arguments[axes[0]] = -1
    node.args = (node.args[0], arguments)
    return node


def test_the_number_is_restored() -> None:
    program = exported(Split())
    gm, _ = working_copy(program)
    node = forget(gm, 2)
    assert RestoreStaticHeads()(gm).changed == 1
    assert node.args[1][2] == 4
    behind = gm.graph.output_node().args[0][0].meta["val"].shape
    assert behind[1] == 4 and isinstance(behind[1], int)
    x = torch.randn(3, 9, 16)
    assert torch.equal(seal(gm, program).module()(x), Split()(x))


def test_a_second_run_changes_nothing() -> None:
    gm, _ = working_copy(exported(Split()))
    forget(gm, 2)
    RestoreStaticHeads()(gm)
    assert RestoreStaticHeads()(gm).changed == 0


@pytest.mark.parametrize("axes", [(2, 3), (1, 2)], ids=["two_unknown", "tokens_unknown"])
def test_an_undecided_number_stays(axes: tuple[int, ...]) -> None:
    gm, _ = working_copy(exported(Split()))
    node = forget(gm, *axes)
    before = node.args
    assert RestoreStaticHeads()(gm).changed == 0
    assert node.args == before


def test_other_leading_sizes_stay() -> None:
    gm, _ = working_copy(exported(Merge()))
    forget(gm, 1)
    assert RestoreStaticHeads()(gm).changed == 0
