"""Evaluate a term with torch: variables are ints or index tensors that broadcast, tables are tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trilithon.spec import float_term
from trilithon.spec.term import Term
from trilithon.spec.traverse import scan_depth

OUT_OF_RANGE = -7_777_777  # what a read outside its table gives: never a value a mask would mean


def evaluate(term: Term, env: Mapping[str, Tensor | int], tables: Mapping[str, Tensor] | None = None) -> Tensor:
    """The value of `term` where every variable is replaced by `env` and every read looks into `tables`.

    Args:
        env: name -> int or int64 tensor; tensors broadcast against each other.
        tables: name -> tensor. A read outside a table gives `OUT_OF_RANGE` (True for bool), not an error,
            because both sides of a conditional are evaluated.

    Returns:
        A tensor of the broadcast shape: int64, bool or float.

    Raises:
        KeyError: a variable or table is missing.
    """
    device = next((v.device for v in env.values() if isinstance(v, Tensor)), torch.device("cpu"))
    tensors = {name: v if isinstance(v, Tensor) else _constant(v, device) for name, v in env.items()}
    return _Evaluator(tensors, dict(tables or {}), device).value(term)


def _constant(value: float, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Made on the device: a copy from the host would wait, which the capture of a CUDA graph does not allow."""
    return torch.full((), value, dtype=dtype, device=device)


class _Evaluator:
    def __init__(self, env: dict[str, Tensor], tables: dict[str, Tensor], device: torch.device) -> None:
        self.env, self.tables, self.device = env, tables, device
        self.memo: dict[Term, Tensor] = {}

    def value(self, term: Term) -> Tensor:
        if term not in self.memo:
            self.memo[term] = _OPS[term.op](self, term)
        return self.memo[term]

    def read(self, term: Term) -> Tensor:
        table = self.tables[term.args[0]].to(self.device)
        indices = torch.broadcast_tensors(*[self.value(i) for i in term.args[1:]]) if len(term.args) > 1 else ()
        if not indices:
            return table
        inside = torch.ones_like(indices[0], dtype=torch.bool)
        for i, size in zip(indices, table.shape, strict=True):
            inside = inside & (i >= 0) & (i < size)
        if 0 in table.shape:
            return torch.full_like(indices[0], OUT_OF_RANGE).to(table.dtype)
        values = table[tuple(i.clamp(0, size - 1) for i, size in zip(indices, table.shape, strict=True))]
        values = {"int": values.long, "float": values.double, "bool": values.bool}[term.sort]()
        return torch.where(inside, values, _constant(OUT_OF_RANGE, self.device).to(values.dtype))

    def prefix_sum(self, term: Term) -> Tensor:
        body, upper = term.args
        last = self.value(upper)
        length = max(int(last.max()) + 1, 1) if last.numel() else 1
        inner = {name: v.unsqueeze(-1) for name, v in self.env.items()}
        inner[f"#{scan_depth(body)}"] = torch.arange(length, device=self.device)
        summand = _Evaluator(inner, self.tables, self.device).value(body)
        summand = summand.expand(*summand.shape[:-1], length) if summand.dim() else summand.expand(length)
        sums = summand.cumsum(-1)
        shape = torch.broadcast_shapes(sums.shape[:-1], last.shape)
        picked = sums.expand(*shape, length).gather(-1, last.clamp(0, length - 1).expand(shape).unsqueeze(-1)).squeeze(-1)
        return torch.where(last < 0, torch.zeros_like(picked), picked)

    def sum(self, term: Term) -> Tensor:
        total = _constant(term.args[1], self.device)
        for part, factor in term.args[0]:
            total = total + factor * self.value(part)
        return total

    def all_of(self, term: Term, op: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        result = self.value(term.args[0])
        for part in term.args[1:]:
            result = op(result, self.value(part))
        return result

    def floats(self, term: Term) -> Tensor:
        kind = float_term.DTYPES[term.args[1]]
        a, b = (self.value(x).to(kind) for x in term.args[2:])
        return float_term.BINARY[term.args[0]](a, b).double()

    def function(self, term: Term) -> Tensor:
        kind = float_term.DTYPES[term.args[1]]
        return float_term.FUNCTIONS[term.args[0]](*(self.value(x).to(kind) for x in term.args[2:])).double()


_OPS: dict[str, Callable[[_Evaluator, Term], Tensor]] = {
    "int": lambda e, x: _constant(x.args[0], e.device),
    "bool": lambda e, x: _constant(x.args[0], e.device),
    "float": lambda e, x: _constant(x.args[0], e.device, torch.float64),
    "var": lambda e, x: e.env[x.args[0]],
    "read": _Evaluator.read,
    "prefix_sum": _Evaluator.prefix_sum,
    "sum": _Evaluator.sum,
    "mul": lambda e, x: e.value(x.args[0]) * e.value(x.args[1]),
    "floor_div": lambda e, x: torch.div(e.value(x.args[0]), e.value(x.args[1]), rounding_mode="floor"),
    "mod": lambda e, x: torch.remainder(e.value(x.args[0]), e.value(x.args[1])),
    "le0": lambda e, x: e.value(x.args[0]) <= 0,
    "eq0": lambda e, x: e.value(x.args[0]) == 0,
    "and": lambda e, x: e.all_of(x, torch.logical_and),
    "or": lambda e, x: e.all_of(x, torch.logical_or),
    "not": lambda e, x: torch.logical_not(e.value(x.args[0])),
    "ite": lambda e, x: torch.where(e.value(x.args[0]), e.value(x.args[1]), e.value(x.args[2])),
    "to_float": lambda e, x: e.value(x.args[1]).to(float_term.DTYPES[x.args[0]]).double(),
    "float_cast": lambda e, x: e.value(x.args[1]).to(float_term.DTYPES[x.args[0]]).double(),
    "float_op": _Evaluator.floats,
    "float_fn": _Evaluator.function,
    "to_int": lambda e, x: e.value(x.args[0]).trunc().long(),
    "float_compare": lambda e, x: float_term.COMPARE[x.args[0]](e.value(x.args[1]), e.value(x.args[2])),
}
