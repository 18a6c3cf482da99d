"""Emit masks and biases inside the network. Masks are two-sided comparisons of integer indices: the builder finds bounds there.

A mask that is a constant, or an input, gets no bounds and is read key by key. So does one that the fused layer reads at
several sites, and one that has indices in common with another mask of the network; it is applied all the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trilithon.lower.tensorrt import floats
from trilithon.lower.tensorrt.library import library
from trilithon.lower.tensorrt.network import ITensor, Network, Size, is_tensor
from trilithon.spec import term as t
from trilithon.spec.bias_text import parse_bias
from trilithon.spec.masks import Mask, Padding, parts
from trilithon.spec.term import Term
from trilithon.spec.traverse import free_vars, scan_depth, walk

Value = Any  # an int or bool that is known, or a tensor of rank 4 that broadcasts to [b h s t]
_PYTHON: dict[str, Callable[[Any, Any], Any]] = {
    "SUM": operator.add,
    "PROD": operator.mul,
    "FLOOR_DIV": operator.floordiv,
    "GREATER": operator.gt,
    "EQUAL": operator.eq,
    "MAX": max,
    "MIN": min,
}


@dataclass(frozen=True)
class Scores:
    """Sizes `b h s t` of an attention's scores, and names that tell which of them are equal to those of another."""

    sizes: tuple[Size, ...]
    names: tuple[str, ...]


