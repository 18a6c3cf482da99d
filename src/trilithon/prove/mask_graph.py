"""The part of a program that makes one site's mask, run by torch on concrete inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate

from trilithon.capture.sites import Site
from trilithon.lift.meaning import UNKNOWN
from trilithon.lift.scores import SCORE
from trilithon.lift.sizes import from_sympy
from trilithon.lift.symtensor import UNBACKED
from trilithon.passes import where_of
from trilithon.spec import term as t
from trilithon.spec.evaluate import evaluate
from trilithon.spec.term import Term
from trilithon.spec.traverse import free_vars, tables


class CannotRun(Exception):
    """Why a mask could not be computed or compared at some sizes."""


@dataclass(frozen=True)
class MaskGraph:
    """The ancestors of a site's mask, each after those it reads.

    Attributes:
        nodes: the last one is the mask, or the masked scores of decomposed attention.
        inputs: the nodes that are given values, with the names of their tables.
        score: decomposed only: the product of q and k, one of the inputs.
    """

    nodes: tuple[Node, ...]
    inputs: Mapping[Node, str]
    score: Node | None

    @classmethod
    def of(cls, site: Site, names: Iterable[str]) -> MaskGraph:
        """The graph of `site.mask`; `names` are those of the tables of the site's meaning."""
        assert site.mask is not None
        unknown = {name.removeprefix(UNKNOWN): name for name in names if name.startswith(UNKNOWN)}
        inputs: dict[Node, str] = {}
        found: dict[Node, None] = {}
        stack = [(site.mask, False)]
        while stack:
            node, has_operands = stack.pop()
            if has_operands:
                found[node] = None
                continue
            if node in found:
                continue
            stack.append((node, True))
            if size_of(node) is not None:
                continue
            if node is site.score:
                inputs[node] = SCORE
                stack.extend((n, False) for n in _added(node))
            elif node.op == "placeholder" or node.name in unknown:
                inputs[node] = unknown.get(node.name, node.name)
            else:
                stack.extend((n, False) for n in node.all_input_nodes)
        return cls(tuple(found), inputs, site.score)

    def sizes(self) -> Iterator[Term]:
        """Every size that is known before the program runs."""
        for node in self.nodes:
            size = size_of(node)
            if size is not None:
                yield size
        for node in self.inputs:
            yield from shape_of(node)

    @property
    def rounding(self) -> float:
        """The relative error of one operation in the coarsest dtype of the graph."""
        dtypes = {held.dtype for node in self.nodes if isinstance(held := node.meta.get("val"), Tensor)}
        return max((torch.finfo(d).eps for d in dtypes if d.is_floating_point), default=0.0)

    def signature(self) -> str:
        """Equal texts compute the same function of inputs of the same names."""
        numbers = {node: i for i, node in enumerate(self.nodes)}

        def show(value: Any) -> Any:
            return f"%{numbers.get(value)}" if isinstance(value, Node) else value

        def line(node: Node) -> str:
            call = f"{node.target} {map_aggregate(node.args, show)} {map_aggregate(dict(node.kwargs), show)}"
            if node in self.inputs:
                given = f"{self.inputs[node]} {node.meta['val'].dtype} {shape_of(node)}"
                return f"{given} {call}" if node is self.score else given
            return call if (size := size_of(node)) is None else str(size)

        return "\n".join(map(line, self.nodes))

    def run(self, given: Mapping[str, Tensor], sizes: Mapping[str, int]) -> tuple[Tensor, dict[str, int]]:
        """The mask, computed on the CPU, and the sizes with those that the program read from data.

        Args:
            given: the tensors of `inputs`, by name.
            sizes: the values of the size symbols.

        Raises:
            CannotRun: an operation fails at these inputs.
        """
        values: dict[Node, Any] = {}
        known = dict(sizes)
        for node in self.nodes:
            size = size_of(node)
            if size is not None:
                values[node] = int(evaluate(size, known))
            elif node in self.inputs:
                values[node] = _plus_added(node, given[self.inputs[node]], values)
            else:
                values[node] = _call(node, values)
                known.update(_read_size(node, values[node]))
        return values[self.nodes[-1]], known


def _added(score: Node) -> list[Node]:
    """What a baddbmm adds to the product of q and k."""
    return [score.args[0]] if score.target is torch.ops.aten.baddbmm.default else []  # type: ignore[list-item]


def _plus_added(node: Node, given: Tensor, values: Mapping[Node, Any]) -> Tensor:
    options: Any = node.kwargs
    for added in _added(node):
        given = torch.add(options.get("beta", 1) * values[added], given, alpha=options.get("alpha", 1))
    return given


def _call(node: Node, values: Mapping[Node, Any]) -> Any:
    def fill(value: Any) -> Any:
        if isinstance(value, Node):
            return values[value]
        return torch.device("cpu") if isinstance(value, torch.device) else value

    if node.op != "call_function":
        raise CannotRun(f"{node.op} {node.target} is not an operation")
    try:
        arguments: Any = map_aggregate(node.args, fill)
        options: Any = map_aggregate(dict(node.kwargs), fill)
        return node.target(*arguments, **options)  # type: ignore[operator]
    except Exception as error:  # torch raises many types
        lines = str(error).splitlines() or [type(error).__name__]
        raise CannotRun(f"{node.target} at {where_of(node)} does not run: {lines[0]}") from error


def _read_size(node: Node, value: Any) -> dict[str, int]:
    """The symbol of an integer that the program reads from data, with its value."""
    held = node.meta.get("val")
    if isinstance(held, torch.SymInt) and held.node.expr.is_Symbol:
        return {str(held.node.expr): int(value)}
    return {}


def size_of(node: Node) -> Term | None:
    """The value of a node that is a size known before the program runs."""
    held = node.meta.get("val")
    if isinstance(held, bool) or not isinstance(held, (int, torch.SymInt)):
        return None
    size = _as_term(held)
    return None if tables(size) or any(map(UNBACKED.fullmatch, free_vars(size))) else size


def shape_of(node: Node) -> tuple[Term, ...]:
    return tuple(_as_term(size) for size in node.meta["val"].shape)


def _as_term(size: int | torch.SymInt) -> Term:
    return from_sympy(size.node.expr) if isinstance(size, torch.SymInt) else t.integer(size)
