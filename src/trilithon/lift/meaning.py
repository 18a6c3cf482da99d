"""What a site's mask means: which cells it keeps, which it blocks and how, and what else must be proved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from trilithon.capture.program import Program
from trilithon.capture.sites import Site, score_path
from trilithon.errors import CannotLift
from trilithon.lift.lifter import Lifter
from trilithon.lift.registry import Obligation
from trilithon.lift.scores import SCORE, Leaves, read_leaves, refuse
from trilithon.lift.symtensor import SymTensor, dtype_name
from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.bias import Bias, Dense, name_bias
from trilithon.spec.masks import B, Causal, H, K, Q
from trilithon.spec.position_bias import position_bias
from trilithon.spec.term import Term
from trilithon.spec.traverse import tables, walk

Dims = tuple[Term, Term, Term, Term]
NO_ENTRY = t.real(0.0)
UNKNOWN = "computed:"  # starts the name of a table that stands for an activation


@dataclass(frozen=True)
class Meaning:
    """The lifted mask of one site, over the index variables `b h q k`.

    Attributes:
        keep: may query q attend to key k?
        dims: sizes `b h s t`.
        scale: factor on the scores; None where it is no number of the program.
        drops: the distinct values that block a cell ("False", "-inf", "-3.40282e+38").
        needs_key: the rewrite is right only where every row keeps a key: a fully masked row of this site is
            NaN or the mean of V, while the canonical op gives 0.
        obligations: integer ranges that must be proved (else an operation may wrap around).
        tables: shape of each table that `keep` or an obligation may read.
        constants: data of those tables that are part of the program.
        bias: what is added to the scores of kept cells, or None.
        position_bias: the same bias up to a number a row, over `h q k` and the program's own tensors; None where there is
            no bias, or it is not one by position.
        softcap: c of `c * tanh(scores / c)`, or None.
        sinks: the softmax has one more column, of learned scores a head, whose weight is thrown away.
        sinks_table: the program's tensor `[h]` that holds those scores; "" if none was found.
        flat: batch and heads share one axis of the operands.
        own: names of the program's own tensors, about which nothing can be guarded.
    """

    keep: Term
    dims: Dims
    scale: float | None
    drops: tuple[str, ...]
    needs_key: bool
    obligations: tuple[Obligation, ...]
    tables: dict[str, tuple[Term, ...]]
    constants: dict[str, Tensor]
    bias: Bias | None = None
    position_bias: Term | None = None
    softcap: float | None = None
    sinks: bool = False
    sinks_table: str = ""
    flat: bool = False
    own: frozenset[str] = frozenset()


def lift_site(program: Program, site: Site) -> Meaning:
    """Lift the mask of one site.

    Raises:
        CannotLift: the call, an operation of its mask, or a masked value is not modelled; or all of it is a bias of
            which nothing is known.
    """
    if site.problem:
        raise refuse(site, site.problem)
    try:
        return _lift(program, site, ())
    except CannotLift:
        unknown = _unknown_addends(program, site)
        if not unknown:
            raise
        return _lift(program, site, unknown)


def _lift(program: Program, site: Site, unknown: tuple[Node, ...]) -> Meaning:
    """Lift a site, with some addends of its scores taken as tables of which nothing is known."""
    lifter = _lifter(program, site, unknown)
    dims = tuple(lifter.size(d) for d in site.dims)
    if site.kind in ("flash", "flash_for_cpu", "cudnn") and site.is_causal and dims[2] is not dims[3]:
        raise refuse(site, "the causal alignment of this kernel differs between versions when s != t")
    keep = Causal().at_sizes(dims[2], dims[3]) if site.is_causal else t.TRUE
    leaves, drops = Leaves(t.TRUE, frozenset()), []
    if site.mask is not None:
        lifted = lifter.lift(site.mask)
        if lifted.rank > 4:
            raise refuse(site, f"its mask has {lifted.rank} axes")
        value = lifted.broadcast_at(_cell(site, lifted.rank))
        if value.sort == "bool":
            keep, drops = keep & value, ["False"]
        else:
            leaves = read_leaves(site, value, _own_score(lifter, site))
            keep, drops = keep & leaves.keep, sorted(f"{d:g}" for d in leaves.drops)
    bias = _named_bias(site, leaves, lifter.targets)
    zero_rows = site.kind != "decomposed" or _is_safe_softmax(site)
    return Meaning(
        keep=keep,
        dims=dims,  # type: ignore[arg-type]
        scale=site.softmax_scale if leaves.scale is None else leaves.scale,
        drops=tuple(drops),
        needs_key=not (zero_rows and leaves.drops <= {-math.inf}),
        obligations=tuple(o for o in lifter.obligations.values() if _concerns(keep, leaves.bias, o)),
        tables=lifter.table_shapes,
        constants=lifter.data,
        bias=bias,
        position_bias=None if bias is None else position_bias(bias.formula, lifter.targets),
        softcap=leaves.softcap,
        sinks=site.sinks is not None,
        sinks_table=_sinks_table(lifter, site),
        flat=site.flat_heads is not None,
        own=frozenset(lifter.targets),
    )


def _cell(site: Site, rank: int) -> tuple[Term, ...]:
    """The index of cell `b h q k` in a tensor of scores or masks."""
    if site.flat_heads is None or rank == 4:
        return B, H, Q, K
    row = t.ZERO if site.dims[0] == 1 else B
    return row * site.flat_heads + (t.ZERO if site.flat_heads == 1 else H), Q, K


def _own_score(lifter: Lifter, site: Site) -> tuple[Term, ...]:
    """The index of this cell's own score; 0 along axes of size 1."""
    if site.score is None:
        return ()
    shape = [lifter.size(d) for d in site.score.meta["val"].shape]
    cell = _cell(site, len(shape))
    return tuple(t.ZERO if size is t.ONE else i for size, i in zip(shape, cell, strict=True))


