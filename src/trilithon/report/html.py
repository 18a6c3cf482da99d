"""The report as one self-contained page: nothing is fetched, and every text is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from trilithon.prove.verdict import Verdict
from trilithon.report.groups import Group, condition, distinct_masks, groups
from trilithon.report.picture import draw, svg
from trilithon.report.report import Report
from trilithon.report.text import NOTHING, assuming, facts, form, heads, meaning_of
from trilithon.spec.masks import Mask


def report_html(report: Report) -> str:
    """A page with a table of sites, a picture of each distinct mask, assumptions, formulas, versions and timings."""
    found = groups(report)
    title = f"{report.model}({', '.join(report.inputs)})"
    body = [
        f"<header><p class='eyebrow'>Trilithon attention report</p><h1>{escape(title)}</h1>",
        f"<p class='lead'>{_summary(report)}</p></header>",
        _section("Attention sites", _sites(found)),
        _section("Masks", f"<div class='pictures'>{''.join(_figure(*pair) for pair in distinct_masks(report))}</div>"),
        _section("Assumptions", _assumptions(report, found)),
        _section("Other proved forms", _others(found)),
        _section("Lifted formulas", "".join(_formula(g) for g in found if g.site.formula)),
        _section("Details", _details(report)),
    ]
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{escape(title)}</title>"
    return f"<!doctype html>\n<html lang='en'><head>{head}<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"


def _section(title: str, content: str) -> str:
    inner = content.replace("<div class='pictures'></div>", "")
    return f"<section><h2>{escape(title)}</h2>{inner}</section>" if inner else ""


def _summary(report: Report) -> str:
    counts = {verdict: sum(s.verdict is verdict for s in report.sites) for verdict in Verdict}
    shown = " ".join(_badge(verdict, f"{count} {verdict.name}") for verdict, count in counts.items() if count)
    sites = "1 attention site" if len(report.sites) == 1 else f"{len(report.sites)} attention sites"
    return f"{sites}, captured by {escape(report.route)}. {shown}"


def _badge(verdict: Verdict, text: str) -> str:
    return f"<span class='badge {verdict.value}'>{text}</span>"


def _sites(found: list[Group]) -> str:
    if not found:
        return f"<p>{NOTHING}</p>"
    rows = "".join(_row(g) for g in found)
    heads = "".join(f"<th>{name}</th>" for name in ("Verdict", "Attention", "Mask", "Assuming", "Runs on"))
    return f"<div class='wide'><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"


def _row(group: Group) -> str:
    site = group.site
    below = (f"{group.count} sites" if group.count > 1 else "", heads(group))
    name = "<br>".join((f"<code>{escape(group.name)}</code>", *(_small(line) for line in below if line)))
    mask = f"<code>{escape(form(group))}</code>"
    cells = (_badge(site.verdict, site.verdict.name), name, mask, escape(assuming(group)), escape(site.runs_on))
    rows = f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    if site.verdict is not Verdict.PROVED:
        rows += f"<tr class='why'><td></td><td colspan='4'>{_explanation(group)}</td></tr>"
    return rows


def _small(text: str) -> str:
    return f"<small>{escape(text)}</small>" if text else ""


def _explanation(group: Group) -> str:
    site = group.site
    lines = [escape(site.reason)]
    witness = " ".join(f"{name}={value}" for name, value in site.witness.items())
    lines += [f"witness: <code>{escape(witness)}</code>"] if witness else []
    lines += [f"at <code>{escape(group.line)}</code>"] if group.line else []
    return "<br>".join(lines)


def _figure(mask: Mask, role: str) -> str:
    drawing = draw(mask)
    caption = "" if isinstance(drawing, str) else drawing.caption
    words = f"<code>{escape(str(mask))}</code><span>{escape(role)}</span>{_small(caption)}"
    return f"<figure>{svg(mask)}<figcaption>{words}</figcaption></figure>"


def _assumptions(report: Report, found: list[Group]) -> str:
    proved = [g.site for g in found if g.site.verdict is Verdict.PROVED]
    listed = dict.fromkeys(a for site in proved for a in site.assumptions)
    items = "".join(
        f"<li>{escape(a.text)} <span class='source'>{escape(a.source)}</span> {_small(meaning_of(a.text, report))}</li>"
        for a in listed
    )
    return f"<ul>{items}</ul>" if items else "<p>None: the proofs hold for every input.</p>" if proved else ""


def _others(found: list[Group]) -> str:
    forms = dict.fromkeys((str(p.mask), condition(p)) for g in found for p in g.site.alternatives)
    items = "".join(f"<li><code>{escape(mask)}</code> {escape(when)}</li>" for mask, when in forms)
    return f"<ul>{items}</ul>" if items else ""


def _formula(group: Group) -> str:
    where = f"<p>at <code>{escape(group.line)}</code></p>" if group.line else ""
    state = "" if group.site.verdict is Verdict.PROVED else " open"
    summary = f"<summary><code>{escape(group.label)}</code></summary>"
    return f"<details{state}>{summary}{where}<pre>{escape(group.site.formula)}</pre></details>"


def _details(report: Report) -> str:
    return f"<dl>{_terms((name, text) for name, text in facts(report) if name != 'proved too')}</dl>"


def _terms(pairs: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs)


_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#5b6675;--line:#dde3ea;--paper:#fff;--card:#f6f8fa;--blue:#2463a8;
--proved:#1a7f4b;--refuted:#b3261e;--unknown:#946200;--vacuous:#7a3ea3}
@media (prefers-color-scheme:dark){:root{--ink:#e4e9ef;--soft:#9aa7b5;--line:#313b47;--paper:#12171d;--card:#1a212a;
--blue:#74b0f0;--proved:#56c98b;--refuted:#ff8a80;--unknown:#e8b84a;--vacuous:#c99af0}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:68rem;padding:2.5rem 1.5rem 4rem;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.7rem;line-height:1.25;margin:.1rem 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:2.4rem 0 .8rem;padding-bottom:.35rem;border-bottom:1px solid var(--line)}
.eyebrow{margin:0;color:var(--soft);font-size:.8rem;letter-spacing:.06em;text-transform:uppercase}
.lead{margin:0;color:var(--soft)}
code,pre{font:.875em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
small{color:var(--soft)}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th{text-align:left;color:var(--soft);font-weight:600;font-size:.8rem}
th,td{padding:.55rem 1rem .55rem 0;vertical-align:top;border-bottom:1px solid var(--line)}
tr:has(+.why)>td{border-bottom:0}
.why td{padding-top:0;color:var(--soft)}
.badge{display:inline-block;padding:.05rem .5rem;border-radius:1rem;font-size:.75rem;font-weight:700;letter-spacing:.03em;
border:1px solid currentColor}
.proved{color:var(--proved)}.refuted{color:var(--refuted)}.unknown{color:var(--unknown)}.vacuous{color:var(--vacuous)}
.pictures{display:flex;flex-wrap:wrap;gap:1.2rem}
figure{margin:0;padding:1rem;background:var(--card);border:1px solid var(--line);border-radius:.6rem;width:15.5rem}
figcaption{display:flex;flex-direction:column;gap:.15rem;margin-top:.6rem;font-size:.85rem;overflow-wrap:anywhere}
figcaption span{color:var(--soft)}
.mask{display:block;width:100%;height:auto}
.mask text{font:9px system-ui,"DejaVu Sans",sans-serif;fill:var(--soft)}
.mask .ground{fill:var(--paper)}.mask .allowed{fill:var(--blue)}
.mask .grid{stroke:var(--line);stroke-width:.6;fill:none}.mask .frame{fill:none;stroke:var(--soft);stroke-width:1}
ul{margin:0;padding-left:1.2rem}
.source{margin-left:.4rem;padding:0 .45rem;border-radius:.3rem;background:var(--card);border:1px solid var(--line);
color:var(--soft);font-size:.78rem}
details{margin:.4rem 0;padding:.5rem .8rem;background:var(--card);border:1px solid var(--line);border-radius:.5rem}
summary{cursor:pointer}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.5rem 0 .2rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.35rem 1.5rem;margin:0;font-size:.92rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
"""
