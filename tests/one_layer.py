"""A network of a few layers, interpreted, and compared with what PyTorch makes of the same.

Limits: the error against float64 is at most twice that of eager PyTorch in the same type, plus the last digit of float32.
With `dtype=float64` only the rounding of float64 is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from trilithon.errors import CannotLower
from trilithon.lower.tensorrt.interpret import interpret
from trilithon.lower.tensorrt.library import library
from trilithon.lower.tensorrt.network import Network

try:
    trt = library()
except CannotLower as missing:
    pytest.skip(str(missing), allow_module_level=True)

Emit = Callable[..., Any]
Meaning = Callable[..., Any]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
F32, I32, I64 = torch.float32, torch.int32, torch.int64
INF = math.inf
FLOOR = torch.finfo(torch.float32).eps


def run(emit: Emit, inputs: Sequence[Tensor], *, free: bool = False, **options: Any) -> list[Tensor]:
    """What the interpreter makes of the layers that `emit` adds; with `free` sizes known only at run time."""
    net = Network()
    given = [net.input(f"x{i}", x.dtype, [-1] * x.dim() if free else x.shape) for i, x in enumerate(inputs)]
    made = emit(net, *given)
    made = list(made) if isinstance(made, (tuple, list)) else [made]
    for i, tensor in enumerate(made):
        net.output(tensor, f"y{i}")
    found = interpret(net, {f"x{i}": x for i, x in enumerate(inputs)}, **options)
    return [found[f"y{i}"] for i in range(len(made))]


def error(got: Tensor, true: Tensor) -> float:
    """Largest absolute difference; infinite where shapes, NaN or infinities differ."""
    a, b = got.double(), true.double()
    finite = b.isfinite()
    if a.shape != b.shape or not torch.equal(a.isfinite(), finite):
        return INF
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return INF
    return float((a - b)[finite].abs().max()) if finite.any() else 0.0


def listed(values: Any) -> list[Tensor]:
    return list(values) if isinstance(values, (tuple, list)) else [values]


def widened(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.double() if x.is_floating_point() else x for x in inputs]


def check(emit: Emit, meaning: Meaning, *inputs: Tensor, free: bool = False) -> None:
    """The layers do what is meant, in the type of the inputs and in float64."""
    eager, true = listed(meaning(*inputs)), listed(meaning(*widened(inputs)))
    got, exact = run(emit, inputs, free=free), run(emit, inputs, free=free, dtype=torch.float64)
    assert len(got) == len(exact) == len(eager)
    for ours, wide, theirs, meant in zip(got, exact, eager, true, strict=True):
        assert ours.dtype == theirs.dtype
        if not ours.is_floating_point():
            assert torch.equal(ours, theirs)
            assert torch.equal(wide, theirs)
            continue
        largest = float(meant[meant.isfinite()].abs().max()) if meant.isfinite().any() else 0.0
        assert error(ours, meant) <= 2 * error(theirs, meant) + FLOOR * largest
        assert wide.dtype == torch.float64
        assert error(wide, meant) <= 1e-13 * max(1.0, largest)


@dataclass(frozen=True)
class Row:
    """Layers, what they mean, and shapes (of random floats) or tensors to try them on.

    Attributes:
        near: another meaning, which it must not have.
        free: does the layer allow sizes that are known only at run time?
    """

    emit: Emit
    meaning: Meaning
    inputs: tuple[Any, ...]
    near: Meaning | None = None
    free: bool = True


def filled(row: Row, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [x if isinstance(x, Tensor) else torch.randn(x).to(dtype) for x in row.inputs]


def check_row(row: Row, dtype: torch.dtype) -> None:
    inputs = filled(row, dtype)
    for free in (False, True) if row.free else (False,):
        check(row.emit, row.meaning, *inputs, free=free)
    if row.near is not None:
        pairs = zip(run(row.emit, inputs), listed(row.near(*inputs)), strict=True)
        assert any(error(a, b) > 0.05 for a, b in pairs), "the neighbour was not told apart"


def integers(*shape: int, low: int = -9, high: int = 10, dtype: torch.dtype = I64) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def flags(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.4


def added(net: Network, kind: str, *arguments: Any, inputs: dict[int, Any], **settings: Any) -> Any:
    """The output of a layer that is valid only once these inputs are set."""
    layer = getattr(net.definition, f"add_{kind}")(*arguments)
    for slot, tensor in inputs.items():
        layer.set_input(slot, tensor)
    for name, value in settings.items():
        setattr(layer, name, value)
    return net.checked(layer)
