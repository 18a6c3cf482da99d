"""The pass runner, and the small passes that tidy up."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node

from trilithon.errors import InputError, PassBroke
from trilithon.passes import Outcome, run_passes
from trilithon.prove.program import prover_of
from trilithon.rewrite.drop_proved_asserts import ASSERT, DropProvedAsserts
from trilithon.rewrite.erase_dead_masks import EraseDeadMasks
from trilithon.rewrite.program import seal, working_copy
from trilithon.rewrite.relax_views import RelaxViews

aten = torch.ops.aten


class Model(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, 4) * 2


def exported() -> ExportedProgram:
    axes = {0: Dim("s", min=2, max=64)}
    return torch.export.export(Model(), (torch.randn(6, 16),), dynamic_shapes=(axes,)).run_decompositions({})


def targets(gm: GraphModule) -> list[Any]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


@dataclass(frozen=True)
class Reverse:
    name: ClassVar[str] = "reverse"

    def __call__(self, gm: GraphModule) -> Outcome:
        calls = [n for n in gm.graph.nodes if n.op == "call_function"]
        calls[0].prepend(calls[-1])
        return Outcome(1)


@dataclass(frozen=True)
class Fail:
    error: Exception
    name: ClassVar[str] = "fail"

    def __call__(self, gm: GraphModule) -> Outcome:
        raise self.error


def test_a_broken_graph_names_the_pass() -> None:
    gm, _ = working_copy(exported())
    with pytest.raises(PassBroke) as caught:
        run_passes(gm, (EraseDeadMasks(), Reverse(), RelaxViews()))
    first, *_, last = str(caught.value).splitlines()
    assert first == "pass reverse left an invalid graph"
    assert "before it has been defined" in caught.value.why
    assert last == "  this is a bug of Trilithon: please report it"


def test_a_pass_that_raises_is_named() -> None:
    gm, _ = working_copy(exported())
    with pytest.raises(PassBroke) as caught:
        run_passes(gm, (Fail(KeyError("x")),))
    assert str(caught.value).startswith("pass fail failed\n  because KeyError: 'x'\n")
    with pytest.raises(InputError, match="as it is"):
        run_passes(gm, (Fail(InputError("as it is")),))


def test_the_hook_sees_each_pass_and_its_outcome() -> None:
    gm, _ = working_copy(exported())
    seen: list[tuple[str, int]] = []
    outcomes = run_passes(gm, (RelaxViews(), EraseDeadMasks()), lambda p, _, outcome: seen.append((p.name, outcome.changed)))
    assert [name for name, _ in seen] == ["relax-views", "erase-dead-masks"] == list(outcomes)
    assert [changed for _, changed in seen] == [o.changed for o in outcomes.values()]


def assert_that(gm: GraphModule, make: Any, bound: int) -> Node:
    """Insert an assertion that the size compares with `bound`."""
    output = gm.graph.output_node()
    x = next(n for n in gm.graph.nodes if n.op == "placeholder")
    with gm.graph.inserting_before(output):
        size = gm.graph.call_function(aten.sym_size.int, (x, 0))
        size.meta["val"] = x.meta["val"].shape[0]
        holds = gm.graph.call_function(make, (size, bound))
        holds.meta["val"] = make(size.meta["val"], bound)
        return gm.graph.call_function(ASSERT, (holds, f"{make.__name__} {bound}"))


def test_provable_assertions_go_and_others_stay() -> None:
    program = exported()
    gm, _ = working_copy(program)
    for make, bound in ((operator.le, 64), (operator.ge, 2), (operator.ne, 65)):
        assert_that(gm, make, bound)
    kept = [assert_that(gm, make, bound) for make, bound in ((operator.le, 63), (operator.ge, 3), (operator.ne, 10))]
    assert DropProvedAsserts(prover_of(program))(gm).changed == 3
    assert [n for n in gm.graph.nodes if n.target is ASSERT] == kept
    run_passes(gm, (EraseDeadMasks(),))
    assert [n for n in gm.graph.nodes if n.target is ASSERT] == kept, "an assertion is an effect"


def test_an_assertion_about_data_stays() -> None:
    program = exported()
    gm, _ = working_copy(program)
    node = assert_that(gm, operator.le, 64)
    node.args[0].meta.pop("val")
    assert DropProvedAsserts(prover_of(program))(gm).changed == 0


def test_views_become_reshapes() -> None:
    program = exported()
    gm, _ = working_copy(program)
    assert RelaxViews()(gm).changed == 1
    assert aten.reshape.default in targets(gm) and aten.view.default not in targets(gm)
    x = torch.randn(5, 16)
    assert torch.equal(seal(gm, program).module()(x), Model()(x))


def test_dead_chains_go_random_ones_too() -> None:
    gm, _ = working_copy(exported())
    before = targets(gm)
    x = next(n for n in gm.graph.nodes if n.op == "placeholder")
    with gm.graph.inserting_before(gm.graph.output_node()):
        mask = gm.graph.call_function(aten.gt.Scalar, (x, 0))
        gm.graph.call_function(aten.dropout.default, (gm.graph.call_function(aten.neg.default, (mask,)), 0.5, True))
    assert EraseDeadMasks()(gm).changed == 3
    assert targets(gm) == before
    assert EraseDeadMasks()(gm).changed == 0


def test_writes_are_not_dead() -> None:
    gm, _ = working_copy(exported())
    x = next(n for n in gm.graph.nodes if n.op == "placeholder")
    with gm.graph.inserting_before(gm.graph.output_node()):
        write = gm.graph.call_function(aten.zero_.default, (x,))
    EraseDeadMasks()(gm)
    assert write in gm.graph.nodes
