"""The report as text and in a terminal."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from report.reports import EVERYTHING, formula, proved, refuted, report
from trilithon.report.groups import groups, masks, milliseconds
from trilithon.report.names import common_name, ranges
from trilithon.report.text import meaning_of, render, report_text
from trilithon.spec import term as t
from trilithon.spec.bias import Bias
from trilithon.spec.masks import Formula, SlidingWindow

EXPECTED = """\
Tiny<Model>(input_ids, position_ids), torch.export, non-strict
WARNING: the configuration promises a window of 4096 keys, and no mask has one
PROVED   model.layers.0..2.self_attn  (3 sites)
         form      causal
         assuming  each row of position_ids is consecutive [guard]; s0 <= 1024 [export range]
         also      causal & documents(position_ids) if position_ids fits 32 bits
         runs on   SDPA, is_causal=True
         z3        20 ms
         at        modeling_llama.py:257, `attn_output = attention(q < k)`
         formula   k <= q
PROVED   model.layers.3.self_attn
         form      padding(attention_mask)
         assuming  position_ids is all ones [declared]
         runs on   SDPA, is_causal=True
         z3        < 0.1 ms
         at        modeling_llama.py:257, `attn_output = attention(q < k)`
         formula   k <= q
REFUTED  encoder.0
         form      none proved
         why       not causal: the mask blocks what causal allows
         witness   b=0 h=0 q=40 k=3 s=41 t=41
         runs on   SDPA with the mask as exported
         z3        < 0.1 ms
         at        model.py:7, `x < y & z`
         formula   k <= q and not (k == 3 and q == 40) <script>
UNKNOWN  encoder.1
         form      none proved
         why       aten.bucketize.Tensor has no handler
         runs on   SDPA with the mask as exported
         at        model.py:9, `torch.bucketize(x)`
PROVED   decoder.7  (8 heads, 2 of keys and values)
         form      formula
         scores    softcap 50, sinks
         why       not causal: at b=0 h=2 q=4 k=0 s=5 t=5 the mask blocks what causal allows
         assuming  nothing
         runs on   kernel
         z3        < 0.1 ms, from the proof cache, checked on 12,345 cells
         at        modeling_llama.py:257, `attn_output = attention(q < k)`
         formula   k <= q and (h != 2 or k >= q - 3)
sizes: s0 = input_ids axis 1 (1 <= s0 <= 1024), s1 >= 2
rewritten: fuse-attention 2
route that failed: torch.export, strict: RuntimeError: no
note: backend: native
start-up 1.7 s: export 1.2, prove 0.5
versions: torch 9.9"""


def test_report_text():
    assert report_text(EVERYTHING) == EXPECTED
    assert str(EVERYTHING) == EXPECTED
    assert "\x1b" not in EXPECTED


def test_a_report_without_sites():
    text = report_text(report(failures=(), ranges={}, sizes={}, passes={}, notes=(), seconds={}, versions={}))
    assert text.splitlines() == ["Tiny<Model>(input_ids, position_ids), torch.export, non-strict", "no attention was found"]


def test_equal_sites_are_folded_wherever_they_are():
    window = SlidingWindow(8)
    found = report(*(proved(layer, mask=window) if layer % 3 == 2 else proved(layer, node=layer) for layer in range(6)))
    assert [(g.name, g.count) for g in groups(found)] == [
        ("model.layers.0..1,3..4.self_attn", "4 sites"),
        ("model.layers.2,5.self_attn", "2 sites"),
    ]
    assert groups(found)[0].seconds == 0.04, "the longest"


@pytest.mark.parametrize(
    ("change", "same_mask"),
    [
        ({"runs_on": "FlexAttention"}, True),
        ({"heads": (4, 2)}, True),
        ({"where": "other.py:1, `f()`  (node sdpa)"}, True),
        ({"name": "vision.layers.0.attn"}, True),
        ({"assumptions": ()}, False),
        ({"softcap": 30.0}, False),
        ({"sinks": True}, False),
        ({"bias": Bias(t.real(1.0))}, False),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_different_result_is_a_block_of_its_own(change, same_mask):
    both = report(proved(0), proved(1, **change))
    assert len(groups(both)) == 2
    assert len(masks(both)) == (1 if same_mask else 2)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((3,), "3"), ((0, 1, 2), "0..2"), ((0, 2, 4), "0,2,4"), (range(0, 26, 2), "0,2,..,24"), ((0, 1, 3, 4, 6), "0..1,3..4,6")],
)
def test_numbers_of_layers(numbers, text):
    assert ranges(numbers) == text


def test_names_of_layers():
    assert common_name(["a.0.b", "a.1.b"]) == "a.0..1.b"
    assert common_name(["a.0.b.1", "a.1.b.2"]) == "a.0.b.1 .. a.1.b.2"
    assert common_name(["a.0.b", "c.0.b", "a.1.b"]) == "a.0..1.b, c.0.b"


@pytest.mark.parametrize(
    ("heads", "words"),
    [((32, 8), "  (32 heads, 8 of keys and values)"), ((4, 4), "  (4 heads)"), ((4, None), "  (4 query heads)"), (None, "")],
)
def test_heads_as_far_as_they_are_known(heads, words):
    assert f"model.layers.0.self_attn{words}\n" in report_text(report(proved(0, heads=heads)))


def test_what_a_size_symbol_is():
    assert meaning_of("s0 <= 1024", EVERYTHING) == "s0 = input_ids axis 1"
    assert meaning_of("s01 <= s1", EVERYTHING) == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.0, "< 0.1 ms"), (0.0073, "7.3 ms"), (0.12, "120 ms"), (4.5, "4500 ms")])
def test_times(seconds, text):
    assert milliseconds(seconds) == text


def formula_line(site) -> str:
    return next(line for line in report_text(report(site)).splitlines() if "formula   " in line)


def test_a_long_formula_is_cut_where_the_form_says_it():
    long = "k <= q and " * 100
    assert formula_line(replace(refuted(), formula=long)).endswith(" ...")
    assert len(formula_line(replace(refuted(), formula=long))) < 400
    assert formula_line(replace(formula(), formula=long)).endswith(long)


def test_the_form_of_a_formula_in_a_conjunction():
    site = formula()
    assert isinstance(site.mask, Formula)
    both = replace(site, mask=site.mask & SlidingWindow(8))
    assert "form      formula & window(8)\n" in report_text(report(both))


def test_a_witness_that_the_reason_names_is_not_repeated():
    same = replace(refuted(), reason="not causal: at b=0 h=0 q=40 k=3 s=41 t=41 the mask blocks what causal allows")
    assert report_text(report(same)).count("q=40") == 1


def rendered(drawn: set | None = None, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    render(EVERYTHING, console, drawn)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_render_shows_blocks_and_a_picture_of_each_mask():
    text = rendered()
    for line in EXPECTED.splitlines():
        assert all(word in text for word in line.split()), line
    assert text.count("keys ->") == 6, "causal, with documents, padding, the refuted one, and two kinds of heads"
    assert "◄ q=40" in text and "▲ k=3" in text
    assert "heads 0..1,3..7" in text and "head 2" in text


def test_render_draws_a_mask_once():
    drawn: set = set()
    assert rendered(drawn).count("keys ->") == 6
    again = rendered(drawn)
    assert "keys ->" not in again
    assert "PROVED" in again


@pytest.mark.parametrize("width", [60, 80])
def test_render_fits_a_narrow_terminal(width):
    assert max(map(len, rendered(width=width).splitlines())) <= width
