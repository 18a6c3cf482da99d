"""What a site's mask means: which cells it keeps, which it blocks and how, and what else must be proved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram

from trilithon.capture.sites import Site
from trilithon.errors import CannotLift
from trilithon.lift.lifter import Lifter
from trilithon.lift.registry import Obligation
from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.masks import B, Causal, H, K, Q
from trilithon.spec.term import Term

Dims = tuple[Term, Term, Term, Term]
SCORE = "score"
MOST_CASES = 256


@dataclass(frozen=True)
class Meaning:
    """The lifted mask of one site, over the index variables `b h q k`.

    Attributes:
        keep: may query q attend to key k?
        dims: sizes `b h s t`.
        scale: factor on the scores.
        drops: the distinct values that block a cell ("False", "-inf", "-3.40282e+38").
        needs_key: the rewrite is right only where every row keeps a key: a fully masked row of this site is
            NaN or the mean of V, while the canonical op gives 0.
        obligations: integer ranges that must be proved (else an operation may wrap around).
        tables: shape of each table that `keep` or an obligation may read.
        constants: data of those tables that are part of the program.
    """

    keep: Term
    dims: Dims
    scale: float
    drops: tuple[str, ...]
    needs_key: bool
    obligations: tuple[Obligation, ...]
    tables: dict[str, tuple[Term, ...]]
    constants: dict[str, Tensor]


def lift_site(program: ExportedProgram, site: Site) -> Meaning:
    """Lift the mask of one site.

    Raises:
        CannotLift: the call, an operation of its mask, or a masked value is not modelled; or the mask is a bias.
    """
    if site.problem:
        raise _refuse(site, site.problem)
    lifter = Lifter(program, {site.score: SCORE} if site.score is not None else None)
    dims = tuple(lifter.size(d) for d in site.dims)
    if site.kind in ("flash", "flash_for_cpu", "cudnn") and site.is_causal and dims[2] is not dims[3]:
        raise _refuse(site, "the causal alignment of this kernel differs between versions when s != t")
    keep = Causal().at_sizes(dims[2], dims[3]) if site.is_causal else t.TRUE
    scale, drops, hard = site.softmax_scale, [], True
    if site.mask is not None:
        value = lifter.lift(site.mask).broadcast_at((B, H, Q, K))
        if value.sort == "bool":
            keep, drops = keep & value, ["False"]
        else:
            leaves = _read_leaves(site, value)
            keep, scale = keep & leaves.keep, leaves.scale if leaves.scale is not None else scale
            drops, hard = sorted(f"{d:g}" for d in leaves.drops), leaves.drops <= {-math.inf}
    zero_rows = site.kind != "decomposed" or _is_safe_softmax(site)
    return Meaning(
        keep=keep,
        dims=dims,  # type: ignore[arg-type]
        scale=scale,
        drops=tuple(drops),
        needs_key=not (zero_rows and hard),
        obligations=tuple(lifter.obligations.values()),
        tables=lifter.table_shapes,
        constants=lifter.data,
    )


def _is_safe_softmax(site: Site) -> bool:
    assert site.mask is not None
    return any(u.target is torch.ops.aten._safe_softmax.default for u in site.mask.users)


def _refuse(site: Site, why: str) -> CannotLift:
    return CannotLift(
        f"cannot prove the attention mask of {site.name}",
        where=site.where,
        why=why,
        todo="the mask stays as it is",
    )


@dataclass(frozen=True)
class _Leaves:
    keep: Term
    drops: frozenset[float]
    scale: float | None


def _read_leaves(site: Site, value: Term) -> _Leaves:
    """Split an additive mask (or masked scores) into kept and blocked cells.

    A cell is kept where 0 is added, and blocked where -inf or a value at the bottom of the dtype's range is.
    """
    assert site.mask is not None
    lowest = torch.finfo(site.mask.meta["val"].dtype).min / 2
    keep, drops, factors = [], set(), set()
    for condition, leaf in _cases(site, value, t.TRUE):
        factor, offset = _affine(site, leaf)
        if (site.score is None and factor != 0.0) or math.isnan(offset):
            raise _refuse(site, f"it can add {leaf}")
        if offset <= lowest:
            drops.add(offset)
        elif offset == 0.0 and (factor != 0.0) == (site.score is not None):
            keep.append(condition)
            factors.add(factor)
        else:
            raise _refuse(site, f"it adds {offset:g}, which is a bias: only 0, -inf and the lowest number are a mask")
    if len(factors) > 1:
        raise _refuse(site, f"its scores are scaled by different factors {sorted(factors)}")
    return _Leaves(t.disj(*keep), frozenset(drops), factors.pop() if site.score is not None and factors else None)


def _cases(site: Site, value: Term, given: Term) -> Iterator[tuple[Term, Term]]:
    """The leaves of a tree of conditions, each with the condition that leads to it."""
    stack, count = [(given, value)], 0
    while stack:
        condition, x = stack.pop()
        if condition is t.FALSE:
            continue
        if x.op == "ite":
            stack.append((condition & ~x.args[0], x.args[2]))
            stack.append((condition & x.args[0], x.args[1]))
            continue
        count += 1
        if count > MOST_CASES:
            raise _refuse(site, f"it has more than {MOST_CASES} cases")
        yield condition, x


def _affine(site: Site, leaf: Term) -> tuple[float, float]:
    """`leaf` as `factor * score + offset`; an offset is exact only if 0, -inf or at the bottom of the range."""
    if leaf.is_literal:
        return 0.0, leaf.value
    if leaf.op == "read" and leaf.args[0] == SCORE:
        if leaf.args[1:] != (B, H, Q, K):
            raise _refuse(site, "its softmax mixes scores of other queries or keys")
        return 1.0, 0.0
    if leaf.op == "float_cast":
        return _affine(site, leaf.args[1])
    if leaf.op == "float_op":
        name, dtype, a, b = leaf.args
        (fa, oa), (fb, ob) = _affine(site, a), _affine(site, b)
        if name in ("add", "sub") and (fa == 0.0 or fb == 0.0):
            sign = 1.0 if name == "add" else -1.0
            return fa + sign * fb, float_term.fold(name, dtype, oa, ob)
        if name == "mul" and fb == 0.0 and oa == 0.0:
            return fa * ob, 0.0
        if name == "mul" and fa == 0.0 and ob == 0.0:
            return fb * oa, 0.0
        if name == "div" and fb == 0.0 and oa == 0.0 and ob != 0.0:
            return fa / ob, 0.0
    raise _refuse(site, f"it adds {leaf}, a value that depends on data: a bias, not a mask")
