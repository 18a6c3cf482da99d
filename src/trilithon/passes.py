"""Passes over FX graphs: what a pass is, how a list of them runs, and where a node stands in the user's code."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch.fx import GraphModule, Node

from trilithon.errors import PassBroke, TrilithonError, Where


@dataclass(frozen=True)
class Outcome:
    """What one run of a pass did.

    Attributes:
        changed: number of places rewritten.
        notes: one line each, for the report.
    """

    changed: int
    notes: tuple[str, ...] = ()


class Pass(Protocol):
    name: ClassVar[str]

    def __call__(self, gm: GraphModule) -> Outcome: ...


def run_passes(
    gm: GraphModule, passes: Iterable[Pass], after: Callable[[Pass, GraphModule, Outcome], None] | None = None
) -> dict[str, Outcome]:
    """Run the passes in order; lint the graph after each, then call `after`. The code of the module is made at the end.

    Raises:
        PassBroke: a pass raised an unexpected error or left an invalid graph.
    """
    outcomes: dict[str, Outcome] = {}
    for p in passes:
        try:
            outcomes[p.name] = p(gm)
        except TrilithonError:
            raise
        except Exception as error:
            raise PassBroke(
                f"pass {p.name} failed",
                why=f"{type(error).__name__}: {error}",
                todo="this is a bug of Trilithon: please report it",
            ) from error
        try:
            gm.graph.lint()
        except Exception as error:
            raise PassBroke(
                f"pass {p.name} left an invalid graph", why=str(error), todo="this is a bug of Trilithon: please report it"
            ) from error
        if after is not None:
            gm.recompile()
            after(p, gm, outcomes[p.name])
    gm.recompile()
    return outcomes


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in \S+\n\s*(?P<code>.+)')


def where_of(node: Node) -> Where:
    """The node's place: its module path and the user's source line that export recorded."""
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    line = ""
    if frames:
        last = frames[-1]
        line = f"{last['file'].rsplit('/', 1)[-1]}:{last['line']}, `{last['code'].strip()}`"
    return Where(node=node.name, module=module_path(node), line=line)


def module_path(node: Node) -> str:
    """Path of the innermost module that made the node, e.g. `model.layers.0.self_attn`."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return _plain(paths[-1]) if paths else ""


def _plain(path: str) -> str:
    return re.sub(r"^L\['self'\]\.?|^L__self__\.?", "", path)


def bound_arguments(node: Node) -> dict[str, Any]:
    """The node's arguments by the names of its ATen schema, defaults filled in."""
    bound: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if position < len(node.args):
            bound[argument.name] = node.args[position]
        else:
            bound[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return bound
