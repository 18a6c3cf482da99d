"""The report as a page: complete, self-contained and escaped."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

from report.reports import EVERYTHING, refused, report
from trilithon.report.html import report_html

VOID = {"meta", "br"}
FETCHING = {"script", "link", "img", "iframe", "object", "embed", "audio", "video", "source", "base", "form"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; fails on tags that do not close each other."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
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


def test_the_page_has_everything():
    page = Page(report_html(EVERYTHING))
    text = " ".join(page.text)
    for part in (
        "Tiny<Model>(input_ids, position_ids)",
        "model.layers.0..2.self_attn",
        "3 sites",
        "PROVED",
        "REFUTED",
        "UNKNOWN",
        "each row of position_ids is consecutive",
        "export range",
        "witness:",
        "b=0 q=0 k=1 s=4",
        "model.py:9, `torch.bucketize(x)`",
        "k <= q + 1 <script>",
        "torch 9.9",
        "capture 1.23, prove 0.50",
        "backend: native",
    ):
        assert part in text, part
    assert page.tags.count("svg") == 3, "one picture of each distinct mask"
    assert page.tags.count("table") == 1


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


def test_a_report_in_which_nothing_was_proved():
    page = Page(report_html(report(refused())))
    text = " ".join(page.text)
    assert "svg" not in page.tags
    assert "proofs hold" not in text
    assert "aten.bucketize.Tensor has no handler" in text


def test_a_report_without_sites():
    assert "no attention was found" in report_html(report())


def test_save_chooses_by_the_ending(tmp_path):
    assert EVERYTHING.save(tmp_path / "new" / "r.html").read_text().startswith("<!doctype html>")
    assert json.loads(EVERYTHING.save(tmp_path / "r.json").read_text())["sites"][3]["mask"] == "padding(attention_mask)"
    assert EVERYTHING.save(tmp_path / "r.txt").read_text() == str(EVERYTHING)


def test_a_size_in_an_assumption_is_explained():
    assert "s0 &lt;= 1024 <span class='source'>export range</span> <small>s0 = input_ids axis 1</small>" in report_html(
        EVERYTHING
    )
