"""Lift a graph node to a `SymTensor`: what is element `index` of this tensor?"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from trilithon.capture.program import Program
from trilithon.errors import CannotLift
from trilithon.lift import constants
from trilithon.lift.handlers import HANDLERS
from trilithon.lift.registry import Call, Obligation
from trilithon.lift.sizes import from_sympy
from trilithon.lift.symtensor import INTEGERS, Idx, SymTensor, dtype_name, sort_of
from trilithon.passes import bound_arguments, where_of
from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.term import Term

VALUE_FREE = {"device", "layout", "pin_memory", "memory_format", "non_blocking", "implicit", "copy"}  # never change a value


class Lifter:
    """Lifts the nodes of one program; use a fresh one for each mask, so obligations stay apart.

    Args:
        program: a functional program (decomposed with an empty table).
        leaves: nodes to treat as input tables of that name instead of lifting them.
    """

    def __init__(self, program: Program, leaves: Mapping[Node, str] | None = None) -> None:
        self.leaves = dict(leaves or {})
        self.obligations: dict[Term, Obligation] = {}
        self.table_shapes: dict[str, Idx] = {}
        self._done: dict[Node, SymTensor] = {}
        signature = program.graph_signature
        mutated = set(signature.buffers_to_mutate.values())
        parameters = signature.inputs_to_parameters  # each of these is made anew when it is read
        targets = {
            **parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self.targets = targets
        self.data = {
            node: value
            for node, target in targets.items()
            if target not in mutated and node not in parameters
            if isinstance(value := program.state_dict.get(target, program.constants.get(target)), torch.Tensor)
            and not value.is_meta
        }

    def define(self, node: Node, tensor: SymTensor) -> None:
        """Take `node` to be `tensor`, instead of lifting it."""
        self._done[node] = tensor

    def lift(self, node: Node) -> SymTensor:
        """Raises CannotLift where an operation or one of its arguments is not modelled."""
        if node not in self._done:
            self._done[node] = self._lift(node)
        return self._done[node]

    def _lift(self, node: Node) -> SymTensor:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            raise self._refuse(node, f"{node.target} does not give one tensor")
        shape, dtype = tuple(self.size(d) for d in value.shape), value.dtype
        if dtype != torch.bool and dtype not in INTEGERS and dtype_name(dtype) not in float_term.DTYPES:
            raise self._refuse(node, f"{dtype} is not modelled")
        if node in self.leaves:
            return self._table(self.leaves[node], shape, dtype)
        if node.op == "placeholder":
            if node.name in self.data:
                self.table_shapes[node.name] = shape
                return constants.lift_constant(self.data[node.name], node.name)
            return self._table(node.name, shape, dtype)
        if node.op != "call_function" or node.target not in HANDLERS:
            raise self._refuse(node, f"{node.target} has no handler, so what this mask allows is not known")
        call = Call(node, shape, dtype, self.obligations)
        lifted = HANDLERS[node.target](call, **self._arguments(call))
        return SymTensor(shape, dtype, lifted.element)

    def _table(self, name: str, shape: Idx, dtype: torch.dtype) -> SymTensor:
        self.table_shapes[name] = shape
        return SymTensor(shape, dtype, lambda index: t.read(name, index, sort_of(dtype)))

    def _refuse(self, node: Node, why: str) -> CannotLift:
        return CannotLift(
            "cannot lift the attention mask",
            where=where_of(node),
            why=why,
            todo="the mask stays as it is. To have it proved: add a handler in trilithon/lift/handlers",
        )

    def _arguments(self, call: Call) -> dict[str, Any]:
        """The node's arguments by schema name, each lifted; refuses one that its handler does not name."""
        node = call.node
        accepted = inspect.signature(HANDLERS[node.target]).parameters  # type: ignore[index]
        bound: dict[str, Any] = {}
        defaults = {a.name: a for a in node.target._schema.arguments}  # type: ignore[union-attr]
        for name, value in bound_arguments(node).items():
            own = "x" if name == "self" else name
            default = defaults[name]
            if own in accepted:
                bound[own] = self._argument(value)
            elif name not in VALUE_FREE and not (default.has_default_value() and value == default.default_value):
                raise call.refuse(f"its argument {name}={value} is not modelled")
        return bound

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Node):
            held = value.meta.get("val")
            if isinstance(held, torch.Tensor):
                return self.lift(value)
            if not isinstance(held, (int, torch.SymInt)):
                raise self._refuse(value, f"{value.target} gives {type(held).__name__}, not a tensor or an integer")
            return self.size(held)
        if isinstance(value, (list, tuple)):
            return [self._argument(v) for v in value]
        return value

    def size(self, value: Any) -> Term:
        """An int or symbolic integer as a term."""
        if isinstance(value, Term):
            return value
        if isinstance(value, (bool, int)):
            return t.integer(int(value))
        if isinstance(value, torch.SymInt):
            return from_sympy(value.node.expr)
        raise TypeError(f"no size: {value!r}")
