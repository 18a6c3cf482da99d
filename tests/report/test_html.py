"""The report as a page: complete, self-contained and escaped."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

from report.reports import EVERYTHING, proved, refused, report
from trilithon.report.html import report_html
from trilithon.report.report import Report
from trilithon.spec.masks import Padding

VOID = {"meta"}
FETCHING = {"script", "link", "img", "iframe", "object", "embed", "audio", "video", "source", "base", "form"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; fails on tags that do not close each other."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text.replace("<wbr>", ""))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def words(*parts: str) -> str:
    return " ".join(" ".join(parts).split())


def test_the_page_has_everything():
    page = Page(report_html(EVERYTHING))
    text = words(*page.text)
    for part in (
        "Tiny<Model>(input_ids, position_ids)",
        "Warning the configuration promises a window of 4096 keys",
        "model.layers.0..2.self_attn",
        "3 sites",
        "5 PROVED",
        "1 REFUTED",
        "1 UNKNOWN",
        "each row of position_ids is consecutive guard",
        "s0 <= 1024 export range s0 = input_ids axis 1",
        "position_ids is all ones declared",
        "nothing: it holds for every input",
        "b=0 h=0 q=40 k=3 s=41 t=41",
        "differs from causal the witness",
        "model.py:9 torch.bucketize(x)",
        "<script>",
        "softcap 50, sinks",
        "< 0.1 ms from the proof cache checked on 12,345 cells",
        "heads 0..1,3..7",
        "queries 25 to 40 of 41, keys 0 to 15 of 41",
        "below the keys: attention_mask",
        "torch 9.9",
        "start-up 1.7 s export 1.2, prove 0.5",
        "backend: native",
    ):
        assert part in text, part
    assert page.tags.count("svg") == 6, "causal and its other form, padding, the refuted one, two kinds of heads"
    assert page.tags.count("table") == 1
    assert page.tags.count("article") == 5


def cards(report_: Report) -> list[str]:
    """The text of each mask's card."""
    html = report_html(report_)
    return [words(*Page(f"<article>{part.split('</article>')[0]}</article>").text) for part in html.split("<article>")[1:]]


def test_a_card_says_each_thing_once():
    causal, padding, refuted, refused, formula = cards(EVERYTHING)
    assert refuted.count("q=40") == refuted.count("not causal: ") == refuted.count("k == 3") == 1
    assert formula.count("softcap 50, sinks") == formula.count("h != 2") == formula.count("q=4") == 1
    for card in (causal, padding, refuted, refused, formula):
        for label in ("Attention", "Scores", "Why", "Witness", "Assuming", "Also proved", "Formula", "may attend"):
            assert card.count(label) <= 1, (label, card)
    assert "Why" not in causal and "Witness" not in causal and "Scores" not in causal
    assert "Why aten.bucketize.Tensor has no handler" in refused and "Formula" not in refused


def test_masks_that_are_the_same_share_a_card_and_not_a_row():
    html = report_html(report(proved(0), proved(1, runs_on="FlexAttention"), proved(2, mask=Padding(), alternatives=())))
    page = Page(html)
    assert page.tags.count("tr") == 1 + 3
    assert page.tags.count("article") == 2
    assert page.tags.count("svg") == 3


def test_the_page_fetches_nothing():
    html = report_html(EVERYTHING)
    page = Page(html)
    assert not FETCHING & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href", "xlink:href", "action", "style")]
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not re.search(r"https?:|//|@import|url\(", html)
    assert "prefers-color-scheme:dark" in html


def test_what_users_wrote_is_escaped():
    html = report_html(EVERYTHING)
    assert "<script" not in html
    assert "Tiny<Model>" not in html
    assert "x &lt; y &amp; z" in html
    assert "<img" not in report_html(report(proved(0, name="<img>", runs_on="<img>"), warnings=("<img>",)))


def test_a_report_in_which_nothing_was_proved():
    page = Page(report_html(report(refused())))
    text = words(*page.text)
    assert "svg" not in page.tags
    assert "it holds for every input" not in text
    assert "aten.bucketize.Tensor has no handler" in text


def test_a_report_without_sites():
    assert "no attention was found" in report_html(report())


def test_save_chooses_by_the_ending(tmp_path):
    assert EVERYTHING.save(tmp_path / "new" / "r.html").read_text().startswith("<!doctype html>")
    assert json.loads(EVERYTHING.save(tmp_path / "r.json").read_text())["sites"][3]["mask"] == "padding(attention_mask)"
    assert EVERYTHING.save(tmp_path / "r.txt").read_text() == str(EVERYTHING)
