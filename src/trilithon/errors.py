"""Every error Trilithon raises on purpose: what happened, where, why, and what to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Where:
    """A place in the user's program: graph node, module path and source line (any may be empty)."""

    node: str = ""
    module: str = ""
    line: str = ""

    def __str__(self) -> str:
        node = f"(node {self.node})" if self.node else ""
        return "  ".join(part for part in (self.line or self.module, node) if part)


class TrilithonError(Exception):
    """Base of all our errors. The text has four lines: what, where, why, what to do.

    Args:
        what: one clause, what could not be done.
        where: the user's own place, if there is one.
        why: the reason.
        todo: what the user can do about it.
    """

    def __init__(self, what: str, *, why: str = "", todo: str = "", where: Where | None = None) -> None:
        self.what, self.why, self.todo, self.where = what, why, todo, where
        lines = [what]
        if where is not None and str(where):
            lines.append(f"  at {where}")
        if why:
            lines.append(f"  because {why}")
        if todo:
            lines.append(f"  {todo}")
        super().__init__("\n".join(lines))


class CaptureError(TrilithonError):
    """The model could not be captured by torch.export."""


class CannotLift(TrilithonError):
    """A mask uses something the lifter does not model. Caught once, and reported; the mask stays."""


class CannotLower(TrilithonError):
    """A named backend cannot serve a program or a site, or its package is missing."""


class CannotCache(TrilithonError):
    """No KV cache can be inserted soundly."""


class PassBroke(TrilithonError):
    """A pass left the graph invalid: a bug of ours, named by the pass."""


class GuardFailed(TrilithonError):
    """An assumption of the fast program does not hold for these inputs, and the caller chose to raise."""


class CapacityExceeded(TrilithonError):
    """A prompt or a generation does not fit the compiled number of tokens or rows."""


class VerificationFailed(TrilithonError):
    """A compiled program disagreed with eager on the canary input; no artefact was made."""


class ShapeError(TrilithonError, ValueError):
    """A tensor has the wrong axes."""


class InputError(TrilithonError, ValueError):
    """An argument given by the user has the wrong type, dtype, rank or value."""
