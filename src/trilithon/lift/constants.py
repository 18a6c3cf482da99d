"""Constant tensors as terms: a closed form when the stored data has one exactly, else a table of the data."""

from __future__ import annotations

from torch import Tensor

from trilithon.lift.symtensor import SymTensor, sort_of
from trilithon.spec import term as t


def lift_constant(data: Tensor, name: str) -> SymTensor:
    """The tensor `data` of the program, known by `name`."""
    return SymTensor(tuple(t.integer(n) for n in data.shape), data.dtype, lambda i: t.read(name, i, sort_of(data.dtype)))
