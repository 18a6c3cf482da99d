"""What is found of attention on the heads of one rank, and may not count for those of all."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch.fx import Graph

from trilithon.capture.collectives import any_of_ranks, group_of
from trilithon.errors import CaptureError
from trilithon.passes import where_of
from trilithon.prove.program import Examined
from trilithon.report.report import SiteReport
from trilithon.runtime.agree import device_of_graph, require_same_program
from trilithon.spec.traverse import free_vars

DIFFERS = "its mask, bias or sinks differ from head to head, and a rank counts its heads from 0"
HIDDEN = "each rank holds one of its heads, so none can see whether their masks and biases are the same"


def agreed_sites(graph: Graph, route: str, examined: Sequence[Examined], sites: list[SiteReport]) -> list[SiteReport]:
    """`sites`, which are the same on all ranks that run the graph together.

    Raises:
        CaptureError: on all ranks: a mask or bias differs from head to head, or may do so, or ranks found different things.
    """
    group = group_of(graph)
    if group is None:
        return sites
    require_same_program(graph, route, sites)
    differ = [_differs_by_head(each) for each in examined]
    several = [_heads(each) > 1 for each in examined]
    found = any_of_ranks([*differ, *several], group, device_of_graph(graph))
    for i, (each, site) in enumerate(zip(examined, sites, strict=True)):
        if found[i] or not (found[len(sites) + i] or _is_of_all_heads(each, site)):
            raise CaptureError(
                f"cannot share the heads of {site.name} among ranks",
                why=DIFFERS if found[i] else HIDDEN,
                todo="run it on one rank" if found[i] else "start fewer ranks",
                where=where_of(each.site.output),
            )
    return sites


def _differs_by_head(examined: Examined) -> bool:
    """A head's number, and a mask that has one part a head, are wrong on all ranks but the first."""
    found, mask = examined.meaning, examined.site.mask
    if found is None:
        shape = [] if mask is None or examined.site.softmax is not None else list(mask.meta["val"].shape)
        return len(shape) == 4 and shape[1] != 1
    terms = [found.keep] if found.bias is None else [found.keep, found.bias.formula]
    return bool(found.sinks) or any("h" in free_vars(x) for x in terms)


def _heads(examined: Examined) -> int:
    """Query heads of this rank; 1 where that is not known."""
    shape = examined.site.q.meta["val"].shape
    held = shape[1] if len(shape) == 4 else examined.site.flat_heads
    return held if isinstance(held, int) else 1


def _is_of_all_heads(examined: Examined, site: SiteReport) -> bool:
    """Is what was found on one head known to hold for others? A slope, or the width of a window, is a number of that head."""
    found = examined.meaning
    return found is not None and found.bias is None and site.mask is not None and re.search(r"\d", str(site.mask)) is None