def _named_bias(site: Site, leaves: Leaves, own: Mapping[str, str]) -> Bias | None:
    """The bias; refused where it is nothing but an input of the model, since that may block cells too.

    Args:
        own: names of the program's own tensors.
    """
    if leaves.bias is None:
        return None
    bias = name_bias(leaves.bias)
    inputs = [name for name in tables(bias.formula) if name not in own and not name.startswith(UNKNOWN)]
    if isinstance(bias, Dense) and not leaves.drops and inputs:
        raise refuse(site, f"it adds {leaves.bias}, a value that depends on data: a bias, not a mask")
    return bias


def _sinks_table(lifter: Lifter, site: Site) -> str:
    """The program's tensor `[h]` that the column of sinks repeats, or ""."""
    if site.sinks is None:
        return ""
    try:
        column = lifter.lift(site.sinks)
        entry = column.at((B, H, Q, t.ZERO)) if column.rank == 4 else NO_ENTRY
    except CannotLift:
        return ""
    while entry.op == "float_cast":
        entry = entry.args[1]
    own = entry.op == "read" and entry.args[0] in lifter.targets
    return str(entry.args[0]) if own and entry.args[1:] == (H,) else ""


def _concerns(keep: Term, bias: Term | None, obligation: Obligation) -> bool:
    """Does an obligation bear on which cells are kept? Not if it is about a float made an integer for the bias alone."""
    floats = {x for x in walk([obligation.term]) if x.op == "to_int"}
    if not floats or bias is None:
        return True
    return not floats <= set(walk([bias])) or bool(floats & set(walk([keep])))


def _lifter(program: Program, site: Site, unknown: tuple[Node, ...]) -> Lifter:
    """A lifter that knows the site's scores as a table."""
    lifter = Lifter(program, {node: f"{UNKNOWN}{node.name}" for node in unknown})
    if site.score is not None:
        shape, dtype = tuple(map(lifter.size, site.score.meta["val"].shape)), site.score.meta["val"].dtype
        product = SymTensor(shape, dtype, lambda index: t.read(SCORE, index, "float"))
        lifter.define(site.score, _plus_input(lifter, site.score, product))
    return lifter


def _plus_input(lifter: Lifter, score: Node, product: SymTensor) -> SymTensor:
    """`beta * input + alpha * product` where the scores come from baddbmm."""
    if score.target is not torch.ops.aten.baddbmm.default:
        return product
    added, dtype = lifter.lift(score.args[0]), dtype_name(product.dtype)  # type: ignore[arg-type]
    beta, alpha = (t.real(float(score.kwargs.get(name, 1.0))) for name in ("beta", "alpha"))  # type: ignore[arg-type]

    def element(index: tuple[Term, ...]) -> Term:
        scaled = float_term.apply("mul", dtype, alpha, product.at(index))
        if beta.value == 0.0:
            return scaled
        first = added.broadcast_at(index)
        return float_term.apply(
            "add", dtype, first if beta.value == 1.0 else float_term.apply("mul", dtype, beta, first), scaled
        )

    return SymTensor(product.shape, product.dtype, element)


def _unknown_addends(program: Program, site: Site) -> tuple[Node, ...]:
    """Float tensors that are added on the way to the softmax and cannot be lifted; the innermost of sums of sums."""
    found = []
    for node in score_path(site):
        if node.target is not torch.ops.aten.add.Tensor:
            continue
        for operand in node.all_input_nodes:
            value = operand.meta.get("val")
            if not isinstance(value, Tensor) or not value.dtype.is_floating_point or operand.target is node.target:
                continue
            if not _depends(operand, site.score) and not _lifts(program, site, operand):
                found.append(operand)
    return tuple(found)


def _depends(node: Node, on: Node | None) -> bool:
    """Is `on` an ancestor of `node`, or `node` itself?"""
    seen, stack = set(), [node]
    while stack and on is not None:
        here = stack.pop()
        if here is on:
            return True
        if here not in seen:
            seen.add(here)
            stack.extend(here.all_input_nodes)
    return False


def _lifts(program: Program, site: Site, node: Node) -> bool:
    lifter = _lifter(program, site, ())
    try:
        tensor = lifter.lift(node)
        tensor.at(tuple(t.var(f"i{n}") for n in range(tensor.rank)))
    except CannotLift:
        return False
    return True


def _is_safe_softmax(site: Site) -> bool:
    """Does a row without keys give 0? Not where its maximum, -inf, was taken away from it before."""
    assert site.softmax is not None
    return site.softmax.target is torch.ops.aten._safe_softmax.default and site.softmax.args[0] is site.mask
