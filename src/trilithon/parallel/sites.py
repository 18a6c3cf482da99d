"""What is found of attention on the heads of one rank, and may not count for those of all."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Graph

from trilithon.capture.collectives import group_of
from trilithon.errors import CaptureError
from trilithon.passes import where_of
from trilithon.prove.program import Examined
from trilithon.report.report import SiteReport
from trilithon.runtime.agree import require_same_program
from trilithon.spec.traverse import free_vars


def agreed_sites(graph: Graph, route: str, examined: Sequence[Examined], sites: list[SiteReport]) -> list[SiteReport]:
    """`sites`, which are the same on all ranks that run the graph together.

    Raises:
        CaptureError: a mask or bias differs from head to head, or ranks found different things.
    """
    if group_of(graph) is not None:
        for each in examined:
            _require_same_heads(each)
    require_same_program(graph, route, sites)
    return sites


def _require_same_heads(examined: Examined) -> None:
    """A rank's heads are counted from 0, so what a head's number says is wrong on all ranks but the first."""
    found = examined.meaning
    if found is None:
        return
    terms = [found.keep] if found.bias is None else [found.keep, found.bias.formula]
    if not found.sinks and not any("h" in free_vars(x) for x in terms):
        return
    raise CaptureError(
        f"cannot share the heads of {examined.site.name} among ranks",
        why="its mask, bias or sinks differ from head to head, and a rank counts its heads from 0",
        todo="run it on one rank",
        where=where_of(examined.site.output),
    )
