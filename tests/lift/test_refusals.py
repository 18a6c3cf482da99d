"""What a handler does not model is refused, with the user's own line; what must be proved is an obligation."""

from __future__ import annotations

import re
from functools import cache

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
    "bytes": torch.randint(0, 9, (4, 6), dtype=torch.uint8),
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
    "arange_float_end": (lambda i: torch.arange(3.5), "arange of floats"),
    "arange_float_end_behind": (lambda i: torch.arange(0, 3.5), "arange of floats"),
    "arange_float_step": (lambda i: torch.arange(0, 3, 0.5), "arange of floats"),
    "arange_float_start": (lambda i: torch.arange(0.5, 3), "arange of floats"),
    "arange_float": (lambda i: torch.arange(0.0, 2.0, 0.5), "arange of floats"),
    "float_to_int32": (lambda i: i.g.int(), "may not fit torch.int32"),
    "power_of_integers": (lambda i: i.a**3, "pow on torch.int64"),
    "fraction_to_int": (lambda i: i.m * 0.5 // 1, "rounded division on torch.float32"),
    "bitwise_ints": (lambda i: i.a & 1, "bitwise operations on torch.int64"),
    "invert_int": (lambda i: ~i.a, "bitwise operations on torch.int64"),
    "floor_by_negative": (lambda i: i.a // -2, "division by -2"),
    "remainder_by_negative": (lambda i: i.a % -3, "division by -3"),
    "alpha_float": (lambda i: torch.add(i.g, i.g, alpha=0.5), "alpha=0.5"),
    "bf16_plus_fraction": (lambda i: i.m.bfloat16() + 0.1, "rounds differently"),
    "bf16_minus_fraction": (lambda i: i.m.bfloat16() - 0.1, "rounds differently"),
    "bf16_by_a_fraction": (
        lambda i: torch.where(i.m, 1.0, 2.0).bfloat16() * torch.where(i.a[0, 0] > 0, 0.5, 0.1),
        "rounds differently",
    ),
    "bf16_by_another": (
        lambda i: torch.where(i.m, 1.0, 2.0).bfloat16() * torch.where(i.a[0, 0] > 0, 0.1, 0.5),
        "rounds differently",
    ),
    "bf16_number_or_data": (lambda i: torch.where(i.m, i.h, 1.0) + 0.1, "rounds differently"),
    "bf16_data_or_number": (lambda i: torch.where(i.m, 1.0, i.h) + 0.1, "rounds differently"),
    "float_too_large": (lambda i: torch.where(i.m, 1.0, 300.0).to(torch.int8), "may not fit torch.int8"),
    "scalar_too_small": (lambda i: i.small.to(torch.uint8) - -1, "-1 does not fit torch.uint8"),
    "floor_by_zero": (lambda i: i.a // 0, "division by 0"),
    "slice_scatter_step": (lambda i: aten.slice_scatter(i.a, i.a[:, ::2], 1, 0, 6, 2), "step=2"),
    "gather_scalar": (lambda i: torch.gather(i.a[0, 0], 0, i.pick[0, 0]), "gather of scalars"),
    "gather_of_scalar": (lambda i: torch.gather(i.a[0, 0], 0, i.pick[0]), "gather of scalars"),
    "gather_at_scalar": (lambda i: torch.gather(i.a[0], 0, i.pick[0, 0]), "gather of scalars"),
    "roll_twice": (lambda i: i.a.roll((1, 2), (0, 0)), "one shift for each"),
    "index_select_scalar": (lambda i: torch.index_select(i.a[0, 0], 0, i.pick[0, :1]), "index_select of a scalar"),
    "cumsum_scalar": (lambda i: i.a[0, 0].cumsum(0), "cumsum of a scalar"),
    "sum_scalar": (lambda i: aten.sum.dim_IntList(i.a[0, 0], [0]), "only over one"),
    "sum_of_all": (lambda i: aten.sum.dim_IntList(i.a, None), "only over one"),
    "any_uint8": (lambda i: i.small.to(torch.uint8).any(-1), "any and all of torch.uint8"),
    "any_scalar": (lambda i: i.m[0, 0].any(0), "with rank 0"),
    "cat_nothing": (lambda i: torch.cat([torch.empty(0), torch.empty(0)]), "all its parts are empty"),
    "index_of_bools": (lambda i: i.a[i.m] > 0, r"an index of torch\.bool is not modelled"),
    "index_put_two": (lambda i: aten.index_put(i.a, [i.m[:, 0], i.m[0, :4]], i.a[0, 0]), "one bool mask"),
    "index_put_values": (lambda i: aten.index_put(i.a, [i.m], i.a[0, :1]), "one bool mask"),
    "scalar_too_large": (lambda i: i.small + 300, "300 does not fit torch.int8"),
    "roll_flat": (lambda i: i.a.roll(1), "one shift for each"),
    "pad_reflect": (lambda i: torch.nn.functional.pad(i.g[None], (1, 1), mode="reflect"), "reflect"),
    "repeat_interleave_flat": (lambda i: i.a.repeat_interleave(2), "along one axis"),
    "uninitialised": (lambda i: torch.empty_like(i.a) + 1, "never written"),
    "complex": (lambda i: i.g.to(torch.complex64).to(torch.bool), "torch.complex64 is not modelled"),
}

INT64, INT32, INT8, UINT8 = (-(1 << 63), (1 << 63) - 1), (-(1 << 31), (1 << 31) - 1), (-128, 127), (0, 255)

# name: (function, the terms that must be proved to lie in a range; `j` is the index that a sum runs over)
OBLIGED: dict[str, tuple[Function, dict[str, tuple[int, int]]]] = {
    "narrow": (lambda i: (i.a + i.pos).to(torch.int8), {"a[i0, i1] + pos[i0, i1]": INT8}),
    "narrow_to_int32": (lambda i: i.a.int(), {"a[i0, i1]": INT32}),
    "narrow_to_unsigned": (lambda i: i.small.to(torch.uint8), {"small[i0, i1]": UINT8}),
    "narrow_from_unsigned": (lambda i: i.bytes.to(torch.int8), {"bytes[i0, i1]": INT8}),
    "widen": (lambda i: i.small.to(torch.int64), {}),
    "widen_unsigned": (lambda i: i.bytes.to(torch.int16), {}),
    "bool_to_int8": (lambda i: i.m.to(torch.int8), {}),
    "below_zero": (lambda i: i.bytes[:, :2] - i.bytes[:, 2:4], {"bytes[i0, i1] - bytes[i0, i1 + 2]": UINT8}),
    "literal": (lambda i: torch.full((2,), 100, dtype=torch.int8) + 100, {"200": INT8}),
    "literal_from_float": (lambda i: torch.full((2,), 300.0).to(torch.int8), {"300": INT8}),
    "divide": (lambda i: i.a // i.pos, {"pos[i0, i1]": (1, INT64[1])}),
    "remainder": (lambda i: i.a % i.pos, {"pos[i0, i1]": (1, INT64[1])}),
    "float_arange": (lambda i: torch.arange(300, dtype=torch.bfloat16), {"i0": (-256, 256)}),
    "int8_arange": (lambda i: torch.arange(100, dtype=torch.int8), {"i0": INT8}),
    "stepped_arange": (lambda i: torch.arange(3, 90, 2, dtype=torch.int32), {"2 * i0 + 3": INT32}),
    "diff": (lambda i: i.a.diff(), {"a[i0, i1 + 1] - a[i0, i1]": INT64}),
    "cumsum": (lambda i: i.a.cumsum(-1), {"sum(a[i0, #0] for #0 <= i1)": INT64}),
    "cumsum_of_products": (
        lambda i: (i.a * 2).cumsum(0),
        {
            "2 * a[j, i1] if j <= 3 and 0 <= j else -9223372036854775808": INT64,
            "sum(2 * a[#0, i1] for #0 <= i0)": INT64,
        },
    ),
    "sum_of_products": (
        lambda i: (i.a * 2).sum(0),
        {
            "2 * a[j, i0] if j <= 3 and 0 <= j else -9223372036854775808": INT64,
            "sum(2 * a[#0, i0] for #0 <= 3)": INT64,
        },
    ),
    "sum_narrowed": (lambda i: i.small.sum(-1, dtype=torch.int8), {"sum(small[i0, #0] for #0 <= 5)": INT8}),
    "cumsum_along": (
        lambda i: (i.a * 2).cumsum(1),
        {"2 * a[i0, j] if 0 <= j and j <= 5 else -9223372036854775808": INT64, "sum(2 * a[i0, #0] for #0 <= i1)": INT64},
    ),
    "sum_of_other_products": (
        lambda i: (i.a + i.pos[:, :1] * 2).sum(1),
        {
            "2 * pos[i0, 0]": INT64,
            "2 * pos[i0, 0] + a[i0, j] if 0 <= j and j <= 5 else -9223372036854775808": INT64,
            "sum(2 * pos[i0, 0] + a[i0, #0] for #0 <= 5)": INT64,
        },
    ),
    "sum_at_two_ends": (
        lambda i: (i.a * 2).cumsum(1).diff(),
        {
            "2 * a[i0, j] if 0 <= j and j <= 5 else -9223372036854775808": INT64,
            "sum(2 * a[i0, #0] for #0 <= i1)": INT64,
            "sum(2 * a[i0, #0] for #0 <= i1 + 1)": INT64,
            "sum(2 * a[i0, #0] for #0 <= i1 + 1) - sum(2 * a[i0, #0] for #0 <= i1)": INT64,
        },
    ),
    "any_of_columns": (
        lambda i: (i.a * 2 > 0).any(0),
        {"2 * a[j, i0] if 0 <= j and j <= 3 else -9223372036854775808": INT64},
    ),
    "float_to_int64": (lambda i: i.g.long(), {}),
    "any_of_products": (
        lambda i: (i.a * 2 > 0).any(-1),
        {"2 * a[i0, j] if j <= 5 and 0 <= j else -9223372036854775808": INT64},
    ),
    "sum_beside_its_terms": (
        lambda i: (i.a * 2)[:, :1] + (i.a * 2).sum(-1, keepdim=True),
        {
            "2 * a[i0, 0]": INT64,
            "2 * a[i0, j] if j <= 5 and 0 <= j else -9223372036854775808": INT64,
            "sum(2 * a[i0, #0] for #0 <= 5)": INT64,
            "2 * a[i0, 0] + sum(2 * a[i0, #0] for #0 <= 5)": INT64,
        },
    ),
    "chosen_index": (lambda i: torch.where(i.m, i.a, i.a + 1), {"a[i0, i1] + 1": INT64}),
    "squared_within_int8": (lambda i: i.small * i.small, {"small[i0, i1] * small[i0, i1]": INT8}),
}


@cache
def made() -> tuple[ExportedProgram, dict[str, Node]]:
    functions = {name: f for name, (f, _) in (REFUSALS | OBLIGED).items()}
    ep = exported(list(functions.values()), TABLES)
    return ep, dict(zip(functions, outputs(ep), strict=True))


@pytest.fixture(scope="module")
def program() -> tuple[ExportedProgram, dict[str, Node]]:
    return made()


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


def test_two_handlers_for_one_op_are_refused() -> None:
    with pytest.raises(ValueError, match="already has the handler lift_add"):
        lifts(aten.add.Tensor)(HANDLERS[aten.add.Tensor])


@pytest.mark.parametrize("name", OBLIGED)
def test_what_must_be_proved(name: str, program: tuple[ExportedProgram, dict[str, Node]]) -> None:
    ep, nodes = program
    lifter, _ = lift(ep, nodes[name])
    found = {words(show(o.term)): (o.low, o.high) for o in lifter.obligations.values()}
    assert found == {words(text): span for text, span in OBLIGED[name][1].items()}
    assert all(term is o.term for term, o in lifter.obligations.items())


def show(term: t.Term) -> str:
    """The term, with the inputs by their names."""
    text = re.sub(r"\w+\.i\b", "j", str(term))
    return re.sub(r"tables_(\d+)", lambda n: list(TABLES)[int(n[1])], text)


def words(text: str) -> tuple[str, ...]:
    """In any order: the parts of sums and conjunctions stand as they were made."""
    return tuple(sorted(re.findall(r"#?\w+|[^\w\s]", text)))


def test_obligations_of_a_running_sum_speak_of_its_own_axis(program: tuple[ExportedProgram, dict[str, Node]]) -> None:
    """Outside the axis they hold whatever the data is."""
    ep, nodes = program
    lifter, _ = lift(ep, nodes["cumsum_of_products"])
    (guarded,) = (x for x in lifter.obligations if x.op == "ite")
    (free,) = {v.args[0] for v in walk([guarded]) if v.op == "var" and v.args[0].endswith(".i")}
    values = evaluate(guarded, {"i0": 1, "i1": 2, free: torch.arange(-9, 20)}, {"tables_0": TABLES["a"]})
    inside = torch.arange(-9, 20)[values != lifter.obligations[guarded].low]
    assert inside.tolist() == [0, 1, 2, 3]


def test_inputs_keep_their_attributes() -> None:
    with pytest.raises(AttributeError):
        _ = Inputs(TABLES).missing
