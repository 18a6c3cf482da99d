"""Programs made functional by rewriting are those that torch.export makes by tracing anew, and the rest is left to it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from trilithon.capture import functional as functional_module
from trilithon.capture import hf
from trilithon.capture.export import capture
from trilithon.capture.functional import functional
from zoo.families import FAMILIES

aten = torch.ops.aten
SIZES = {aten.sym_size.int}  # written once or more


class Calls(nn.Module):
    def __init__(self, call: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(x)


def exported(call: Callable[[Tensor], Any], x: Tensor | None = None) -> ExportedProgram:
    x = torch.randn(2, 4, 6) if x is None else x
    shapes = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    return torch.export.export(Calls(call).eval(), (), {"x": x}, dynamic_shapes=shapes, strict=False)


def operations(program: ExportedProgram) -> Counter[Any]:
    """Without assertions, which a second trace repeats."""
    found = Counter(n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload))
    return Counter({op: n for op, n in found.items() if "assert" not in str(op) and op not in SIZES})


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[ExportedProgram]:
    """The programs that are traced anew."""
    seen: list[ExportedProgram] = []
    own = ExportedProgram.run_decompositions

    def run(program: ExportedProgram, table: Any = None) -> ExportedProgram:
        seen.append(program)
        return own(program, table)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", run)
    return seen


@pytest.mark.parametrize("name", ["qwen3", "phi3", "glm", "gpt2"])
@torch.no_grad()
def test_a_model_is_rewritten_as_it_is_traced(name: str, traced: list[ExportedProgram]) -> None:
    torch.manual_seed(0)
    model = FAMILIES[name].make("sdpa").eval()
    example, shapes, *_ = hf.example_for(model, ("input_ids",))
    program = torch.export.export(
        model, (), dict(example), dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
    )
    again = functional(program, own=False)
    assert len(traced) == 1
    made = functional(program, own=True)
    assert len(traced) == 1 and operations(made) == operations(again)
    assert made.range_constraints == again.range_constraints and made.dialect == again.dialect
    longer = {key: torch.cat([x, x], 1) if isinstance(x, Tensor) else x for key, x in example.items()}
    for given in (example, longer):
        assert torch.equal(made.module()(**given).logits, again.module()(**given).logits)


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "to the same type": lambda x: x.to(torch.float32) + 1,
    "to another type": lambda x: x.to(torch.float16),
    "to a device and a type": lambda x: x.to("cpu", torch.float64),
    "contiguous": lambda x: x.transpose(0, 1).contiguous() * 2,
    "contiguous already": lambda x: x.contiguous() * 2,
    "reshape": lambda x: x.reshape(x.shape[0], -1) * 2,
    "reshape across strides": lambda x: x.transpose(0, 1).reshape(-1, 3, 2),
    "flatten": lambda x: x.flatten(0, 1) * 2,
    "flatten behind": lambda x: x.flatten(1) * 2,
    "flatten across strides": lambda x: x.transpose(0, 1).flatten(0, 1),
    "flatten one axis": lambda x: x.flatten(1, 1) * 2,
    "chunk": lambda x: torch.cat([-piece for piece in x.chunk(4, -1)], -1),
    "chunk from behind": lambda x: x.chunk(2, 2)[1],
    "dropout": lambda x: torch.dropout(x, 0.5, False) + 1,
    "several results": lambda x: (x.reshape(-1), x.to(torch.float32) * 1, [x.contiguous() + 1]),
    "dead": lambda x: (x.exp(), x + 1)[1],
}


@pytest.mark.parametrize("name", CALLS)
def test_each_rewrite_is_what_a_trace_makes(name: str, traced: list[ExportedProgram]) -> None:
    program = exported(CALLS[name])
    again = functional(program, own=False)
    made = functional(copy.deepcopy(program), own=True)
    assert len(traced) == 1 and operations(made) == operations(again)
    for rows, columns in ((2, 4), (3, 5), (7, 2)):
        x = torch.randn(rows, columns, 6)
        for found, expected in zip(*(torch.utils._pytree.tree_leaves(p.module()(x=x)) for p in (made, again)), strict=True):
            assert torch.equal(found, expected) and found.stride() == expected.stride()


def in_place(x: Tensor) -> Tensor:
    made = x + 1
    made.mul_(2)
    return made


LEFT: dict[str, Callable[[Tensor], Any]] = {
    "in place": in_place,
    "a slice in place": lambda x: torch.zeros_like(x).index_put_((torch.tensor([0]),), x[:1]),
    "a constant": lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
    "an input as it is": lambda x: (x.to(torch.float32), x + 1),
    "another composite operation": lambda x: x.movedim(0, 1) + 1,
    "a copy that is asked for": lambda x: x.to(torch.float32, copy=True) + 1,
    "another order in memory": lambda x: x[None].contiguous(memory_format=torch.channels_last) + 1,
    "chunks of an axis of any size": lambda x: x.chunk(2, 1)[0] + 1,
    "a region without gradients": lambda x: _without_gradients(x) + 1,
}


def _without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.exp()


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_known_is_traced_anew(name: str, traced: list[ExportedProgram]) -> None:
    """And means the same as before."""
    program = exported(LEFT[name])
    made = functional(copy.deepcopy(program), own=True)
    assert len(traced) == 1
    x = torch.randn(2, 4, 6)
    for found, expected in zip(*(torch.utils._pytree.tree_leaves(p.module()(x=x)) for p in (made, program)), strict=True):
        assert torch.equal(found, expected)
    assert not any(n.target._schema.is_mutable for n in made.graph.nodes if isinstance(n.target, torch._ops.OpOverload))


def test_what_nobody_expected_is_told_and_traced_anew(
    traced: list[ExportedProgram], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setitem(functional_module.REWRITES, aten.reshape.default, fails)
    made = functional(exported(CALLS["reshape"]), own=True)
    assert len(traced) == 1 and "AttributeError: no such thing" in caplog.text
    x = torch.randn(3, 5, 6)
    assert torch.equal(made.module()(x=x), CALLS["reshape"](x))


def test_a_program_that_is_given_stays_as_it_is() -> None:
    program = exported(CALLS["reshape"])
    before = str(program.graph)
    capture(program)
    assert str(program.graph) == before


def test_a_known_operation_is_one_that_a_trace_keeps() -> None:
    """Of the composite operations that stay, each does so under torch.export too."""
    from torch._export.utils import _is_preservable_cia_op

    assert all(_is_preservable_cia_op(op) for op in functional_module.KEPT - SIZES)
