"""Fold sites with the same result into one entry, so that sixteen equal layers are one block."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from trilithon.prove.verdict import Proof, Verdict
from trilithon.report.names import common_name, skeleton
from trilithon.report.picture import MOST_PICTURES, Subject
from trilithon.report.report import Report, SiteReport
from trilithon.spec.masks import Formula, Mask, S, T, parts
from trilithon.spec.traverse import free_vars

PER_SITE = ("name", "where", "solver_seconds", "cached")
PER_CALL = (*PER_SITE, "kind", "runs_on", "heads", "validated_cells")


@dataclass(frozen=True)
class Group:
    """Sites with the same result.

    Attributes:
        sites: in graph order.
    """

    sites: tuple[SiteReport, ...]

    @property
    def site(self) -> SiteReport:
        """The first of them."""
        return self.sites[0]

    @property
    def name(self) -> str:
        """ "model.layers.0..15.self_attn", or the one site's name."""
        return common_name(site.name for site in self.sites)

    @property
    def count(self) -> str:
        """How many they are, where that is more than one."""
        return f"{len(self.sites)} sites" if len(self.sites) > 1 else ""

    @property
    def line(self) -> str:
        """The user's source line, without the graph node."""
        return line_of(self.site)

    @property
    def seconds(self) -> float:
        """Time in z3: equal masks are proved once, so the longest is the time of that proof."""
        return max(site.solver_seconds for site in self.sites)


def groups(report: Report) -> list[Group]:
    """The sites of equal layers that differ in nothing but their number, by first appearance."""
    return _fold(report, PER_SITE, lambda site: f"{skeleton(site.name)} {line_of(site)}")


def masks(report: Report) -> list[Group]:
    """The sites whose masks mean the same for the same reasons, wherever they are and whatever they run on."""
    return _fold(report, PER_CALL, lambda _: "")


def pictured(group: Group) -> Iterator[tuple[Mask, str, Subject]]:
    """What to draw of a group: the proved mask and its other forms, or the lifted one; each with its name.

    The witness is marked, except in a proved formula whose heads differ: there each kind of head is drawn.
    """
    site, lifted = group.site, group.site.lifted
    count = MOST_PICTURES if site.heads is None else site.heads[0]
    sizes, tables = ((S, T), {}) if lifted is None else (lifted.sizes, lifted.constants)
    for mask in dict.fromkeys((site.mask, *(proof.mask for proof in site.alternatives))):
        if mask is not None:
            subject = Subject(mask.term(), sizes, count, tables)
            marked = mask is site.mask and "h" not in free_vars(subject.keep)
            yield mask, title(mask), _marked(subject, site) if marked else subject
    if site.mask is None and lifted is not None:
        yield Formula(lifted.keep), "the mask as lifted", _marked(Subject(lifted.keep, sizes, count, tables), site)


def _marked(subject: Subject, site: SiteReport) -> Subject:
    return subject if site.nearest is None else replace(subject, claim=site.nearest.term(), witness=site.witness)


def title(mask: Mask) -> str:
    """The name of a mask; a formula is one word, because it stands elsewhere."""
    return " & ".join("formula" if isinstance(part, Formula) else str(part) for part in parts(mask)) or str(mask)


def form(site: SiteReport) -> str:
    """The proved mask, or that there is none."""
    return "none proved" if site.mask is None else title(site.mask)


def scores(site: SiteReport) -> str:
    """What happens to the scores besides the mask: "softcap 50, sinks"."""
    bias = "" if site.bias is None else f"bias {site.bias}"
    softcap = "" if site.softcap is None else f"softcap {site.softcap:g}"
    return ", ".join(part for part in (bias, softcap, "sinks" if site.sinks else "") if part)


def heads(site: SiteReport) -> str:
    """The numbers of heads as far as they are known: "32 heads, 8 of keys and values"."""
    match site.heads:
        case None:
            return ""
        case (q, None):
            return _count(q, "query head")
        case (q, kv):
            return _count(q, "head") if q == kv else f"{_count(q, 'head')}, {kv} of keys and values"


def proof_cost(group: Group) -> tuple[str, ...]:
    """Time in z3, where the proof comes from, and what it was checked on; none where nothing was lifted."""
    site = group.site
    if not site.formula:
        return ()
    checked = "" if site.validated_cells is None else f"checked on {site.validated_cells:,} cells"
    said = (milliseconds(group.seconds), "from the proof cache" if site.cached else "", checked)
    return tuple(part for part in said if part)


def milliseconds(seconds: float) -> str:
    """A time in z3: "7.3 ms", "120 ms"."""
    return "< 0.1 ms" if seconds < 0.0001 else f"{seconds * 1000:.{1 if seconds < 0.01 else 0}f} ms"


def why(site: SiteReport) -> str:
    """Why it is not proved, or not the nearest named mask; nothing where there is no more to say than that it is proved."""
    return site.reason if site.verdict is not Verdict.PROVED or site.nearest is not None else ""


def witness(site: SiteReport) -> str:
    """The witness, where the reason does not name it."""
    text = " ".join(f"{name}={value}" for name, value in site.witness.items())
    return "" if text in site.reason else text


def condition(proof: Proof) -> str:
    """What another proved form of a mask rests on: "if each row of position_ids is consecutive"."""
    checked = [a.text for a in proof.assumptions if a.source in ("guard", "declared")]
    return f"if {' and '.join(checked)}" if checked else "always"


def others(site: SiteReport) -> list[str]:
    """Other proved forms: "full if attention_mask is all ones"."""
    return list(dict.fromkeys(f"{title(proof.mask)} {condition(proof)}" for proof in site.alternatives))


def line_of(site: SiteReport) -> str:
    """The user's source line of a site, without the graph node."""
    return re.sub(r"\s*\(node [^)]*\)$", "", site.where)


def _count(number: int, name: str) -> str:
    return f"1 {name}" if number == 1 else f"{number} {name}s"


def _fold(report: Report, ignored: tuple[str, ...], extra: Callable[[SiteReport], str]) -> list[Group]:
    alike: dict[str, list[SiteReport]] = {}
    for site in report.sites:
        result = {name: value for name, value in site.to_dict().items() if name not in ignored}
        alike.setdefault(json.dumps([result, extra(site)], sort_keys=True), []).append(site)
    return [Group(tuple(sites)) for sites in alike.values()]