@dataclass
class MaskEmitter:
    """Emits terms.

    Args:
        net: where to.
        env: variable -> value.
        tables: name -> tensor that the terms may read.
        extents: "q" and "k" -> their axis and size, where they count from 0.
    """

    net: Network
    env: dict[str, Value]
    tables: Mapping[str, ITensor] = field(default_factory=dict)
    extents: Mapping[str, tuple[int, Size]] = field(default_factory=dict)
    _done: dict[Term, Value] = field(default_factory=dict)

    def emit(self, term: Term) -> Value:
        """The value of a term.

        Raises:
            CannotLower: the term compares floats, computes in float64, sums up to a place that is no index, or reads an
                unknown table.
        """
        if term not in self._done:
            if term.op not in _EMIT:
                raise self.net.refuse(f"{term.op} in a mask has no TensorRT form")
            self._done[term] = _EMIT[term.op](self, term)
        return self._done[term]

    def apply(self, op: str, a: Value, b: Value) -> Value:
        """`trt.ElementWiseOperation.<op>` of two integers."""
        if not is_tensor(a) and not is_tensor(b):
            return _PYTHON[op](a, b)
        return self.net.elementwise(op, *(self.tensor(x, torch.int64) for x in (a, b)))

    def tensor(self, value: Value, dtype: torch.dtype) -> ITensor:
        return value if is_tensor(value) else self.net.number(value, dtype, 4)

    def plus(self, value: Value, constant: int) -> Value:
        return value if constant == 0 else self.apply("SUM", value, constant)

    def total(self, scaled: list[tuple[Term, int]]) -> Value:
        """The sum of terms times their factors."""
        result: Value = 0
        for term, factor in scaled:
            value = self.emit(term) if factor == 1 else self.apply("PROD", self.emit(term), factor)
            result = value if not is_tensor(result) and result == 0 else self.apply("SUM", result, value)
        return result

    def sum(self, term: Term) -> Value:
        return self.plus(self.total(list(term.args[0])), term.args[1])

    def compare(self, term: Term) -> Value:
        """`sum <= 0` or `sum == 0` as a comparison of two sides without negative factors; the key's index stands alone."""
        coefficients, constant = t.linear(term.args[0])
        upper = self.total([(x, c) for x, c in coefficients.items() if c > 0])
        lower = self.total([(x, -c) for x, c in coefficients.items() if c < 0])
        if term.op == "eq0":
            return self.apply("EQUAL", self.plus(upper, constant), lower)
        if coefficients.get(t.var("k"), 0) < 0:  # upper + constant <= lower
            return self.apply("GREATER", lower, self.plus(upper, constant - 1))
        return self.negate(self.apply("GREATER", upper, self.plus(lower, -constant)))

    def negate(self, value: Value) -> Value:
        return self.net.unary("NOT", value) if is_tensor(value) else not value

    def join(self, term: Term) -> Value:
        """All, or any, of several conditions."""
        neutral, op = (True, "AND") if term.op == "and" else (False, "OR")
        result: Value = neutral
        for value in map(self.emit, term.args):
            if not is_tensor(value):
                if value != neutral:
                    return value
            else:
                result = self.net.elementwise(op, result, value) if is_tensor(result) else value
        return result

    def choose(self, term: Term) -> Value:
        condition, yes, no = map(self.emit, term.args)
        if not is_tensor(condition):
            return yes if condition else no
        if term.sort == "float":
            return floats.choose(self.net, condition, yes, no)
        dtype = torch.bool if term.sort == "bool" else torch.int64
        return self.net.select(condition, self.tensor(yes, dtype), self.tensor(no, dtype))

    def mod(self, term: Term) -> Value:
        a, b = map(self.emit, term.args)
        whole = self.apply("PROD", self.apply("FLOOR_DIV", a, b), b)
        return self.apply("SUM", a, self.apply("PROD", whole, -1))

    def read(self, term: Term) -> Value:
        """The element at indices; one outside the table gives some element, which a mask must not depend on."""
        name, *indices = term.args
        if name not in self.tables:
            raise self.net.refuse(f"a mask reads {name}, which the network does not have")
        table, place = self.tables[name], 0
        for index, size in zip(indices, self.net.sizes(table), strict=True):
            known = self.net.reshape(size, [1, 1, 1, 1]) if is_tensor(size) else size
            inside = self.apply("MAX", self.apply("MIN", self.emit(index), self.plus(known, -1)), 0)
            place = self.apply("SUM", self.apply("PROD", place, known), inside)
        found = self.net.gather(self.net.reshape(table, [-1]), self.tensor(place, torch.int64), 0)
        if term.sort == "float":
            return found
        return self.net.cast(found, torch.bool if term.sort == "bool" else torch.int64)

    def prefix_sum(self, term: Term) -> Value:
        """A sum over `0 .. q` or `0 .. k`, along that index's axis."""
        body, upper = term.args
        name = upper.args[0] if upper.op == "var" else ""
        if name not in self.extents or free_vars(body) & {"q", "k"}:
            raise self.net.refuse("a sum in a mask that does not run up to the query or the key has no TensorRT form")
        axis, size = self.extents[name]
        counter = str(t.counter(scan_depth(body)).args[0])
        inner = MaskEmitter(self.net, {**self.env, counter: self.net.iota(size, axis, 4)}, self.tables)
        summand = self.net.cast(self.tensor(inner.emit(body), torch.int64), torch.int64)
        whole = self.net.expand(summand, [size if i == axis else -1 for i in range(4)])
        last = self.net.number(axis, torch.int32)
        return self.net.out("cumulative", whole, last, library().CumulativeOperation.SUM, False, False)


_EMIT: dict[str, Callable[[MaskEmitter, Term], Value]] = {
    "int": lambda e, x: x.args[0],
    "bool": lambda e, x: x.args[0],
    "var": lambda e, x: e.env[x.args[0]],
    "sum": MaskEmitter.sum,
    "mul": lambda e, x: e.apply("PROD", *map(e.emit, x.args)),
    "floor_div": lambda e, x: e.apply("FLOOR_DIV", *map(e.emit, x.args)),
    "mod": MaskEmitter.mod,
    "ite": MaskEmitter.choose,
    "le0": MaskEmitter.compare,
    "eq0": MaskEmitter.compare,
    "and": MaskEmitter.join,
    "or": MaskEmitter.join,
    "not": lambda e, x: e.negate(e.emit(x.args[0])),
    "read": MaskEmitter.read,
    "prefix_sum": MaskEmitter.prefix_sum,
    **floats.EMIT,
}


