"""The report as plain text, and as a table with pictures for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console
from rich.console import Group as Stack
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trilithon.prove.verdict import Verdict
from trilithon.report.groups import Group, condition, distinct_masks, groups
from trilithon.report.picture import picture
from trilithon.report.report import Report
from trilithon.spec.assumption import Assumption
from trilithon.spec.masks import Mask

COLOURS = {Verdict.PROVED: "green", Verdict.REFUTED: "red", Verdict.UNKNOWN: "yellow", Verdict.VACUOUS: "magenta"}
NOTHING = "no attention was found"
LONGEST_FORMULA = 160  # characters of a formula in text; the page and the JSON have all of it


def report_text(report: Report) -> str:
    """The report without colours and pictures, as `str(report)` prints it."""
    found = groups(report)
    columns = [(g.site.verdict.name, g.label, form(g)) for g in found]
    widths = [max((len(row[i]) for row in columns), default=0) for i in range(3)]
    lines = [heading(report), *([] if found else [f"  {NOTHING}"])]
    for group, row in zip(found, columns, strict=True):
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(
            "; ".join(part for part in (f"  {cells}  {assuming(group)}", heads(group), f"runs on {group.site.runs_on}") if part)
        )
        lines += [f"    {line}" for line in explanation(group)]
    return "\n".join([*lines, *(f"{name}: {text}" for name, text in facts(report))])


def render(report: Report, console: Console, drawn: set[Mask] | None = None) -> None:
    """Print the report with a table of its sites and a picture of each distinct mask.

    Args:
        drawn: masks drawn before, which are not drawn again; those drawn here are added. Versions are then left out.
    """
    console.print(Text(heading(report), style="bold"))
    console.print(_table(report) if report.sites else NOTHING)
    for group in groups(report):
        for line in explanation(group):
            console.print(Padding(Text(line, style=COLOURS[group.site.verdict]), (0, 0, 0, 2)))
    known = set() if drawn is None else drawn
    new = [(mask, role) for mask, role in distinct_masks(report) if mask not in known]
    known.update(mask for mask, _ in new)
    if new:
        pictures = [Stack(Text(str(mask), style="bold"), Text(role, style="dim"), Text(picture(mask))) for mask, role in new]
        console.print(Padding(Columns(pictures, padding=(0, 4)), (1, 0)))
    for name, text in facts(report):
        if drawn is None or name != "versions":
            console.print(Text.assemble((f"{name}: ", "bold"), text))


def _table(report: Report) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column("verdict", no_wrap=True)
    table.add_column("attention", no_wrap=True)
    table.add_column("mask", overflow="fold")
    for g in groups(report):
        below = (f"{g.count} sites" if g.count > 1 else "", heads(g))
        sites = Text.assemble(g.name, *((f"\n{line}", "dim") for line in below if line))
        mask = Text.assemble((form(g), "bold"), "\n", assuming(g), "\n", (f"runs on {g.site.runs_on}", "dim"))
        table.add_row(Text(g.site.verdict.name, style=COLOURS[g.site.verdict]), sites, mask)
    return table


def heading(report: Report) -> str:
    """What was looked at, and how it was captured."""
    return f"{report.model}({', '.join(report.inputs)}), {report.route}"


def form(group: Group) -> str:
    """The proved mask, or that there is none."""
    return "none proved" if group.site.mask is None else str(group.site.mask)


def assuming(group: Group) -> str:
    """The assumptions of a proof in a few words; those of a failed one are with its reason."""
    if group.site.verdict is not Verdict.PROVED:
        return "kept as exported"
    return "; ".join(map(str, group.site.assumptions)) or "no assumptions"


def heads(group: Group) -> str:
    """The numbers of heads as far as they are known: "32 heads, 8 of keys and values"."""
    match group.site.heads:
        case None:
            return ""
        case (q, None):
            return _count(q, "query head")
        case (q, kv):
            return _count(q, "head") if q == kv else f"{_count(q, 'head')}, {kv} of keys and values"


def _count(number: int, name: str) -> str:
    return f"1 {name}" if number == 1 else f"{number} {name}s"


def explanation(group: Group) -> list[str]:
    """For sites that were not proved: the reason, the user's line and the lifted mask."""
    site = group.site
    if site.verdict is Verdict.PROVED:
        return []
    lines = [f"{group.name}: {site.reason}"]
    witness = " ".join(f"{name}={value}" for name, value in site.witness.items())
    if witness and witness not in site.reason:
        lines.append(f"witness: {witness}")
    if group.line:
        lines.append(f"at {group.line}")
    if site.formula:
        cut = len(site.formula) > LONGEST_FORMULA
        lines.append(f"allowed where: {site.formula[:LONGEST_FORMULA]}{' ...' if cut else ''}")
    return lines


def facts(report: Report) -> Iterator[tuple[str, str]]:
    """What stands below the sites, a name and a text each."""
    symbols = dict.fromkeys((*report.ranges, *report.sizes))
    if symbols:
        yield "sizes", ", ".join(_size(name, report) for name in symbols)
    if report.guards:
        yield "checked at run time", "; ".join(guard.text for guard in report.guards)
    declared = _declared(report)
    if declared:
        yield "declared by the caller", "; ".join(a.text for a in declared)
    for text in dict.fromkeys(f"{p.mask} {condition(p)}" for g in groups(report) for p in g.site.alternatives):
        yield "proved too", text
    changed = {name: count for name, count in report.passes.items() if count}
    if changed:
        yield "rewritten", ", ".join(f"{name} {count}" for name, count in changed.items())
    for failure in report.failures:
        yield "route that failed", failure
    for note in report.notes:
        yield "note", note
    if report.seconds:
        yield "seconds", ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in report.seconds.items())
    if report.versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())


def _size(name: str, report: Report) -> str:
    """What is known of a size: "s70 = input_ids axis 1 (1 <= s70 <= 512)"."""
    range_ = _range(name, *report.ranges[name]) if name in report.ranges else ""
    meaning = meaning_of(name, report)
    return f"{meaning} ({range_})" if meaning and range_ else meaning or range_


def meaning_of(text: str, report: Report) -> str:
    """What the size symbols in a text are: "s70 = input_ids axis 1" for "s70 <= 512"."""
    return ", ".join(f"{name} = {axis}" for name, axis in report.sizes.items() if re.search(rf"\b{name}\b", text))


def _range(name: str, low: int, high: int | None) -> str:
    return f"{name} >= {low}" if high is None else f"{low} <= {name} <= {high}"


def _declared(report: Report) -> tuple[Assumption, ...]:
    return tuple(dict.fromkeys(a for s in report.sites for a in s.assumptions if a.source == "declared"))
