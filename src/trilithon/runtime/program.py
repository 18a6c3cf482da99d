"""A compiled program with its guards: the fast module when they hold, the general one when they do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from trilithon.capture.collectives import group_of
from trilithon.errors import GuardFailed, InputError
from trilithon.runtime.agree import require_same_inputs
from trilithon.runtime.canary import Canary
from trilithon.spec.assumption import Assumption

if TYPE_CHECKING:  # it brings all that lowers, TensorRT's converters too
    from trilithon.lower.backend import Blueprint

Module = Callable[..., Any]


@dataclass(frozen=True)
class ExpectedAxis:
    """One axis of an input: a size symbol (or "" where the size is fixed or derived) and what sizes it may have."""

    symbol: str
    low: int
    high: int | None


@dataclass(frozen=True)
class Expected:
    """What one input must be: as it was captured, since the proofs hold for that."""

    dtype: torch.dtype
    axes: tuple[ExpectedAxis, ...]

    def check(self, name: str, value: Tensor, sizes: dict[str, int]) -> None:
        """Raises InputError unless `value` fits; `sizes` collects the size of each symbol over all inputs."""
        if value.dtype != self.dtype:
            raise InputError(
                f"{name} must be {self.dtype}, got {value.dtype}",
                why="the program was captured with that dtype",
                todo=f"pass {name}.to({self.dtype})",
            )
        if value.dim() != len(self.axes):
            raise InputError(
                f"{name} must have {len(self.axes)} axes, got shape {list(value.shape)}",
                why="the program was captured with that rank",
                todo=f"add a batch axis: {name}[None]" if value.dim() == len(self.axes) - 1 else "",
            )
        for i, (axis, size) in enumerate(zip(self.axes, value.shape, strict=True)):
            if size < axis.low or (axis.high is not None and size > axis.high):
                most = "any number" if axis.high is None else axis.high
                raise InputError(
                    f"axis {i} of {name} must have {axis.low} to {most} entries, got {size}",
                    why="the program was captured, and its masks proved, for that range",
                    todo="compile with dynamic_shapes that allow this size",
                )
            if axis.symbol and sizes.setdefault(axis.symbol, size) != size:
                raise InputError(
                    f"axis {i} of {name} must have {sizes[axis.symbol]} entries as the other inputs do, got {size}",
                    todo=f"make the inputs agree: {name} has shape {list(value.shape)}",
                )


def expected_inputs(held: Mapping[str, Tensor], ranges: Mapping[str, tuple[int, int | None]]) -> dict[str, Expected]:
    """What a captured program takes, from the fake tensors of its inputs and the ranges of its size symbols."""

    def axis(size: Any) -> ExpectedAxis:
        if isinstance(size, int):
            return ExpectedAxis("", size, size)
        low, high = ranges.get(str(size), (0, None))
        return ExpectedAxis(str(size) if str(size) in ranges else "", low, high)

    return {name: Expected(value.dtype, tuple(axis(size) for size in value.shape)) for name, value in held.items()}


class Deferred:
    """A module that is lowered when it is first called."""

    def __init__(self, lower: Callable[[], Module]) -> None:
        self._lower = lower
        self.module: Module | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self.module is None:
            self.module = self._lower()
        return self.module(*arguments)


def lowered(module: Module) -> Module | None:
    """The module itself, or of a deferred one what was made of it, if anything yet."""
    return module.module if isinstance(module, Deferred) else module


@dataclass
class Program:
    """One captured call of the model.

    Attributes:
        expected: name -> what that input must be, in order.
        fast: the rewritten and lowered module; right when every guard holds.
        general: the captured program as it was, dense masks and all; always right. None where it was not kept.
        guards: what to check.
        when_guard_fails: "general" or "raise".
        guard_failures: how often a guard failed so far.
        blueprint: what `fast` was lowered from, for a file.
        canaries: what it was verified with, the last counts; one that is deferred is verified later.
        group: ranks that run it together, and with the same inputs; None = this process does alone.
    """

    expected: Mapping[str, Expected]
    fast: Module
    general: Module | None
    guards: tuple[Assumption, ...]
    when_guard_fails: Literal["general", "raise"]
    guard_failures: int = 0
    blueprint: Blueprint | None = None
    canaries: list[Canary] = field(default_factory=list)
    group: str | None = field(init=False)

    def __post_init__(self) -> None:
        self.group = group_of(self.general.graph) if isinstance(self.general, GraphModule) else None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensors it takes, in order."""
        return tuple(self.expected)

    @property
    def canary(self) -> Canary | None:
        """What it is held to where it is loaded; None = it was not verified."""
        return self.canaries[-1] if self.canaries else None

    @torch.no_grad()
    def __call__(self, **tensors: Tensor) -> Any:
        """Run on these inputs.

        Raises:
            InputError: an input is missing, unknown, or of another dtype or rank than was captured.
            GuardFailed: a guard does not hold and the program was compiled to raise.
        """
        self._check(tensors)
        arguments = [tensors[name] for name in self.inputs]
        require_same_inputs(arguments, self.group)
        failed = self._failed_guard(tensors)
        if failed is None:
            return self.fast(*arguments)
        self.guard_failures += 1
        if self.when_guard_fails == "raise" or self.general is None:
            raise GuardFailed(
                f"the fast program does not apply: {failed.text} does not hold",
                why=f"the mask was proved only under this assumption, and {failed.table} breaks it",
                todo="pass other inputs, or compile with Options(when_guard_fails='general')",
            )
        return self.general(*arguments)

    def _failed_guard(self, tensors: Mapping[str, Tensor]) -> Assumption | None:
        """The first guard that does not hold; one synchronisation for all when they do."""
        if not self.guards:
            return None
        checks = [g.holds(tensors[g.table]) for g in self.guards]
        if bool(torch.stack(checks).all()):
            return None
        return next(g for g, ok in zip(self.guards, checks, strict=True) if not bool(ok))

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        takes = f"this program takes {', '.join(self.inputs)}"
        for name in self.inputs:
            if name not in tensors:
                raise InputError(f"input {name} is missing", todo=takes)
        sizes: dict[str, int] = {}
        for name, value in tensors.items():
            if name not in self.expected:
                raise InputError(f"unknown input {name}", todo=takes)
            self.expected[name].check(name, value, sizes)
