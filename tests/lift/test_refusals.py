"""What a handler does not model is refused, with the user's own line; what must be proved is an obligation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from lift.harness import Function, Inputs, Tables, exported, outputs
from trilithon.errors import CannotLift
from trilithon.lift.lifter import Lifter
from trilithon.lift.registry import HANDLERS, lifts
from trilithon.spec import term as t
from trilithon.spec.evaluate import evaluate
from trilithon.spec.traverse import walk

aten = torch.ops.aten
TABLES: Tables = {
    "a": torch.randint(-9, 10, (4, 6)),
    "pos": torch.randint(1, 9, (4, 6)),
    "small": torch.randint(-9, 10, (4, 6), dtype=torch.int8),
    "m": torch.randint(0, 2, (4, 6)).bool(),
    "g": torch.randn(4, 6),
    "h": torch.randn(4, 6).bfloat16(),
    "pick": torch.randint(0, 4, (2, 6)),
}

# name: (function, what the text must say)
REFUSALS: dict[str, tuple[Function, str]] = {
    "no_handler": (lambda i: torch.bucketize(i.a, i.pos[0]), "has no handler"),
    "below_no_handler": (lambda i: i.g.softmax(-1) > 0.5, "has no handler"),
    "no_tensor": (lambda i: i.a.split(2, 1)[0], "not a tensor or an integer|does not give one tensor|has no handler"),
    "diff_append": (lambda i: i.a.diff(append=i.a[:, :1]), "its argument append"),
    "diff_twice": (lambda i: i.a.diff(n=2), "only first differences"),
    "diff_float": (lambda i: i.g.diff(), "diff of torch.float32"),
    "cumsum_float": (lambda i: i.g.cumsum(-1), "rounds"),
    "cumsum_to_float": (lambda i: i.a.cumsum(-1, dtype=torch.float32), "rounds"),
    "sum_float": (lambda i: i.g.sum(-1), "rounds"),
    "sum_two": (lambda i: i.a.sum((0, 1)), "only over one"),
    "index_put_adds": (lambda i: aten.index_put(i.a, [i.m], i.a[0, 0], True), "its argument accumulate=True"),
    "index_put_at_numbers": (lambda i: aten.index_put(i.a, [i.pick[0] % 4], i.a[0, 0]), "one bool mask"),
    "gather_sparse": (lambda i: torch.gather(i.a, 0, i.pick, sparse_grad=True), "its argument sparse_grad=True"),
    "arange_float": (lambda i: torch.arange(0.0, 2.0, 0.5), "arange of floats"),
    "float_to_int": (lambda i: i.g.long(), "exactly"),
    "fraction_to_int": (lambda i: i.m * 0.5 // 1, "rounded division on torch.float32"),
    "bitwise_ints": (lambda i: i.a & 1, "bitwise operations on torch.int64"),
    "invert_int": (lambda i: ~i.a, "bitwise operations on torch.int64"),
    "floor_by_negative": (lambda i: i.a // -2, "division by -2"),
    "remainder_by_negative": (lambda i: i.a % -3, "division by -3"),
    "alpha_float": (lambda i: torch.add(i.g, i.g, alpha=0.5), "alpha=0.5"),
    "bf16_plus_fraction": (lambda i: i.h + 0.1, "rounds differently"),
    "bf16_times_integers": (lambda i: i.h * i.a, "rounds differently"),
    "scalar_too_large": (lambda i: i.small + 300, "300 does not fit torch.int8"),
    "roll_flat": (lambda i: i.a.roll(1), "one shift for each"),
    "pad_reflect": (lambda i: torch.nn.functional.pad(i.g[None], (1, 1), mode="reflect"), "reflect"),
    "repeat_interleave_flat": (lambda i: i.a.repeat_interleave(2), "along one axis"),
    "uninitialised": (lambda i: torch.empty_like(i.a) + 1, "never written"),
    "complex": (lambda i: i.g.to(torch.complex64).to(torch.bool), "torch.complex64 is not modelled"),
}

OBLIGATIONS: dict[str, Function] = {
    "narrow": lambda i: (i.a + i.pos).to(torch.int8),
    "literal": lambda i: torch.full((2,), 100, dtype=torch.int8) + 100,
    "divide": lambda i: i.a // i.pos,
    "float_arange": lambda i: torch.arange(300).to(torch.int64)[:1] + torch.arange(300, dtype=torch.bfloat16),
    "cumsum": lambda i: (i.a.diff(prepend=i.a[:, :1] - 1) * 2).cumsum(-1),
    "where_index": lambda i: torch.where(i.m, i.a, i.a + 1),
}


@pytest.fixture(scope="module")
def program() -> tuple[ExportedProgram, dict[str, Node]]:
    functions = {name: f for name, (f, _) in REFUSALS.items()} | OBLIGATIONS
    ep = exported(list(functions.values()), TABLES)
    return ep, dict(zip(functions, outputs(ep), strict=True))


def lift(ep: ExportedProgram, node: Node) -> tuple[Lifter, t.Term]:
    lifter = Lifter(ep)
    symbolic = lifter.lift(node)
    return lifter, symbolic.at(tuple(t.var(f"i{d}") for d in range(symbolic.rank)))


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(name: str, program: tuple[ExportedProgram, dict[str, Node]]) -> None:
    ep, nodes = program
    with pytest.raises(CannotLift, match=REFUSALS[name][1]) as refusal:
        lift(ep, nodes[name])
    assert "\n  at harness.py:" in str(refusal.value)


class Appends(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.diff(append=x[:, :1])


class Buckets(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.bucketize(x, x[0]) > 2


def test_unknown_op_names_the_users_line() -> None:
    ep = torch.export.export(Buckets(), (TABLES["a"],), strict=False).run_decompositions({})
    with pytest.raises(CannotLift) as refusal:
        lift(ep, outputs(ep)[0])
    what, where, why, todo = str(refusal.value).splitlines()
    assert what == "cannot lift the attention mask"
    assert "test_refusals.py:" in where and "`return torch.bucketize(x, x[0]) > 2`  (node bucketize)" in where
    assert why == "  because aten.bucketize.Tensor has no handler, so what this mask allows is not known"
    assert "add a handler in trilithon/lift/handlers" in todo


def test_refusal_says_what_where_why_and_what_to_do() -> None:
    ep = torch.export.export(Appends(), (TABLES["a"],), strict=False).run_decompositions({})
    with pytest.raises(CannotLift) as refusal:
        lift(ep, outputs(ep)[0])
    what, where, why, todo = str(refusal.value).splitlines()
    assert what == "cannot lift aten.diff.default"
    assert "test_refusals.py:" in where and "`return x.diff(append=x[:, :1])`  (node diff)" in where
    assert why.startswith("  because its argument append=") and why.endswith("is not modelled")
    assert "trilithon/lift/handlers" in todo


def test_bool_index_is_refused() -> None:
    ep = exported([lambda i: i.a[i.m] > 0], TABLES)
    with pytest.raises(CannotLift, match=r"an index of torch\.bool is not modelled"):
        lift(ep, outputs(ep)[0])


def test_two_handlers_for_one_op_are_refused() -> None:
    with pytest.raises(ValueError, match="already has the handler lift_add"):
        lifts(aten.add.Tensor)(HANDLERS[aten.add.Tensor])


def ranges(name: str, program: tuple[ExportedProgram, dict[str, Node]]) -> dict[str, tuple[int, int]]:
    ep, nodes = program
    lifter, _ = lift(ep, nodes[name])
    return {str(x): (o.low, o.high) for x, o in lifter.obligations.items()}


def test_narrowing_narrows_the_obligation(program: tuple[ExportedProgram, dict[str, Node]]) -> None:
    assert ranges("narrow", program) == {"tables_0[i0, i1] + tables_1[i0, i1]": (-128, 127)}


def test_literal_that_overflows_is_an_obligation(program: tuple[ExportedProgram, dict[str, Node]]) -> None:
    assert ranges("literal", program) == {"200": (-128, 127)}


def test_divisor_must_be_positive(program: tuple[ExportedProgram, dict[str, Node]]) -> None:
    assert ranges("divide", program) == {"tables_1[i0, i1]": (1, (1 << 63) - 1)}


def test_float_arange_must_be_exact(program: tuple[ExportedProgram, dict[str, Node]]) -> None:
    assert ranges("float_arange", program)["i0"] == (-256, 256)


def test_obligations_of_a_running_sum_speak_of_its_own_axis(program: tuple[ExportedProgram, dict[str, Node]]) -> None:
    """They mention no counter: an index variable stands for it, which holds inside the axis only."""
    ep, nodes = program
    lifter, _ = lift(ep, nodes["cumsum"])
    free = {f"{nodes['cumsum'].name}.i"}
    inner = [x for x in lifter.obligations if free & {v.args[0] for v in walk([x]) if v.op == "var"}]
    assert inner and all(x.op == "ite" for x in inner)
    index = torch.arange(-20, 20)
    read = {"tables_0": TABLES["a"]}
    for x in inner:
        assert not any(v.op == "var" and v.args[0].startswith("#") for v in walk([x]) if v.op != "prefix_sum")
        values = evaluate(x, {"i0": 1, "i1": 2, f"{nodes['cumsum'].name}.i": index}, read)
        assert bool((values.expand(40)[index >= 6] == lifter.obligations[x].low).all())


def test_inputs_keep_their_attributes() -> None:
    with pytest.raises(AttributeError):
        _ = Inputs(TABLES).missing
