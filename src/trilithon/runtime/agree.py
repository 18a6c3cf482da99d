"""What ranks that share a model must agree on: the program that they run together, its prompts, and tokens that are drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from trilithon.capture.collectives import all_reduce, group_of, of_first_rank
from trilithon.errors import CaptureError, InputError


def group_of_ranks(decoder: object) -> str | None:
    """The group that a decoder's programs meet in; None where it is alone."""
    group: str | None = getattr(decoder, "group", None)
    return group


def agreed(x: Tensor, group: str | None) -> Tensor:
    """What the first rank chose."""
    return x if group is None else of_first_rank(x, group)


def is_same(data: bytes, group: str, device: torch.device) -> bool:
    """Do all ranks have the same? All come to the same answer."""
    number = int.from_bytes(hashlib.sha256(data).digest()[:6], "big")
    most = all_reduce(torch.tensor([number, -number], device=device), group, "max").tolist()
    return bool(most[0] == -most[1])


def require_same_program(graph: Graph, route: str, sites: Iterable[Any]) -> None:
    """Ranks whose programs differ would wait for each other for ever: a solver may have run out of time on one of them.

    Raises:
        CaptureError: they differ.
    """
    group = group_of(graph)
    if group is None:
        return
    device = next(n.meta["val"].device for n in graph.nodes if isinstance(n.meta.get("val"), Tensor))
    found = [(site.name, site.verdict.name, str(site.mask)) for site in sites]
    if not is_same(repr((route, found)).encode(), group, device):
        raise CaptureError(
            "ranks came to different programs",
            why="a mask was proved on one of them and not on another",
            todo="use machines of one kind with the same packages, or give the solver more time: Options(solver_seconds=...)",
        )


def require_same_prompts(ids: Tensor, pad: Tensor, group: str | None) -> None:
    """Every rank takes part in every call, with the same prompts.

    Raises:
        InputError: they differ.
    """
    if group is not None and not is_same(repr((ids.tolist(), pad.tolist())).encode(), group, ids.device):
        raise InputError(
            "ranks were given different prompts",
            why="they share one model, and compute each token together",
            todo="call it with the same arguments on every rank",
        )
