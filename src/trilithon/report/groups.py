"""Fold neighbouring sites with the same result into one entry, so that sixteen equal layers are one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from trilithon.prove.verdict import Proof
from trilithon.report.report import Report, SiteReport
from trilithon.spec.masks import Mask


@dataclass(frozen=True)
class Group:
    """Consecutive sites that differ in their names only.

    Attributes:
        name: "model.layers.0..15.self_attn", or the one site's name.
        site: the first of them.
        count: how many they are.
    """

    name: str
    site: SiteReport
    count: int

    @property
    def line(self) -> str:
        """The user's source line, without the graph node."""
        return _line(self.site)

    @property
    def label(self) -> str:
        """The name with the number of sites, when more than one."""
        return self.name if self.count == 1 else f"{self.name} ({self.count} sites)"


def groups(report: Report) -> list[Group]:
    """The sites of a report in graph order, equal neighbours folded."""
    folded = [list(sites) for _, sites in groupby(report.sites, key=_result)]
    return [Group(_common_name([s.name for s in sites]), sites[0], len(sites)) for sites in folded]


def distinct_masks(report: Report) -> Iterator[tuple[Mask, str]]:
    """Each mask that was proved, once, with the sites or the assumptions under which it is their meaning."""
    seen: set[Mask] = set()
    found = groups(report)
    for group in found:
        if group.site.mask is not None and group.site.mask not in seen:
            seen.add(group.site.mask)
            same = sum(g.count for g in found if g.site.mask == group.site.mask)
            yield group.site.mask, f"{same} {'site' if same == 1 else 'sites'}"
    for proof in (p for g in found for p in g.site.alternatives):
        if proof.mask not in seen:
            seen.add(proof.mask)
            yield proof.mask, condition(proof)


def condition(proof: Proof) -> str:
    """What another proved form of a mask rests on: "if each row of position_ids is consecutive"."""
    checked = [a.text for a in proof.assumptions if a.source in ("guard", "declared")]
    return f"if {' and '.join(checked)}" if checked else "always"


def _result(site: SiteReport) -> SiteReport:
    """The site without what differs between equal layers."""
    alternatives = tuple(replace(p, solver_seconds=0.0) for p in site.alternatives)
    return replace(site, name=_skeleton(site.name), where=_line(site), solver_seconds=0.0, alternatives=alternatives)


def _skeleton(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _line(site: SiteReport) -> str:
    return re.sub(r"\s*\(node [^)]*\)$", "", site.where)


def _common_name(names: list[str]) -> str:
    """`a.0.b`, `a.1.b`, `a.2.b` become `a.0..2.b`; other names are listed."""
    if len(names) == 1:
        return names[0]
    first, last = (re.split(r"(\d+)", name) for name in (names[0], names[-1]))
    differ = [i for i, (a, b) in enumerate(zip(first, last, strict=True)) if a != b]
    if len(differ) != 1:
        return f"{names[0]} .. {names[-1]}"
    place = differ[0]
    return "".join([*first[:place], f"{first[place]}..{last[place]}", *first[place + 1 :]])
