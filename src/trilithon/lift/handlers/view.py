"""Reshaping: the index is written as one number and taken apart again, for each group of axes on its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from trilithon.lift.handlers.operand import Scalar
from trilithon.lift.registry import Call, lifts
from trilithon.lift.symtensor import Idx, SymTensor
from trilithon.spec import term as t
from trilithon.spec.term import Term

aten = torch.ops.aten
Monomial = tuple[Term, ...]
Polynomial = dict[Monomial, int]
Group = tuple[Sequence[int], Sequence[int]]


@lifts(aten.view.default, aten._unsafe_view.default)
def lift_view(call: Call, x: SymTensor, size: list[Scalar]) -> SymTensor:
    """view(x)[i] = the element of x at the same place in row-major order."""
    return _reshaped(call, x)


@lifts(aten.reshape.default)
def lift_reshape(call: Call, x: SymTensor, shape: list[Scalar]) -> SymTensor:
    """reshape(x)[i] = the element of x at the same place in row-major order."""
    return _reshaped(call, x)


def _reshaped(call: Call, x: SymTensor) -> SymTensor:
    found = _groups(x.shape, call.shape)
    if found is None:
        raise call.refuse(f"sizes {list(x.shape)} and {list(call.shape)} do not split into equal products")

    def at(index: Idx) -> Term:
        moved = [t.ZERO] * x.rank
        for sources, targets in found:
            if len(sources) == len(targets) == 1:
                moved[sources[0]] = index[targets[0]]
                continue
            flat = t.ZERO
            for d in targets:
                flat = _expanded(flat * call.shape[d]) + index[d]
            for d in reversed(sources[1:]):
                flat, moved[d] = divided(flat, x.shape[d])
            moved[sources[0]] = flat
        return x.at(tuple(moved))

    return call.result(at)


def _groups(source: Idx, target: Idx) -> list[Group] | None:
    """Runs of axes of equal products, as short as possible; axes of size 1 belong to none."""
    left = [d for d, size in enumerate(source) if size is not t.ONE]
    right = [d for d, size in enumerate(target) if size is not t.ONE]
    groups: list[Group] = []
    while left and right:
        cuts = ((i, j) for i in range(1, len(left) + 1) for j in range(1, len(right) + 1))
        for i, j in sorted(cuts, key=sum):
            if _product(source, left[:i]) == _product(target, right[:j]):
                groups.append((left[:i], right[:j]))
                left, right = left[i:], right[j:]
                break
        else:
            return None
    return None if left or right else groups


def _product(sizes: Idx, dims: Sequence[int]) -> Polynomial:
    product: Polynomial = {(): 1}
    for d in dims:
        product = _times(product, polynomial(sizes[d]))
    return product


def polynomial(term: Term) -> Polynomial:
    """A sum of products, expanded; anything but sums and products is an atom."""
    if term.op == "mul":
        return _times(*map(polynomial, term.args))
    if term.op not in ("sum", "int"):
        return {(term,): 1}
    coefficients, constant = t.linear(term)
    total: Polynomial = {(): constant}
    for part, factor in coefficients.items():
        for monomial, count in polynomial(part).items():
            total[monomial] = total.get(monomial, 0) + factor * count
    return {monomial: count for monomial, count in total.items() if count}


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    product: Polynomial = {}
    for left, m in a.items():
        for right, n in b.items():
            monomial = tuple(sorted(left + right, key=lambda x: x.serial))
            product[monomial] = product.get(monomial, 0) + m * n
    return {monomial: count for monomial, count in product.items() if count}


def _from_polynomial(terms: Polynomial) -> Term:
    total = t.ZERO
    for monomial, count in terms.items():
        product = t.integer(count)
        for atom in monomial:
            product = t.mul(product, atom)
        total = total + product
    return total


def _expanded(term: Term) -> Term:
    return _from_polynomial(polynomial(term))


def divided(flat: Term, size: Term) -> tuple[Term, Term]:
    """Quotient and remainder by a positive size; whole multiples of the size leave the division."""
    factors = polynomial(size)
    if len(factors) != 1:
        return t.floor_div(flat, size), t.mod(flat, size)
    ((atoms, count),) = factors.items()
    whole: Polynomial = {}
    rest: Polynomial = {}
    for monomial, factor in polynomial(flat).items():
        spare = Counter(monomial)
        spare.subtract(atoms)
        if factor % count == 0 and min(spare.values(), default=0) >= 0:
            whole[tuple(sorted(spare.elements(), key=lambda x: x.serial))] = factor // count
        else:
            rest[monomial] = factor
    left = _from_polynomial(rest)
    if left is t.ZERO:
        return _from_polynomial(whole), t.ZERO
    return _from_polynomial(whole) + t.floor_div(left, size), t.mod(left, size)
