"""The report as one self-contained page: nothing is fetched, and every text is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

from trilithon.prove.verdict import Verdict
from trilithon.report.groups import Group, form, groups, heads, masks, others, pictured, proof_cost, scores, why, witness
from trilithon.report.picture import Drawing, draw
from trilithon.report.report import Report
from trilithon.report.style import STYLE
from trilithon.report.svg import svg
from trilithon.report.text import NOTHING, facts, meaning_of

COLUMNS = ("Attention", "Verdict", "Mask", "Runs on", "z3", "Source")


def report_html(report: Report) -> str:
    """A page with a table of layers, then each distinct mask with pictures, assumptions, witness and formula."""
    title = escape(f"{report.model}({', '.join(report.inputs)})")
    body = [
        f"<header><p class='eyebrow'>Trilithon attention report</p><h1>{_breakable(title)}</h1>",
        f"<p class='lead'>{_summary(report)}</p>{_warnings(report)}</header>",
        _section("Layers", _layers(groups(report))),
        _section("Masks", "".join(_card(group, report) for group in masks(report))),
        _section("Details", _list((name, escape(text)) for name, text in facts(report))),
    ]
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{title}</title>"
    return f"<!doctype html>\n<html lang='en'><head>{head}<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _summary(report: Report) -> str:
    counts = {verdict: sum(s.verdict is verdict for s in report.sites) for verdict in Verdict}
    badges = " ".join(_badge(verdict, f"{count} ") for verdict, count in counts.items() if count)
    sites = "1 attention site" if len(report.sites) == 1 else f"{len(report.sites)} attention sites"
    return f"{sites}, captured by {escape(report.route)}. {badges}"


def _warnings(report: Report) -> str:
    items = "".join(f"<p><strong>Warning</strong> {escape(text)}</p>" for text in report.warnings)
    return f"<div class='warnings' role='note'>{items}</div>" if items else ""


def _badge(verdict: Verdict, before: str = "") -> str:
    return f"<span class='badge {verdict.value}'>{before}{verdict.name}</span>"


def _layers(found: list[Group]) -> str:
    if not found:
        return f"<p>{NOTHING}</p>"
    head = "".join(f"<th scope='col'>{name}</th>" for name in COLUMNS)
    body = "".join(map(_row, found))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _row(group: Group) -> str:
    site = group.site
    place, _, code = group.line.rstrip("`").partition(", `")
    cells = (
        _code(group.name) + _small(group.count, heads(site)),
        _badge(site.verdict),
        _code(form(site)) + _small(scores(site)),
        escape(site.runs_on),
        _small(*proof_cost(group), first="{}"),
        (f"<code>{escape(place)}</code>" if place else "") + (f"<small>{_code(code)}</small>" if code else ""),
    )
    return f"<tr>{''.join(f'<td data-label={name!r}>{cell}</td>' for name, cell in zip(COLUMNS, cells, strict=True))}</tr>"


def _card(group: Group, report: Report) -> str:
    """All that is known of one mask."""
    site = group.site
    proved = site.verdict is Verdict.PROVED
    unnamed = "unnamed" if site.formula else "not lifted"
    title = form(site) if proved else unnamed if site.nearest is None else f"not {site.nearest}"
    known = (
        ("Attention", _code(group.name) + _small(group.count)),
        ("Scores", escape(scores(site))),
        ("Why", escape(why(site))),
        ("Witness", _code(witness(site))),
        ("Assuming", _assumptions(group, report)),
        ("Also proved", "".join(f"<p>{escape(other)}</p>" for other in others(site))),
        ("Formula", f"<pre>{escape(site.formula)}</pre>" if site.formula else ""),
    )
    facts = _list((name, text) for name, text in known if text)
    return f"<article><h3>{_code(title)} {_badge(site.verdict)}</h3><div class='card'>{_pictures(group)}{facts}</div></article>"


def _assumptions(group: Group, report: Report) -> str:
    site = group.site
    items = "".join(
        f"<p>{escape(a.text)} <span class='source'>{escape(a.source)}</span>{_small(meaning_of(a.text, report))}</p>"
        for a in site.assumptions
    )
    return items or ("nothing: it holds for every input" if site.verdict is Verdict.PROVED else "")


def _pictures(group: Group) -> str:
    """The masks of a group side by side, named if they are several, and what the colours mean."""
    subjects = [(name, draw(subject)) for _, name, subject in pictured(group)]
    if not subjects:
        return ""
    figures: list[str] = []
    drawn: list[Drawing] = []
    for name, found in subjects:
        caption = _code(name) if len(subjects) > 1 else ""
        if isinstance(found, str):
            figures.append(f"<figure><figcaption>{caption}<span>{escape(found)}</span></figcaption></figure>")
            continue
        figures += [_figure(drawing, name, caption) for drawing in found]
        drawn += found
    return f"<div><div class='pictures'>{''.join(figures)}</div>{_legend(drawn, group)}</div>"


def _figure(drawing: Drawing, name: str, caption: str) -> str:
    below = f"below the keys: {', '.join(drawing.below)}" if drawing.below else ""
    lines = "".join(f"<span>{escape(line)}</span>" for line in (drawing.heads, below, *drawing.notes) if line)
    return f"<figure>{svg(drawing, name)}<figcaption>{caption}{lines}</figcaption></figure>"


def _legend(drawn: list[Drawing], group: Group) -> str:
    entries = [("allowed", "may attend"), ("blocked", "blocked")] if drawn else []
    if any(d.witness for d in drawn):
        entries += [("differs", f"differs from {group.site.nearest}"), ("witness", "the witness")]
    items = "".join(f"<li><i class='{name}'></i>{escape(text)}</li>" for name, text in entries)
    return f"<ul class='legend'>{items}</ul>" if items else ""


def _list(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and what they stand for, the latter HTML already."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{html}</dd>' for name, html in pairs)}</dl>"


def _code(text: str) -> str:
    return f"<code>{_breakable(escape(text))}</code>" if text else ""


def _small(*lines: str, first: str = "<small>{}</small>") -> str:
    """Each line in small letters, below what stands before; the first one may stand in another tag."""
    shown = [escape(line) for line in lines if line]
    return "".join((first if i == 0 else "<small>{}</small>").format(line) for i, line in enumerate(shown))


def _breakable(text: str) -> str:
    """Long module paths may be broken after a dot."""
    return re.sub(r"(?<!\.)\.(?!\.)", ".<wbr>", text)
