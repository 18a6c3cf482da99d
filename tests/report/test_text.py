"""The report as text and in a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from report.reports import EVERYTHING, RANGE, proved, refuted, report
from trilithon.report.groups import distinct_masks, groups
from trilithon.report.text import meaning_of, render, report_text
from trilithon.spec.masks import Causal, SlidingWindow

EXPECTED = """\
Tiny<Model>(input_ids, position_ids), torch.export, non-strict
  PROVED   model.layers.0..2.self_attn (3 sites)  causal                   each row of position_ids is consecutive [guard]; \
s0 <= 1024 [export range]; runs on SDPA, is_causal=True
  PROVED   model.layers.3.self_attn               padding(attention_mask)  position_ids is all ones [declared]; \
runs on SDPA, is_causal=True
  REFUTED  encoder.0                              none proved              kept as exported; \
runs on SDPA with the mask as exported
    encoder.0: not causal: the mask allows what causal blocks
    witness: b=0 q=0 k=1 s=4
    at model.py:7, `x < y & z`
    allowed where: k <= q + 1 <script>
  UNKNOWN  encoder.1                              none proved              kept as exported; \
runs on SDPA with the mask as exported
    encoder.1: aten.bucketize.Tensor has no handler
    at model.py:9, `torch.bucketize(x)`
sizes: s0 = input_ids axis 1 (1 <= s0 <= 1024), s1 >= 2
checked at run time: each row of position_ids is consecutive
declared by the caller: position_ids is all ones
proved too: causal & documents(position_ids) if position_ids fits 32 bits
rewritten: fuse-attention 2
route that failed: torch.export, strict: RuntimeError: no
note: backend: native
seconds: capture 1.23, prove 0.50
versions: torch 9.9"""


def test_report_text():
    assert report_text(EVERYTHING) == EXPECTED
    assert str(EVERYTHING) == EXPECTED
    assert "\x1b" not in EXPECTED


def test_a_report_without_sites():
    text = report_text(report(failures=(), ranges={}, sizes={}, passes={}, notes=(), seconds={}, versions={}))
    assert text.splitlines() == [
        "Tiny<Model>(input_ids, position_ids), torch.export, non-strict",
        "  no attention was found",
    ]


def test_only_equal_neighbours_are_folded():
    window = SlidingWindow(8)
    sites = [proved(0), proved(1), proved(2, mask=window), proved(3), proved(4)]
    folded = [(g.name, g.count) for g in groups(report(*sites))]
    assert folded == [
        ("model.layers.0..1.self_attn", 2),
        ("model.layers.2.self_attn", 1),
        ("model.layers.3..4.self_attn", 2),
    ]
    assert [str(mask) for mask, _ in distinct_masks(report(*sites))] == [
        "causal",
        "window(8)",
        "causal & documents(position_ids)",
    ]
    assert dict(distinct_masks(report(*sites)))[Causal()] == "4 sites"


@pytest.mark.parametrize(
    "change",
    [{"runs_on": "FlexAttention"}, {"assumptions": ()}, {"heads": (4, 2)}, {"where": "other.py:1, `f()`  (node sdpa)"}],
    ids=["runs_on", "assumptions", "heads", "where"],
)
def test_a_different_result_is_a_line_of_its_own(change):
    assert len(groups(report(proved(0), proved(1, **change)))) == 2


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ((32, 8), "; 32 heads, 8 of keys and values;"),
        ((4, 4), "; 4 heads;"),
        ((4, None), "; 4 query heads;"),
        (None, "e]; runs"),
    ],
)
def test_heads_as_far_as_they_are_known(heads, words):
    site = proved(0, heads=heads, assumptions=(RANGE,))
    assert words.replace("e]", "range]") in report_text(report(site))


def test_what_a_size_symbol_is():
    assert meaning_of("s0 <= 1024", EVERYTHING) == "s0 = input_ids axis 1"
    assert meaning_of("s01 <= s1", EVERYTHING) == ""


def test_a_long_formula_is_cut():
    site = refuted()
    long = report(type(site)(**{**vars(site), "formula": "k <= q and " * 100}))
    line = next(line for line in report_text(long).splitlines() if "allowed where" in line)
    assert line.endswith(" ...")
    assert len(line) < 200


def test_a_witness_that_the_reason_names_is_not_repeated():
    site = refuted()
    same = report(type(site)(**{**vars(site), "reason": "not causal at b=0 q=0 k=1 s=4"}))
    assert "witness" not in report_text(same)


def rendered(drawn: set | None = None, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    render(EVERYTHING, console, drawn)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_render_shows_sites_and_a_picture_of_each_mask():
    text = rendered()
    for part in ("PROVED", "REFUTED", "UNKNOWN", "model.layers.0..2.self_attn", "3 sites", "witness: b=0 q=0 k=1 s=4"):
        assert part in text
    assert text.count("keys ->") == 3, "causal, padding, and the form with documents"
    assert "if position_ids fits 32 bits" in text
    assert "versions: torch 9.9" in text


def test_render_draws_a_mask_once():
    drawn: set = set()
    assert rendered(drawn).count("keys ->") == 3
    again = rendered(drawn)
    assert "keys ->" not in again
    assert "PROVED" in again


def test_render_fits_a_narrow_terminal():
    assert max(map(len, rendered(width=80).splitlines())) <= 80