def emit_term(
    net: Network, term: Term, scores: Scores, q_start: ITensor | None = None, tables: Mapping[str, ITensor] | None = None
) -> Value:
    """The value of a term over `b h q k s t`, of rank 4; an int or bool where it is known.

    Args:
        q_start: `[]` or `[b]`: query i stands at `q_start + i`; None = 0.
        tables: name -> tensor that the term may read.
    """
    env: dict[str, Value] = {}
    used = {x.args[0] for x in walk([term]) if x.op == "var"}
    for axis, name in enumerate("bhqk"):
        if name in used:
            env[name] = net.iota(scores.sizes[axis], axis, 4)
    if "q" in used and q_start is not None:
        env["q"] = net.elementwise("SUM", env["q"], net.reshape(net.cast(q_start, torch.int64), [-1, 1, 1, 1]))
    for axis, name in ((2, "s"), (3, "t")):
        size = scores.sizes[axis]
        env[name] = net.reshape(size, [1, 1, 1, 1]) if name in used and is_tensor(size) else size
    extents = {"k": (3, scores.sizes[3])} | ({"q": (2, scores.sizes[2])} if q_start is None else {})
    return MaskEmitter(net, env, tables or {}, extents).emit(term)


def emit_bias(net: Network, text: str, scores: Scores, q_start: ITensor | None, tables: Sequence[ITensor]) -> ITensor:
    """A float32 bias that broadcasts to `[b h s t]`, emitted once for all sites that ask for the same.

    Args:
        text: what `trilithon.spec.bias_text.write_bias` gives, over these tables.
        q_start: `[]` or `[b]` int64: query i stands at `q_start + i`; None = 0.
    """
    key = ("bias", text, scores.names, None if q_start is None else q_start.name, *(x.name for x in tables))
    if key not in net.shared:
        named = {str(i): x for i, x in enumerate(tables)}
        value = emit_term(net, parse_bias(text, len(tables)), scores, q_start, named)
        made = value if is_tensor(value) else net.number(value, torch.float32, 4)
        net.shared[key] = net.cast(made, torch.float32)
    return net.shared[key]


def emit_mask(
    net: Network,
    mask: Mask,
    scores: Scores,
    q_start: ITensor | None = None,
    key_mask: ITensor | None = None,
    tables: Mapping[str, ITensor] | None = None,
    use: str = "scores",
) -> ITensor | None:
    """A bool mask that broadcasts to `[b h s t]`, emitted once for all sites that ask for the same; None = every key.

    Args:
        q_start: `[]` or `[b]` int64: query i stands at key position `q_start + i`; None = 0.
        key_mask: bool `[b t]`, what the `Padding` parts allow.
        tables: name -> tensor that other parts may read.
        use: masks for different uses are different layers: the builder finds no bounds in one that is also read elsewhere.
    """
    kinds = parts(mask)
    padded = any(isinstance(part, Padding) for part in kinds)
    if padded and key_mask is None:
        raise net.refuse(f"{mask} needs a key mask")
    positions = t.conj(*(part.term() for part in kinds if not isinstance(part, Padding)))
    names = [None if x is None else x.name for x in (q_start, key_mask if padded else None)]
    key = ("mask", use, positions, scores.names, *names, *sorted((n, x.name) for n, x in (tables or {}).items()))
    if key not in net.shared:
        pieces = [emit_term(net, positions, scores, q_start, tables)]
        if padded:
            keys = net.cast(key_mask, torch.bool)
            pieces.append(net.reshape(keys, [net.size(keys, 0), 1, 1, net.size(keys, 1)]))
        net.shared[key] = _all(net, pieces)
    return net.shared[key]


def _all(net: Network, pieces: list[Value]) -> ITensor | None:
    kept = [x for x in pieces if is_tensor(x) or not x]
    if any(not is_tensor(x) for x in kept):
        return net.number(False, torch.bool, 4)
    if not kept:
        return None
    return kept[0] if len(kept) == 1 else net.elementwise("AND", *kept)
