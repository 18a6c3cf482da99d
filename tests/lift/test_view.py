"""The arithmetic behind reshapes: quotients and remainders of flat indices, and which axes belong together."""

from __future__ import annotations

import itertools

import pytest
import torch

from lift.programs import fixed_sizes
from trilithon.errors import CannotLift
from trilithon.lift.handlers.view import _groups, divided, lift_view
from trilithon.lift.registry import Call
from trilithon.lift.symtensor import SymTensor
from trilithon.spec import term as t
from trilithon.spec.evaluate import evaluate
from trilithon.spec.term import Term
from trilithon.spec.traverse import walk

A, J, K, M, N = (t.var(name) for name in "ajkmn")
TWO, THREE, SIX = map(t.integer, (2, 3, 6))

# name: (flat index, size, does the division go away)
DIVISIONS: dict[str, tuple[Term, Term, bool]] = {
    "row_and_column": (N * A + J, N, False),
    "whole_rows": (N * A, N, True),
    "three_axes": (N * M * A + M * J + K, M, False),
    "two_of_three": (N * M * A + M * J + K, N * M, False),
    "literal": (6 * A + J, THREE, False),
    "whole_literal": (6 * A + 3 * J, THREE, True),
    "no_multiple": (3 * A + 2 * J, TWO, False),
    "literal_and_symbol": (2 * N * A + J, 2 * N, False),
    "half_of_it": (N * A + J, 2 * N, False),
    "squared": (N * N * A + N * J + K, N, False),
    "with_a_number": (N * A + N + J + 5, N, False),
    "sum_as_size": ((N + 1) * A + J, N + 1, False),
    "by_one": (A + J, t.ONE, True),
    "zero": (t.ZERO, N, True),
    "two_symbols": (M * N * A, M * N, True),
}


@pytest.mark.parametrize("name", DIVISIONS)
def test_quotient_and_remainder(name: str) -> None:
    flat, size, exact = DIVISIONS[name]
    quotient, rest = divided(flat, size)
    for values in itertools.product(range(3), range(3), range(4), (1, 2, 5), (1, 3, 4)):
        env = dict(zip("ajkmn", values, strict=True))
        number, by = int(evaluate(flat, env)), int(evaluate(size, env))
        assert (int(evaluate(quotient, env)), int(evaluate(rest, env))) == divmod(number, by)
    assert exact == (rest is t.ZERO)
    assert not exact or all(x.op not in ("floor_div", "mod") for x in walk([quotient]))


def test_multiples_leave_the_division() -> None:
    """What is left of `n * a + j` in it is `j`, so that a prover who knows `j < n` is done."""
    quotient, rest = divided(N * A + J, N)
    assert quotient is A + t.floor_div(J, N)
    assert rest is t.mod(J, N)


GROUPS: dict[str, tuple[tuple[Term, ...], tuple[Term, ...], object]] = {
    "same": ((M, N), (M, N), [([0], [0]), ([1], [1])]),
    "merged": ((M, N), (M * N,), [([0, 1], [0])]),
    "split": ((SIX, N), (TWO, THREE, N), [([0], [0, 1]), ([1], [2])]),
    "ones_belong_to_none": ((t.ONE, M, N), (M, t.ONE, N, t.ONE), [([1], [0]), ([2], [2])]),
    "two_pairs": ((M, TWO, N, THREE), (2 * M, 3 * N), [([0, 1], [0]), ([2, 3], [1])]),
    "crossed": ((M, N), (N, M), [([0, 1], [0, 1])]),
    "other_products": ((M, N), (M, M), None),
    "unknown_half": ((N,), (TWO, t.floor_div(N, TWO)), None),
    "more_axes": ((M,), (M, N), None),
    "fewer_axes": ((M, N), (M,), None),
}


@pytest.mark.parametrize("name", GROUPS)
def test_axes_are_grouped_by_their_products(name: str) -> None:
    source, target, expected = GROUPS[name]
    assert _groups(source, target) == expected


def test_other_products_are_refused() -> None:
    node = next(iter(fixed_sizes()[1].values()))
    source = SymTensor((N,), torch.int64, lambda index: index[0])
    with pytest.raises(CannotLift, match="do not split into equal products"):
        lift_view(Call(node, (TWO, t.floor_div(N, TWO)), torch.int64, {}), source, [])
