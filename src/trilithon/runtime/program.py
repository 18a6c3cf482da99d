"""A compiled program with its guards: the fast module when they hold, the general one when they do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trilithon.errors import GuardFailed, InputError
from trilithon.spec.assumption import Assumption

Module = Callable[..., Any]


@dataclass
class Program:
    """One captured call of the model.

    Attributes:
        inputs: names of the tensors it takes, in order.
        dtypes, ranks: what each input must be.
        fast: the rewritten and lowered module; right when every guard holds.
        general: the captured program as it was, dense masks and all; always right.
        guards: what to check.
        when_guard_fails: "general" or "raise".
        guard_failures: how often a guard failed so far.
    """

    inputs: tuple[str, ...]
    dtypes: Mapping[str, torch.dtype]
    ranks: Mapping[str, int]
    fast: Module
    general: Module
    guards: tuple[Assumption, ...]
    when_guard_fails: Literal["general", "raise"]
    guard_failures: int = 0

    @torch.no_grad()
    def __call__(self, **tensors: Tensor) -> Any:
        """Run on these inputs.

        Raises:
            InputError: an input is missing, unknown, or of another dtype or rank than was captured.
            GuardFailed: a guard does not hold and the program was compiled to raise.
        """
        self._check(tensors)
        arguments = [tensors[name] for name in self.inputs]
        failed = self._failed_guard(tensors)
        if failed is None:
            return self.fast(*arguments)
        self.guard_failures += 1
        if self.when_guard_fails == "raise":
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
        for name in self.inputs:
            if name not in tensors:
                raise InputError(f"input {name} is missing", todo=f"this program takes {', '.join(self.inputs)}")
        for name, value in tensors.items():
            if name not in self.dtypes:
                raise InputError(f"unknown input {name}", todo=f"this program takes {', '.join(self.inputs)}")
            if value.dtype != self.dtypes[name]:
                raise InputError(
                    f"{name} must be {self.dtypes[name]}, got {value.dtype}",
                    why="the program was captured with that dtype",
                    todo=f"pass {name}.to({self.dtypes[name]})",
                )
            if value.dim() != self.ranks[name]:
                raise InputError(
                    f"{name} must have {self.ranks[name]} axes, got shape {list(value.shape)}",
                    todo=f"add a batch axis: {name}[None]" if value.dim() == self.ranks[name] - 1 else "",
                )
