"""Emit the term of a mask or a bias as graph nodes: the interpreter of terms that kernels and Inductor see."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from trilithon.errors import CannotLower
from trilithon.lower.native.floats import choose, compare, function, operation, to_dtype
from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.evaluate import evaluate
from trilithon.spec.masks import Mask, Padding, parts
from trilithon.spec.term import Term
from trilithon.spec.traverse import free_vars, tables


def index_axis(size: int, axis: int, start: Tensor | None, like: Tensor) -> Tensor:
    """`start + 0 .. size - 1` along `axis` of a `[b h s t]` mask; `start` is None (0), `[]` or `[b]`."""
    index = torch.arange(size, device=like.device).view([-1 if i == axis else 1 for i in range(4)])
    return index if start is None else index + start.view(-1, 1, 1, 1)


def key_axis(of_keys: Tensor) -> Tensor:
    """What each key of each row has, `[b t]`, as `[b 1 1 t]`."""
    return of_keys[:, None, None, :]


def blocked(bias: Tensor, allowed: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What SDPA adds to the scores: the bias in `dtype`, and -inf where a key is forbidden."""
    bias = bias.to(dtype)
    return bias if allowed is None else torch.where(allowed, bias, -torch.inf)


@dataclass
class MaskEmitter:
    """Emits terms at the insertion point of a graph.

    Args:
        graph: where to emit.
        env: variable -> node or int; index nodes broadcast to `[b h s t]`.
        tables: name -> node of the tensor that the terms may read.
    """

    graph: Graph
    env: dict[str, Any]
    tables: dict[str, Node] = field(default_factory=dict)
    _done: dict[Term, Any] = field(default_factory=dict)

    def emit(self, term: Term) -> Any:
        """The node (or plain number) with the term's value.

        Raises:
            CannotLower: the term sums up, or reads a table that is not given.
        """
        if term not in self._done and term.sort == "float" and not free_vars(term) and not tables(term):
            self._done[term] = float(evaluate(term, {}))
        if term not in self._done:
            if term.op not in _EMIT or (term.op == "read" and term.args[0] not in self.tables):
                raise CannotLower(f"cannot emit {term}", why=f"{term.op} has no kernel", todo="the mask stays as it is")
            self._done[term] = _EMIT[term.op](self, term)
        return self._done[term]

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        if any(isinstance(a, Node) for a in args):
            return self.graph.call_function(function, args)
        return function(*args)

    def sum(self, term: Term) -> Any:
        scaled = [self.call(operator.mul, self.emit(x), c) if c != 1 else self.emit(x) for x, c in term.args[0]]
        return reduce(lambda a, b: self.call(operator.add, a, b), [*scaled, term.args[1]])

    def convert(self, term: Term) -> Any:
        dtype, x = term.args
        return self.call(to_dtype, self.emit(x), float_term.DTYPES[dtype])

    def operation(self, term: Term) -> Any:
        name, dtype, a, b = term.args
        return self.call(operation, name, float_term.DTYPES[dtype], self.emit(a), self.emit(b))

    def function(self, term: Term) -> Node:
        name, dtype, *operands = term.args
        return self.graph.call_function(function, (name, float_term.DTYPES[dtype], [self.emit(x) for x in operands]))

    def choose(self, term: Term) -> Any:
        return self.call(choose if term.sort == "float" else torch.where, *map(self.emit, term.args))

    def read(self, term: Term) -> Any:
        indices = tuple(self.emit(i) for i in term.args[1:])
        return self.call(look_up, self.tables[term.args[0]], *indices)


def look_up(table: Tensor, *indices: Tensor | int) -> Tensor:
    """The element at `indices`; one outside the table gives some element, which a mask must not depend on."""
    inside = [
        i.clamp(0, size - 1) if isinstance(i, Tensor) else min(max(i, 0), size - 1)
        for i, size in zip(indices, table.shape, strict=True)
    ]
    return table[tuple(inside)]


