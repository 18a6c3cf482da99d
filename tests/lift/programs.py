"""The rows of the handler tables as exported programs, shared by the tests of handlers and of their mutants."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from lift.harness import Function, Inputs, Tables, assert_same, exported, lifted, outputs
from lift.rows import DYNAMIC, STATIC

INF, NAN = float("inf"), float("nan")
Rows = dict[str, Function]


def tables(rows: int, columns: int, seed: int) -> Tables:
    """Inputs of all kinds: `rows` and `columns` are the two dynamic axes."""
    g = torch.Generator().manual_seed(seed)

    def ints(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=g).to(dtype)

    special = torch.tensor([0.0, 1.0, -1.0, INF, -INF, NAN, 0.5, torch.finfo(torch.float32).min])
    return {
        "a": ints(-9, 10, rows, columns),
        "c": ints(-9, 10, rows, columns),
        "pos": ints(1, 5, rows, columns),
        "n32": ints(-9, 10, rows, columns, dtype=torch.int32),
        "u8": ints(0, 4, rows, columns, dtype=torch.uint8),
        "m": ints(0, 2, rows, columns, dtype=torch.bool),
        "w": ints(0, 2, rows, columns, dtype=torch.bool),
        "row": ints(-9, 10, columns),
        "col": ints(-9, 10, rows, 1),
        "one": ints(-9, 10),
        "third": torch.tensor(1 / 3, dtype=torch.float64),
        "f": special[ints(0, len(special), rows, columns)],
        "g": torch.randn(rows, columns, generator=g),
        "h": torch.randn(rows, columns, generator=g).bfloat16(),
        "up": ints(0, 4, 5),
        "wrap": ints(-4, 4, 3, 2),
        "pick": ints(0, 4, 4, columns),
        "cube": ints(-9, 10, 2, 3, 4),
        "cubem": ints(0, 2, 2, 3, 4, dtype=torch.bool),
    }


Exported = tuple[ExportedProgram, dict[str, Node]]


def exported_rows(rows: Rows, axes: dict[int, Dim] | None = None) -> Exported:
    """All rows as one exported program, because exporting is slow."""
    ep = exported(list(rows.values()), tables(7, 11, 0) if axes else tables(4, 6, 0), axes)
    return ep, dict(zip(rows, outputs(ep), strict=True))


@cache
def fixed_sizes() -> Exported:
    return exported_rows(STATIC | DYNAMIC)


@cache
def dynamic_sizes() -> Exported:
    return exported_rows(DYNAMIC, {7: Dim("rows", min=4, max=64), 11: Dim("columns", min=4, max=64)})


def check(program: Exported, name: str, inputs: Tables) -> None:
    """The row, lifted and evaluated, is what torch gives at every index."""
    ep, nodes = program
    expected = (STATIC | DYNAMIC)[name](Inputs(inputs))
    assert_same(lifted(ep, nodes[name], inputs, tuple(expected.shape)), expected)


def check_fixed(name: str) -> None:
    check(fixed_sizes(), name, tables(4, 6, 1))


def check_dynamic(name: str) -> None:
    for seed, (rows, columns) in enumerate([(4, 9), (6, 5)]):
        check(dynamic_sizes(), name, tables(rows, columns, seed))


# What a decomposition writes in other ops, as a program has it that was exported without one.
UNDECOMPOSED = ("reshape_transposed", "view_uneven", "contiguous", "type_as", "stack_mixed", "stack_last_mixed", "to_other")


@cache
def undecomposed() -> Exported:
    rows = {name: (STATIC | DYNAMIC)[name] for name in UNDECOMPOSED}
    ep = exported(list(rows.values()), tables(4, 6, 0), decomposed=False)
    return ep, dict(zip(rows, outputs(ep), strict=True))


def check_undecomposed(name: str) -> None:
    check(undecomposed(), name, tables(4, 6, 1))
