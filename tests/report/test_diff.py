"""What changed between two saved reports."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from copy import deepcopy

import pytest
from rich.console import Console

from report.reports import EVERYTHING, proved, report
from trilithon.errors import InputError
from trilithon.report.diff import Change, Diff, compare, diff
from trilithon.report.saved import ReportData

SAVED = EVERYTHING.to_dict()
LAYER, REFUTED = SAVED["sites"][0], SAVED["sites"][4]


def changed(change: Callable[[ReportData], object]) -> Diff:
    after = deepcopy(SAVED)
    change(after)
    return diff(SAVED, after)


def at(index: int, **fields: object) -> Callable[[ReportData], object]:
    """A change of one site."""
    return lambda data: data["sites"][index].update(fields)  # type: ignore[typeddict-item]


def test_equal_reports():
    found = diff(SAVED, deepcopy(SAVED))
    assert (found.equal_sites, found.sites, found.changes, found.matters) == (7, (), (), False)


@pytest.mark.parametrize(
    ("change", "what", "before", "after"),
    [
        (at(0, verdict="refuted", reason=""), "verdict", "PROVED", "REFUTED"),
        (at(0, mask="window(8)"), "form", "causal", "window(8)"),
        (at(0, mask=None), "form", "causal", "none proved"),
        (at(0, softcap=30.0), "scores", "", "softcap 30"),
        (at(0, sinks=True), "scores", "", "sinks"),
        (at(0, bias="alibi"), "scores", "", "bias alibi"),
        (at(6, softcap=None), "scores", "softcap 50, sinks", "sinks"),
        (at(3, assumptions=[]), "assumptions", "position_ids is all ones [declared]", ""),
        (at(0, runs_on="FlexAttention"), "kernel", "SDPA, is_causal=True", "FlexAttention"),
        (at(0, heads=[4, 2]), "heads", "", "4 2"),
        (at(4, formula="k <= q"), "formula", REFUTED["formula"], "k <= q"),
        (at(6, formula="k <= q"), "formula", SAVED["sites"][6]["formula"], "k <= q"),
        (lambda data: data["sites"].pop(3), "site", "PROVED padding(attention_mask)", ""),
        (lambda data: data["sites"].append({**LAYER, "name": "new"}), "site", "", "PROVED causal"),
    ],
)
def test_a_change_of_a_site_that_matters(change, what, before, after):
    found = changed(change)
    (site,) = found.sites
    assert site.changes == (Change(what, before, after, True),)
    assert found.matters and not found.changes


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (at(0, formula="q >= k"), "formula"),
        (at(0, where="modeling_llama.py:300, `f()`  (node sdpa)"), "at"),
        (at(0, alternatives=[]), "also"),
        (at(0, kind="efficient"), "exported as"),
        (at(5, reason="other words"), "why"),
    ],
)
def test_a_change_of_a_site_that_does_not_matter(change, what):
    found = changed(change)
    (site,) = found.sites
    assert [c.what for c in site.changes] == [what]
    assert not found.matters


@pytest.mark.parametrize("fields", [{"solver_seconds": 2.0}, {"cached": True}, {"validated_cells": 7}])
def test_what_is_no_change_of_a_site(fields):
    assert changed(at(0, **fields)).sites == ()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"versions": {"torch": "10.0", "transformers": "6.0"}}, [("torch", "9.9", "10.0"), ("transformers", "", "6.0")]),
        ({"route": "torch.export, strict"}, [("captured by", "torch.export, non-strict", "torch.export, strict")]),
        ({"passes": {"fuse-attention": 3}}, [("rewritten", "fuse-attention 2", "fuse-attention 3")]),
    ],
)
def test_changes_of_the_report_that_do_not_matter(fields, expected):
    found = changed(lambda data: data.update(fields))
    assert [(c.what, c.before, c.after) for c in found.changes] == expected
    assert not found.matters


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"inputs": ["input_ids"]}, "model"),
        ({"model": "Other"}, "model"),
        ({"warnings": []}, "warnings"),
        ({"ranges": {"s0": [1, 2048], "s1": [2, None]}}, "sizes"),
    ],
)
def test_changes_of_the_report_that_matter(fields, what):
    found = changed(lambda data: data.update(fields))
    assert [c.what for c in found.changes] == [what]
    assert found.matters


def test_time_in_z3_is_shown():
    found = changed(at(2, solver_seconds=0.5))
    assert found.changes == (Change("z3", "20 ms", "500 ms", False),)


def test_sizes_may_have_other_symbols():
    other = json.loads(json.dumps(SAVED).replace("s0", "s77"))
    found = diff(SAVED, other)
    assert (found.sites, found.changes) == ((), ())


def test_equal_changes_are_one():
    before = report(*(proved(layer) for layer in range(4))).to_dict()
    after = report(*(proved(layer, runs_on="FlexAttention") if layer else proved(layer) for layer in range(4))).to_dict()
    found = diff(before, after)
    assert found.equal_sites == 1
    assert [site.names for site in found.sites] == [tuple(f"model.layers.{layer}.self_attn" for layer in (1, 2, 3))]


TEXT = """\
Tiny<Model>(input_ids, position_ids)
model.layers.0..2.self_attn  (3 sites)
  form         causal -> window(8)
  at           modeling_llama.py:257, `attn_output = attention(q < k)`
               -> modeling_llama.py:300, `attn_output = attention(q < k)`
model.layers.3.self_attn
  site         gone: PROVED padding(attention_mask)
extra
  site         new: PROVED causal
3 sites are the same
torch        9.9 -> 10.0
something that matters changed
"""


def test_text(tmp_path):
    after = deepcopy(SAVED)
    for site in after["sites"][:3]:
        site |= {"mask": "window(8)", "where": site["where"].replace("257", "300")}  # type: ignore[typeddict-item]
    del after["sites"][3]
    after["sites"].append({**LAYER, "name": "extra"})
    after["versions"]["torch"] = "10.0"
    files = []
    for name, data in (("a.json", SAVED), ("b.json", after)):
        files.append(tmp_path / name)
        files[-1].write_text(json.dumps(data))
    console = Console(file=io.StringIO(), width=100)
    saved = tmp_path / "new" / "diff.json"
    assert compare(files, console, saved) is True
    text = "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
    assert text == f"{TEXT}saved {saved}\n"
    written = json.loads(saved.read_text())
    assert written["matters"] is True
    assert written["sites"][1] == {
        "names": ["model.layers.3.self_attn"],
        "changes": [{"what": "site", "before": "PROVED padding(attention_mask)", "after": "", "matters": True}],
    }


def test_text_of_equal_reports(tmp_path):
    file = EVERYTHING.save(tmp_path / "a.json")
    console = Console(file=io.StringIO(), width=100)
    assert compare((file, file), console) is False
    assert console.file.getvalue().splitlines()[1:] == ["7 sites are the same", "nothing that matters changed"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("names", "html", "why"),
    [(("a.json",), None, "1 was given"), (("a.json",) * 3, None, "3 were given"), (("a.json",) * 2, "d.html", "has no page")],
)
def test_what_cannot_be_compared(names, html, why):
    with pytest.raises(InputError, match="compares two saved reports") as caught:
        compare(names, Console(file=io.StringIO()), None, html)
    assert why in str(caught.value)