_EMIT: dict[str, Callable[[MaskEmitter, Term], Any]] = {
    "int": lambda e, x: x.args[0],
    "bool": lambda e, x: x.args[0],
    "var": lambda e, x: e.env[x.args[0]],
    "sum": MaskEmitter.sum,
    "read": MaskEmitter.read,
    "mul": lambda e, x: e.call(operator.mul, e.emit(x.args[0]), e.emit(x.args[1])),
    "floor_div": lambda e, x: e.call(operator.floordiv, e.emit(x.args[0]), e.emit(x.args[1])),
    "mod": lambda e, x: e.call(operator.mod, e.emit(x.args[0]), e.emit(x.args[1])),
    "ite": MaskEmitter.choose,
    "to_float": MaskEmitter.convert,
    "float_cast": MaskEmitter.convert,
    "float_op": MaskEmitter.operation,
    "float_fn": MaskEmitter.function,
    "float_compare": lambda e, x: e.call(compare, x.args[0], *map(e.emit, x.args[1:])),
    "to_int": lambda e, x: e.call(to_dtype, e.emit(x.args[0]), torch.int64),
    "le0": lambda e, x: e.call(operator.le, e.emit(x.args[0]), 0),
    "eq0": lambda e, x: e.call(operator.eq, e.emit(x.args[0]), 0),
    "and": lambda e, x: reduce(lambda a, b: e.call(operator.and_, a, b), map(e.emit, x.args)),
    "or": lambda e, x: reduce(lambda a, b: e.call(operator.or_, a, b), map(e.emit, x.args)),
    "not": lambda e, x: e.call(operator.invert, e.emit(x.args[0])),
}


def emit_cells(graph: Graph, q: Node, k: Node, q_start: Node | None, k_positions: Node | None) -> dict[str, Any]:
    """The variables `h q k s t` of masks and biases, for queries `q [b h s d]` over keys `k [b g t d]`.

    Args:
        q_start: query i stands at position `q_start + i`; None = 0.
        k_positions: `[b t]`: position of each key, negative where there is none; None = 0, 1, 2, ...
    """
    h, s, total = (graph.call_function(torch.ops.aten.sym_size.int, x) for x in ((q, 1), (q, 2), (k, 2)))
    if k_positions is None:
        keys = graph.call_function(index_axis, (total, 3, None, q))
    else:
        keys = graph.call_function(key_axis, (k_positions,))
    return {
        "h": graph.call_function(index_axis, (h, 1, None, q)),
        "q": graph.call_function(index_axis, (s, 2, q_start, q)),
        "k": keys,
        "s": s,
        "t": total,
    }


def emit_mask(graph: Graph, mask: Mask, cells: dict[str, Any], key_mask: Node | None, has_empty: bool = False) -> Node | None:
    """A bool mask `[b or 1, 1, s, t]` over `cells`; None = every key.

    Args:
        key_mask: bool `[b t]`, what a `Padding` part allows.
        has_empty: negative positions of keys are places without a key.
    """
    emitter = MaskEmitter(graph, cells)
    positions = t.conj(*(part.term() for part in parts(mask) if not isinstance(part, Padding)))
    pieces: list[Node] = [] if positions is t.TRUE else [emitter.emit(positions)]
    if has_empty:
        pieces.append(graph.call_function(operator.ge, (cells["k"], 0)))
    if any(isinstance(part, Padding) for part in parts(mask)):
        pieces.append(graph.call_function(key_axis, (key_mask,)))
    return reduce(lambda a, b: graph.call_function(operator.and_, (a, b)), pieces) if pieces else None


def emit_bias(graph: Graph, bias: Term, cells: dict[str, Any], given: Sequence[Node]) -> Node:
    """A float bias that broadcasts to `[b h s t]`, each operation in the dtype that it has in the program.

    Args:
        given: what the term reads as tables "0", "1", ...
    """
    emitter = MaskEmitter(graph, cells, {str(i): table for i, table in enumerate(given)})
    node: Node = emitter.emit(bias)
    return node
