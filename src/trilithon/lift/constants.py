"""Constant tensors as terms: a closed form when the stored data has one exactly, else a table of the data.

Every form is checked against all of the data, bit by bit, so a single flipped cell is never lost.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from trilithon.lift.symtensor import INTEGERS, Idx, SymTensor, sort_of
from trilithon.spec import term as t
from trilithon.spec.term import Term

Element = Callable[[Idx], Term]
MOST_EXCEPTIONS = 8
MOST_RUNS = 8
LARGEST_INTEGER = 1 << 62
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def lift_constant(data: Tensor, name: str) -> SymTensor:
    """The tensor `data` of the program, known by `name`."""
    data = data.detach().resolve_neg().resolve_conj()
    shape = tuple(t.integer(n) for n in data.shape)
    closed = (_uniform(data) or _affine(data) or _bands(data)) if data.numel() else None

    def element(index: Idx) -> Term:
        if all(i.op == "int" and 0 <= i.value < n for i, n in zip(index, data.shape, strict=True)):
            return _value(data[tuple(i.value for i in index)])
        return closed(index) if closed is not None else t.read(name, index, sort_of(data.dtype))

    return SymTensor(shape, data.dtype, element)


def _value(cell: Tensor) -> Term:
    """A tensor of one element as a literal."""
    value = cell.item()
    if cell.dtype == torch.bool:
        return t.boolean(bool(value))
    return t.integer(int(value)) if cell.dtype in INTEGERS else t.real(float(value))


def _bits(data: Tensor) -> Tensor:
    """The same data for exact comparison: NaN equals itself, and 0.0 differs from -0.0."""
    return data.contiguous().view(BITS[data.element_size()])


def _uniform(data: Tensor) -> Element | None:
    """All elements are the same."""
    bits = _bits(data).reshape(-1)
    if not bool((bits == bits[0]).all()):
        return None
    value = _value(data.reshape(-1)[0])
    return lambda _: value


def _affine(data: Tensor) -> Element | None:
    """Integers `start + slope_0 * i_0 + slope_1 * i_1 + ..`, as arange gives."""
    if data.dtype not in INTEGERS:
        return None
    origin = (0,) * data.dim()
    start = int(data[origin])
    steps = [d for d, n in enumerate(data.shape) if n > 1]
    slopes = {d: int(data[(*origin[:d], 1, *origin[d + 1 :])]) - start for d in steps}
    if abs(start) + sum(abs(slope) * data.shape[d] for d, slope in slopes.items()) > LARGEST_INTEGER:
        return None
    expected = torch.full((1,) * data.dim(), start, dtype=torch.int64, device=data.device)
    for d, slope in slopes.items():
        ramp = slope * torch.arange(data.shape[d], device=data.device)
        expected = expected + ramp.view([-1 if axis == d else 1 for axis in range(data.dim())])
    if not bool((data == expected).all()):
        return None
    return lambda index: t.add(t.integer(start), *(t.scale(index[d], slope) for d, slope in slopes.items()))


def _bands(data: Tensor) -> Element | None:
    """The last two axes decide, by few ranges of `j - i` with one value each, but for a few single cells."""
    if data.dim() < 2 or min(data.shape[-2:]) < 2:
        return None
    rows, columns = data.shape[-2:]
    planes = _bits(data).reshape(-1, rows, columns)
    if not bool((planes == planes[0]).all()):
        return None
    diagonals = _diagonals(planes[0])
    starts = [0, *(torch.nonzero(diagonals[1:] != diagonals[:-1]).flatten() + 1).tolist()]
    if len(starts) > MOST_RUNS:
        return None
    expected = diagonals.as_strided((rows, columns), (1, 1)).flip(0)  # row i starts at diagonal rows - 1 - i
    odd = torch.nonzero(planes[0] != expected)
    if len(odd) > min(MOST_EXCEPTIONS, rows * columns // 8):
        return None
    plane = data.reshape(-1, rows, columns)[0]
    literals = diagonals.view(data.dtype)
    runs = [(start - (rows - 1), _value(literals[start])) for start in starts]
    cells = [(i, j, _value(plane[i, j])) for i, j in odd.tolist()]
    return lambda index: _band_element(index[-2], index[-1], runs, cells)


def _diagonals(plane: Tensor) -> Tensor:
    """The likely value of each diagonal, from the lower left corner on: what two of three of its cells agree on."""
    rows, columns = plane.shape
    offset = torch.arange(1 - rows, columns, device=plane.device)
    first = (-offset).clamp(min=0)
    last = torch.minimum(torch.full_like(offset, rows), columns - offset) - 1
    low, middle, high = (plane[i, i + offset] for i in (first, (first + last) // 2, last))
    return torch.where(low == high, low, middle).contiguous()


def _band_element(i: Term, j: Term, runs: list[tuple[int, Term]], cells: list[tuple[int, int, Term]]) -> Term:
    value = runs[-1][1]
    for (_, here), (following, _) in reversed(list(pairwise(runs))):
        value = t.ite(j - i < following, here, value)
    for row, column, odd in cells:
        value = t.ite(i.eq(row) & j.eq(column), odd, value)
    return value
