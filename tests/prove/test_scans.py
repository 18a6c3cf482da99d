"""Closed forms of nested running sums: only where the summand's own index is all that matters."""

from __future__ import annotations

import torch

from trilithon.prove.scans import close_scans
from trilithon.prove.solve import Prover
from trilithon.spec import term as t
from trilithon.spec.evaluate import evaluate
from trilithon.spec.term import Term

OUTER, INNER = t.counter(1), t.counter(0)  # the outer and the inner index
K = t.var("k")


def closed(body: Term) -> Term:
    return close_scans(t.prefix_sum(body, K), Prover({"k": t.var("s")}, {"s": (1, 64)}, {}))[0]


def test_a_sum_inside_a_summand_is_closed_first() -> None:
    """How many tokens come before the first one that counts, when all do."""
    ones = t.prefix_sum(t.ONE, OUTER)
    assert closed(t.ite(ones.eq(0), t.ONE, t.ZERO)) is t.ZERO


def test_a_summand_of_both_indices_is_not_closed_by_its_diagonal() -> None:
    for yes, no in ((t.ONE, t.ZERO), (t.ZERO, t.ONE)):
        body = t.prefix_sum(t.ite(INNER.eq(OUTER), yes, no), OUTER)
        result = closed(body)
        index = torch.arange(9)
        assert torch.equal(evaluate(result, {"k": index}), evaluate(t.prefix_sum(body, K), {"k": index}))
