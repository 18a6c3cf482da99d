"""What ranks that share a model must agree on: the programs that they run together, what they are given, and tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Graph

from trilithon.capture.collectives import MEETINGS, all_reduce, any_of_ranks, group_of, of_first_rank
from trilithon.errors import CaptureError, InputError, VerificationFailed
from trilithon.options import Options

if TYPE_CHECKING:
    from trilithon.runtime.request import Request

DEFAULT = Options()


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


def device_of_graph(graph: Graph) -> torch.device:
    """Where its first tensor is; of a graph without numbers, where ranks can meet."""
    found: torch.device = next(n.meta["val"].device for n in graph.nodes if isinstance(n.meta.get("val"), Tensor))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if found.type == "meta" else found


def require_same_program(graph: Graph, route: str, sites: Iterable[Any]) -> None:
    """Ranks whose programs differ would wait for each other for ever: a solver may have run out of time on one of them.

    Heads may differ, and with them the program; what was proved, and where ranks meet, may not.

    Raises:
        CaptureError: they differ.
    """
    group = group_of(graph)
    if group is None:
        return
    found = [(site.name, site.verdict.name, str(site.mask), site.bias is None) for site in sites]
    meetings = [(str(n.target), n.args[1:]) for n in graph.nodes if str(n.target) in MEETINGS]
    if not is_same(repr((route, found, meetings)).encode(), group, device_of_graph(graph)):
        raise CaptureError(
            "ranks came to different programs",
            why="a mask was proved on one of them and not on another",
            todo="use machines of one kind with the same packages, or give the solver more time: Options(solver_seconds=...)",
        )


def require_same_choices(graph: Graph, backend: str, options: Options, cache_tokens: int | None) -> None:
    """Ranks verify together what they compile, and a cache that one has not, or that is full on one alone, stops them all.

    Args:
        cache_tokens: None = no cache can be inserted.

    Raises:
        CaptureError: they differ in more than where engines are kept, or how long a solver may take.
    """
    group = group_of(graph)
    if group is None:
        return
    own = replace(
        options, engine_cache=None, solver_seconds=DEFAULT.solver_seconds, proof_cache=DEFAULT.proof_cache, gpu=DEFAULT.gpu
    )
    if not is_same(repr((backend, own, cache_tokens)).encode(), group, device_of_graph(graph)):
        raise CaptureError(
            "ranks compile different programs",
            why=f"they differ in backend, options or capacity; here: {backend}, {own}, {cache_tokens} tokens",
            todo="call compile with the same arguments on every rank",
        )


def verified_by_all(graph: Graph, verify: Callable[[], object]) -> None:
    """Where it fails on one rank it fails on all, none of which then waits for that one.

    Raises:
        VerificationFailed: from `verify`, or since another rank's has raised it.
    """
    group, failed = group_of(graph), None
    try:
        verify()
    except VerificationFailed as error:
        failed = error
    found = group is not None and any(any_of_ranks([failed is not None], group, device_of_graph(graph)))
    if failed is not None:
        raise failed
    if found:
        raise VerificationFailed("what another rank compiled disagrees with eager", todo="nothing was compiled. See its error")


def require_same_request(request: Request, group: str | None) -> None:
    """Every rank takes part in every call, with the same prompts, and makes as many tokens.

    Raises:
        InputError: they differ.
    """
    if group is None:
        return
    r = request
    settings = r.new_tokens, r.min_new_tokens, r.pad_token_id, r.sampling, r.lookup, r.held, r.output_scores, r.output_logits
    stops = None if r.stops.strings is None else r.stops.strings.strings, len(r.stops.criteria), len(r.processors)
    given = [r.input_ids, r.pad, *([] if r.eos is None else [r.eos]), *r.given]
    if not is_same(repr((settings, stops)).encode() + b"".join(map(_data, given)), group, r.input_ids.device):
        raise InputError(
            "ranks were given different prompts, or different arguments",
            why="they share one model, and compute each token together",
            todo="call it with the same arguments on every rank",
        )


def require_same_inputs(tensors: Sequence[Tensor], group: str | None) -> None:
    """Of a call without a cache.

    Raises:
        InputError: they differ.
    """
    if group is not None and not is_same(b"".join(map(_data, tensors)), group, tensors[0].device):
        raise InputError(
            "ranks were given different inputs",
            why="they share one model, and compute each result together",
            todo="call it with the same inputs on every rank",
        )


def _data(x: Tensor) -> bytes:
    data: bytes = x.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
    return f"{x.dtype} {list(x.shape)} ".encode() + data
