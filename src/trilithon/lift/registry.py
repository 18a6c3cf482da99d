"""The closed table of mask-lifting handlers: one ATen overload, one handler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._ops import OpOverload
from torch.fx import Node

from trilithon.errors import CannotLift
from trilithon.lift.symtensor import INTEGERS, Idx, SymTensor, integer_range
from trilithon.passes import where_of
from trilithon.spec.term import Term

Handler = Callable[..., SymTensor]
HANDLERS: dict[OpOverload, Handler] = {}


@dataclass(frozen=True)
class Obligation:
    """`low <= term <= high` must be proved, or an integer operation may wrap, divide by zero or round."""

    term: Term
    low: int
    high: int
    node: Node


@dataclass(frozen=True)
class Call:
    """What a handler may ask about the node it lifts."""

    node: Node
    shape: Idx
    dtype: torch.dtype
    obligations: dict[Term, Obligation]

    def refuse(self, why: str) -> CannotLift:
        return CannotLift(
            f"cannot lift {self.node.target}",
            where=where_of(self.node),
            why=why,
            todo="the mask stays as it is. To have it proved: extend its handler in trilithon/lift/handlers",
        )

    def in_range(self, value: Term) -> Term:
        """`value`, with the obligation that it fits the node's integer dtype."""
        if self.dtype in INTEGERS:
            self.require(value, *integer_range(self.dtype))
        return value

    def require(self, value: Term, low: int, high: int) -> None:
        """Add the obligation `low <= value <= high`; a second one on the same term narrows the first."""
        if value.is_literal and low <= value.value <= high:
            return
        known = self.obligations.get(value)
        if known is not None and known.low >= low and known.high <= high:
            return
        if known is not None:
            low, high = max(low, known.low), min(high, known.high)
        self.obligations[value] = Obligation(value, low, high, self.node)

    def result(self, element: Callable[[Idx], Term]) -> SymTensor:
        """A tensor of the node's own shape and dtype."""
        return SymTensor(self.shape, self.dtype, element)


def lifts(*ops: OpOverload) -> Callable[[Handler], Handler]:
    """Register a handler for these overloads.

    It is called as `handler(call, **arguments)` with the names of the ATen schema (`self` is called `x`):
    tensors as `SymTensor`, sizes and symbolic integers as `Term`, the rest as it stands in the graph. An
    argument that the handler does not name must have its schema default, or the lift is refused.
    """

    def register(handler: Handler) -> Handler:
        for op in ops:
            if op in HANDLERS:
                raise ValueError(f"{op} already has the handler {HANDLERS[op].__name__}")
            HANDLERS[op] = handler
        return handler

    return register
