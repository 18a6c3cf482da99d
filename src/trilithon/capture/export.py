"""Capture a module with torch.export: routes tried in a fixed order, the first that works wins and is named."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils._sympy.value_ranges import ValueRanges

from trilithon.capture.functional import functional
from trilithon.errors import CaptureError, InputError


@dataclass(frozen=True)
class Captured:
    """A functional program, and how it was made.

    Attributes:
        program: decomposed with an empty table: functional, SDPA kept.
        route: the export route that worked.
        failures: one line for each route that was tried before.
    """

    program: ExportedProgram
    route: str
    failures: tuple[str, ...]


Example = Mapping[str, Any]


def _non_strict(model: nn.Module, example: Example, shapes: Any) -> ExportedProgram:
    return _functional(torch.export.export(model, (), dict(example), dynamic_shapes=shapes, strict=False), own=True)


def _deferred(model: nn.Module, example: Example, shapes: Any) -> ExportedProgram:
    program = torch.export.export(
        model, (), dict(example), dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
    )
    return _functional(program, own=True)


def _strict(model: nn.Module, example: Example, shapes: Any) -> ExportedProgram:
    return _functional(torch.export.export(model, (), dict(example), dynamic_shapes=shapes, strict=True), own=True)


ROUTES: tuple[tuple[str, Callable[[nn.Module, Example, Any], ExportedProgram]], ...] = (
    ("torch.export, non-strict, deferred asserts", _deferred),  # a size that export cannot decide becomes an assertion
    ("torch.export, non-strict", _non_strict),
    ("torch.export, strict", _strict),
)


def capture(model: nn.Module | ExportedProgram, example: Example | None = None, dynamic_shapes: Any = None) -> Captured:
    """Turn a module into a functional exported program.

    Args:
        model: a module in eval mode, or a program that was exported already.
        example: keyword arguments of one call, tensors of the size to trace with.
        dynamic_shapes: as torch.export takes them; None lets export find every dynamic axis itself.

    Raises:
        InputError: `model` is neither, or the example is missing.
        CaptureError: no route works; holds the first line of each failure.
    """
    if isinstance(model, ExportedProgram):
        return Captured(_functional(model, own=False), "given as an ExportedProgram", ())
    if not isinstance(model, nn.Module):
        raise InputError(
            f"cannot capture a {type(model).__name__}",
            why="it is neither a torch.nn.Module nor a torch.export.ExportedProgram",
            todo="pass the module itself, a preset name to trilithon.load_model, or the result of torch.export.export",
        )
    if not example:
        raise InputError(
            f"cannot capture {type(model).__name__} without an example",
            why="torch.export traces one call",
            todo="pass example_kwargs={'input_ids': torch.zeros(2, 16, dtype=torch.long)}",
        )
    if model.training:
        raise InputError(
            f"cannot capture {type(model).__name__} in training mode",
            why="dropout would be part of the program",
            todo="call model.eval() first",
        )
    return _first_route(model, example, dynamic_shapes or automatic_shapes(example))


def _first_route(model: nn.Module, example: Example, shapes: Any) -> Captured:
    failures: list[str] = []
    for name, export in ROUTES:
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = export(model, example, shapes)
            return Captured(program, name, tuple(failures))
        except Exception as error:  # torch.export raises many types; each is kept and reported
            failures.append(f"{name}: {type(error).__name__}: {_first_line(error)}")
    raise CaptureError(
        f"cannot capture {type(model).__name__}",
        why="every export route failed:\n    " + "\n    ".join(failures),
        todo="make the module exportable (no data-dependent Python branches), or pass dynamic_shapes that it supports",
    )


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else ""


def _functional(program: ExportedProgram, *, own: bool) -> ExportedProgram:
    """See `functional`; assertions of metadata are gone: they restate those of the example."""
    made = functional(program, own=own)
    for node in made.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        made.graph.erase_node(node)
    made.graph_module.recompile()
    _leave_out_longest(made)
    return made


def _leave_out_longest(program: ExportedProgram) -> None:
    """Take the greatest size of an input's axis out of its range, where an assertion of the program fails.

    Export decides a branch for the sizes of the example, and asserts that no other size takes the other branch: of a slice
    from `max(0, size - s)` on, that it is not the whole table. Only sizes that each call is checked for may be left out.
    """
    held = [node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")]
    axes = {str(size) for x in held if isinstance(x, torch.Tensor) for size in x.shape if isinstance(size, torch.SymInt)}
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default):
        checked = node.args[0]
        condition: Any = checked.meta.get("val") if isinstance(checked, torch.fx.Node) else checked
        symbols = condition.node.expr.free_symbols if isinstance(condition, torch.SymBool) else ()
        symbol = next(iter(symbols)) if len(symbols) == 1 else None
        allowed = program.range_constraints.get(symbol) if str(symbol) in axes else None
        if allowed is None or not allowed.upper.is_Integer or allowed.upper <= allowed.lower:
            continue
        holds = [bool(condition.node.expr.subs({symbol: size})) for size in (allowed.upper - 1, allowed.upper)]
        if holds == [True, False]:
            program.range_constraints[symbol] = ValueRanges(allowed.lower, allowed.upper - 1)


def automatic_shapes(example: Example) -> dict[str, Any]:
    """Every axis of every tensor may be dynamic; export decides which are."""
    auto = Dim.AUTO
    return {
        name: dict.fromkeys(range(value.dim()), auto) if isinstance(value, torch.Tensor) else None
        for name, value in example.items()
    }
