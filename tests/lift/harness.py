"""Run a function eagerly and as a lifted term, and compare every element."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from trilithon.lift.lifter import Lifter
from trilithon.spec import term as t
from trilithon.spec.evaluate import evaluate
from trilithon.spec.term import Term
from trilithon.spec.traverse import children, walk

Tables = dict[str, Tensor]


class Inputs:
    """Named input tables: `i.x`."""

    def __init__(self, tables: Mapping[str, Tensor]) -> None:
        self.__dict__.update(tables)

    def __getattr__(self, name: str) -> Tensor:  # for type checkers; the tables stand in __dict__
        raise AttributeError(name)


Function = Callable[[Inputs], Tensor]


class _Module(nn.Module):
    def __init__(self, names: tuple[str, ...], functions: list[Function]) -> None:
        super().__init__()
        self.names, self.functions = names, functions

    def forward(self, *tables: Tensor) -> list[Tensor]:
        inputs = Inputs(dict(zip(self.names, tables, strict=True)))
        return [f(inputs) for f in self.functions]


def exported(
    functions: list[Function], tables: Tables, axes: Mapping[int, Any] | None = None, decomposed: bool = True
) -> ExportedProgram:
    """One program with an output for each function; `axes` names the dynamic sizes, by their example value."""
    dynamic = None
    if axes is not None:
        dynamic = (tuple({d: axes[n] for d, n in enumerate(x.shape) if n in axes} for x in tables.values()),)
    module = _Module(tuple(tables), functions)
    program = torch.export.export(module, tuple(tables.values()), dynamic_shapes=dynamic, strict=False)
    return program.run_decompositions({}) if decomposed else program


def outputs(program: ExportedProgram) -> list[torch.fx.Node]:
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    kinds = [spec.kind.name for spec in program.graph_signature.output_specs]
    return [n for n, kind in zip(output.args[0], kinds, strict=True) if kind == "USER_OUTPUT"]


def lifted(program: ExportedProgram, node: torch.fx.Node, tables: Tables, shape: tuple[int, ...]) -> Tensor:
    """Every element of `node`, by evaluating its term."""
    lifter = Lifter(program)
    symbolic = lifter.lift(node)
    index = tuple(t.var(f"i{d}") for d in range(symbolic.rank))
    assert_well_sorted(symbolic.at(index))
    env: dict[str, Tensor | int] = {
        f"i{d}": torch.arange(n).view([-1 if axis == d else 1 for axis in range(len(shape))]) for d, n in enumerate(shape)
    }
    read = dict(lifter.data)
    names = [n.name for n in program.graph.nodes if n.op == "placeholder" and n.name not in lifter.targets]
    for name, table in zip(names, tables.values(), strict=True):
        read[name] = table
    return evaluate(symbolic.at(index), env | sizes(program, read), read).expand(shape)


SORTS = {  # what the children of a term must be
    **dict.fromkeys(("sum", "mul", "floor_div", "mod", "le0", "eq0", "prefix_sum", "to_float", "read"), "int"),
    **dict.fromkeys(("and", "or", "not"), "bool"),
    **dict.fromkeys(("float_cast", "float_op", "float_fn", "float_compare", "to_int"), "float"),
}


def assert_well_sorted(term: Term) -> None:
    """Integers are added, bools are joined, floats are compared as floats: evaluation alone would not tell."""
    for x in walk([term]):
        sorts = [child.sort for child in children(x)]
        if x.op == "ite":
            assert sorts[0] == "bool" and sorts[1] == sorts[2] == x.sort, x
        elif x.op in SORTS:
            assert set(sorts) <= {SORTS[x.op]}, x


def sizes(program: ExportedProgram, tables: Mapping[str, Tensor]) -> dict[str, Tensor | int]:
    """The value of each size symbol, from the tables given."""
    found: dict[str, Tensor | int] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in tables:
            for size, value in zip(node.meta["val"].shape, tables[node.name].shape, strict=True):
                if isinstance(size, torch.SymInt):
                    found[str(size)] = value
    return found


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal at every index: bools and integers exactly, floats exactly or both NaN."""
    assert actual.dtype.is_floating_point == expected.dtype.is_floating_point
    if expected.dtype.is_floating_point:
        wide = expected.double()
        same = (actual == wide) | (actual.isnan() & wide.isnan())
    else:
        assert (actual.dtype == torch.bool) == (expected.dtype == torch.bool)
        same = actual == expected
    assert bool(same.all()), f"differs at {torch.nonzero(~same)[:5].tolist()}: term {actual}, torch {expected}"
