"""Compare two saved reports: what changed between two versions of a model, or of a library it uses.

Sites are compared by name, and sizes by the input axis that they stand for, because torch.export names them anew each
time. What matters is what a mask means, what its proof rests on and what it runs on. How a proved mask is written, where
its line is, versions and times are shown and do not matter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trilithon.errors import InputError
from trilithon.report.groups import milliseconds
from trilithon.report.names import common_name
from trilithon.report.saved import ReportData, SiteData, read_report


@dataclass(frozen=True)
class Change:
    """One thing that differs.

    Attributes:
        what: "form", "assumptions", "kernel", ...
        before, after: as text; "" where there was none.
        matters: masks mean, need or run on something else.
    """

    what: str
    before: str
    after: str
    matters: bool


@dataclass(frozen=True)
class SiteChanges:
    """Sites with the same changes; one that is in one report only has the one change "site"."""

    names: tuple[str, ...]
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Diff:
    """What differs between two reports.

    Attributes:
        models: what was explained before and after, e.g. "LlamaForCausalLM(input_ids)".
        equal_sites: number of sites without any change.
        sites: sites with changes.
        changes: those of the whole report: inputs, ranges, warnings, versions, time in z3.
    """

    models: tuple[str, str]
    equal_sites: int
    sites: tuple[SiteChanges, ...]
    changes: tuple[Change, ...]

    @property
    def matters(self) -> bool:
        """Whether anything that matters changed."""
        return any(c.matters for c in (*self.changes, *(c for s in self.sites for c in s.changes)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `to_json` writes it."""
        return {"matters": self.matters} | asdict(self)

    def to_json(self) -> str:
        """The diff as indented JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write it as JSON."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")
        return path


def compare(paths: Sequence[str | Path], console: Console, json: Path | None = None, html: Path | None = None) -> bool:
    """Print what changed from one saved report to another, and whether that matters.

    Args:
        json: where to save the diff.
        html: must be None: a diff has no page.

    Raises:
        InputError: these are not two reports of this format.
    """
    if len(paths) != 2 or html is not None:
        why = "a diff has no page" if html is not None else f"{len(paths)} {'was' if len(paths) == 1 else 'were'} given"
        raise InputError("explain compares two saved reports", why=why, todo="trilithon explain a.json b.json --json diff.json")
    found = diff(*map(read_report, paths))
    render(found, console)
    if json is not None:
        console.print(f"saved {found.save(json)}", highlight=False, soft_wrap=True)
    return found.matters


def diff(before: ReportData, after: ReportData) -> Diff:
    """What changed from one report to another."""
    old, new = ({site["name"]: site for site in report["sites"]} for report in (before, after))
    renaming = _renaming(before), _renaming(after)
    alike: dict[tuple[Change, ...], list[str]] = {}
    for name in dict.fromkeys((*old, *new)):
        changes = tuple(_site(old.get(name), new.get(name), *renaming))
        alike.setdefault(changes, []).append(name)
    equal = alike.pop((), [])
    return Diff(
        models=(_model(before), _model(after)),
        equal_sites=len(equal),
        sites=tuple(SiteChanges(tuple(names), changes) for changes, names in alike.items()),
        changes=tuple(_whole(before, after)),
    )


def _site(old: SiteData | None, new: SiteData | None, name_old: Rename, name_new: Rename) -> Iterator[Change]:
    if old is None or new is None:
        yield Change("site", _in_short(old), _in_short(new), True)
        return
    for what, show in _FIELDS.items():
        before, after = show(old, name_old), show(new, name_new)
        if before != after:
            yield Change(what, before, after, what not in _MINOR and not (what == "formula" and _same_form(old, new)))


def _in_short(site: SiteData | None) -> str:
    return "" if site is None else f"{site['verdict'].upper()} {site['mask'] or 'none proved'}"


def _same_form(old: SiteData, new: SiteData) -> bool:
    """Both formulas were proved to be the same mask, so that they only are written in another way."""
    return old["verdict"] == new["verdict"] == "proved" and old["mask"] == new["mask"] and "formula(" not in str(old["mask"])


Rename = Callable[[str], str]


def _renaming(report: ReportData) -> Rename:
    """Puts the axis that a size stands for in place of its symbol: "input_ids axis 1 <= 512" for "s70 <= 512"."""
    sizes = report["sizes"]
    symbol = re.compile(rf"\b({'|'.join(map(re.escape, sizes))})\b")
    return lambda text: symbol.sub(lambda found: sizes[found[0]], text) if sizes else text


def _assumptions(site: SiteData, rename: Rename) -> str:
    return "; ".join(sorted(f"{rename(a['text'])} [{a['source']}]" for a in site["assumptions"]))


def _also(site: SiteData, rename: Rename) -> str:
    return "; ".join(sorted(f"{form['mask']} if {rename(' and '.join(form['assumptions']))}" for form in site["alternatives"]))


def _scores(site: SiteData, rename: Rename) -> str:
    bias = site["bias"] and f"bias {rename(site['bias'])}"
    softcap = None if site["softcap"] is None else f"softcap {site['softcap']:g}"
    return ", ".join(part for part in (bias, softcap, "sinks" if site["sinks"] else None) if part)


_FIELDS: dict[str, Callable[[SiteData, Rename], str]] = {
    "verdict": lambda site, _: site["verdict"].upper(),
    "form": lambda site, rename: rename(site["mask"] or "none proved"),
    "scores": _scores,
    "assumptions": _assumptions,
    "why": lambda site, _: "" if site["verdict"] == "proved" else site["reason"],
    "formula": lambda site, rename: rename(site["formula"]),
    "kernel": lambda site, _: site["runs_on"],
    "heads": lambda site, _: " ".join(map(str, site["heads"] or ())),
    "exported as": lambda site, _: site["kind"],
    "also": _also,
    "at": lambda site, _: re.sub(r"\s*\(node [^)]*\)$", "", site["where"]),
}
_MINOR = ("why", "exported as", "also", "at")


def _whole(before: ReportData, after: ReportData) -> Iterator[Change]:
    """Changes of the report itself; of packages only those that changed."""
    pairs = [
        ("model", _model(before), _model(after), True),
        ("sizes", _ranges(before), _ranges(after), True),
        ("warnings", "; ".join(before["warnings"]), "; ".join(after["warnings"]), True),
        ("captured by", before["route"], after["route"], False),
        ("rewritten", _counts(before["passes"]), _counts(after["passes"]), False),
    ]
    names = dict.fromkeys((*before["versions"], *after["versions"]))
    pairs += [(name, before["versions"].get(name, ""), after["versions"].get(name, ""), False) for name in names]
    pairs.append(("z3", _solver_time(before), _solver_time(after), False))
    return (Change(*pair) for pair in pairs if pair[1] != pair[2])


def _model(report: ReportData) -> str:
    return f"{report['model']}({', '.join(report['inputs'])})"


def _ranges(report: ReportData) -> str:
    rename = _renaming(report)
    highest = {name: "" if bounds[1] is None else f" <= {bounds[1]}" for name, bounds in report["ranges"].items()}
    return ", ".join(sorted(f"{bounds[0]} <= {rename(name)}{highest[name]}" for name, bounds in report["ranges"].items()))


def _counts(passes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in passes.items() if count)


def _solver_time(report: ReportData) -> str:
    """The longest of the sites: equal masks are proved once."""
    return milliseconds(max((site["solver_seconds"] for site in report["sites"]), default=0.0))


def render(found: Diff, console: Console) -> None:
    """Print the diff for a person: what does not matter is dim."""
    if found.models[0] == found.models[1]:
        console.print(Text(found.models[0], style="bold"))
    for site in found.sites:
        count = f"  ({len(site.names)} sites)" if len(site.names) > 1 else ""
        console.print(Text.assemble((common_name(site.names), "bold"), count))
        console.print(Padding(_rows(site.changes), (0, 0, 0, 2)))
    if found.equal_sites:
        console.print(Text(f"{found.equal_sites} {'site is' if found.equal_sites == 1 else 'sites are'} the same"))
    if found.changes:
        console.print(_rows(found.changes))
    console.print(Text("something that matters changed" if found.matters else "nothing that matters changed", style="bold"))


def _rows(changes: Iterable[Change]) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, min_width=12)
    table.add_column(overflow="fold")
    for change in changes:
        table.add_row(Text(change.what, style="dim"), _before_and_after(change), style="" if change.matters else "dim")
    return table


def _before_and_after(change: Change) -> Text:
    if change.what == "site":
        return Text(f"new: {change.after}", style="green") if change.after else Text(f"gone: {change.before}", style="red")
    before, after = change.before or "nothing", change.after or "nothing"
    apart = " " if len(before) + len(after) < 50 else "\n"
    return Text.assemble((before, "red" if change.matters else ""), f"{apart}-> ", (after, "green" if change.matters else ""))
