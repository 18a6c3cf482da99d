"""The report as text: a block for each group of equal sites; in a terminal with colours and pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.columns import Columns
from rich.console import Console
from rich.console import Group as Stack
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trilithon.prove.verdict import Verdict
from trilithon.report.groups import Group, form, groups, heads, others, pictured, proof_cost, scores, why, witness
from trilithon.report.picture import draw, picture
from trilithon.report.report import Report
from trilithon.spec.masks import Formula, Mask, parts

COLOURS = {Verdict.PROVED: "green", Verdict.REFUTED: "red", Verdict.UNKNOWN: "yellow", Verdict.VACUOUS: "magenta"}
DIM = ("at", "formula")
INDENT = 9  # columns before the labels of a block
NOTHING = "no attention was found"
LONGEST_FORMULA = 300  # characters of a formula in text; the page and the JSON have all of it


def report_text(report: Report) -> str:
    """The report without colours and pictures, as `str(report)` prints it."""
    lines = [heading(report), *(f"WARNING: {warning}" for warning in report.warnings), *([] if report.sites else [NOTHING])]
    for group in groups(report):
        lines.append(f"{group.site.verdict.name:<{INDENT}}{group.name}{_number(group)}")
        lines += [f"{'':{INDENT}}{label:<9} {text}" for label, text in block(group)]
    return "\n".join([*lines, *(f"{name}: {text}" for name, text in facts(report))])


def render(report: Report, console: Console, drawn: set[Mask] | None = None) -> None:
    """Print the report with a picture of each distinct mask.

    Args:
        drawn: masks drawn before, which are not drawn again; those drawn here are added. Versions are then left out.
    """
    console.print(Text(heading(report), style="bold"))
    for warning in report.warnings:
        console.print(Text(f"WARNING: {warning}", style="bold yellow"))
    if not report.sites:
        console.print(NOTHING)
    known = set() if drawn is None else drawn
    for group in groups(report):
        console.print()
        console.print(_name(group))
        console.print(Padding(_rows(group), (0, 0, 0, INDENT)))
        _draw(group, console, known)
    console.print()
    for fact, text in facts(report):
        if drawn is None or fact != "versions":
            console.print(Text.assemble((f"{fact}: ", "bold"), text))


def _number(group: Group) -> str:
    text = ", ".join(part for part in (group.count, heads(group.site)) if part)
    return f"  ({text})" if text else ""


def _name(group: Group) -> Table:
    table = Table.grid()
    table.add_column(no_wrap=True, min_width=INDENT)
    table.add_column(overflow="fold")
    verdict = group.site.verdict
    table.add_row(Text(verdict.name, style=f"bold {COLOURS[verdict]}"), Text.assemble((group.name, "bold"), _number(group)))
    return table


def _rows(group: Group) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, min_width=9)
    table.add_column(overflow="fold")
    for label, text in block(group):
        style = "dim" if label in DIM else "bold" if label == "form" else ""
        table.add_row(Text(label, style="dim"), Text(text, style=style))
    return table


def _draw(group: Group, console: Console, known: set[Mask]) -> None:
    """The pictures of a group that are not known yet, side by side; named if they are several."""
    new = [(name, draw(subject)) for mask, name, subject in pictured(group) if mask not in known]
    known.update(mask for mask, _, _ in pictured(group))
    drawings = [(name, d) for name, found in new for d in ((found,) if isinstance(found, str) else found)]
    stacks = []
    for name, drawing in drawings:
        body = Text(drawing if isinstance(drawing, str) else picture(drawing))
        stacks.append(Stack(Text(f"{'':8}{name}", style="bold"), body) if len(new) > 1 else body)
    if stacks:
        console.print(Padding(Columns(stacks, padding=(0, 2)), (0, 0, 0, INDENT)))


def heading(report: Report) -> str:
    """What was looked at, and how it was captured."""
    return f"{report.model}({', '.join(report.inputs)}), {report.route}"


def block(group: Group) -> Iterator[tuple[str, str]]:
    """All that is known of a group of sites, a label and a text each."""
    site = group.site
    proved = site.verdict is Verdict.PROVED
    yield "form", form(site)
    if scores(site):
        yield "scores", scores(site)
    if why(site):
        yield "why", why(site)
    if witness(site):
        yield "witness", witness(site)
    if proved or site.assumptions:
        yield "assuming", "; ".join(map(str, site.assumptions)) or "nothing"
    for other in others(site):
        yield "also", other
    if site.runs_on:
        yield "runs on", site.runs_on
    if proof_cost(group):
        yield "z3", ", ".join(proof_cost(group))
    if group.line:
        yield "at", group.line
    if site.formula:
        whole = len(site.formula) <= LONGEST_FORMULA or (site.mask is not None and _is_formula(site.mask))
        yield "formula", site.formula if whole else f"{site.formula[:LONGEST_FORMULA]} ..."


def _is_formula(mask: Mask) -> bool:
    return any(isinstance(part, Formula) for part in parts(mask))


def facts(report: Report) -> Iterator[tuple[str, str]]:
    """What stands below the sites, a name and a text each."""
    symbols = dict.fromkeys((*report.ranges, *report.sizes))
    if symbols:
        yield "sizes", ", ".join(_size(name, report) for name in symbols)
    changed = {name: count for name, count in report.passes.items() if count}
    if changed:
        yield "rewritten", ", ".join(f"{name} {count}" for name, count in changed.items())
    for failure in report.failures:
        yield "route that failed", failure
    for note in report.notes:
        yield "note", note
    if report.seconds:
        yield report.start_up.title, report.start_up.parts
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
