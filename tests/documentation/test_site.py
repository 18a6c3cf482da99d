"""The site is built without a warning, holds every public name, and fetches nothing; its pictures are of the committed data."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import trilithon

ROOT = Path(__file__).parents[2]
FETCHED = re.compile(
    r"<(?:script|img|iframe)[^>]+src=\"(?:https?:)?//|<link[^>]+(?:stylesheet|icon|preload)[^>]+href=\"(?:https?:)?//"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; it takes 4 seconds."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    said = ran.stdout + ran.stderr
    assert ran.returncode == 0, said
    assert "WARNING" not in said
    return folder


def test_every_page_and_all_that_they_link_to_is_there(site):
    sources = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    built = {path.relative_to(site) for path in site.rglob("*.html")}
    assert sources | {Path("changelog.html")} == built - {Path("404.html")}
    for page in built - {Path("404.html")}:
        text = (site / page).read_text()
        for link in re.findall(r"(?:href|src)=\"([^\"#:]+)(?:#[^\"]*)?\"", text):
            assert (site / page.parent / link).exists(), f"{page} links to {link}"


def test_nothing_is_fetched_when_a_page_is_read(site):
    assert FETCHED.search('<link rel="stylesheet" href="https://fonts.example/css">')
    assert [page.name for page in site.rglob("*.html") if FETCHED.search(page.read_text())] == []


def test_every_public_name_is_in_the_reference(site):
    text = (site / "reference.html").read_text()
    anchors = {name.rpartition(".")[2] for name in re.findall(r'id="(trilithon[.\w]+)"', text)}
    assert set(trilithon.__all__) - anchors == set()


def test_pictures_are_those_of_the_committed_data(tmp_path):
    runpy.run_path(str(ROOT / "scripts" / "docs_pictures.py"))["main"](tmp_path)
    committed = {path.name: path.read_bytes() for path in (ROOT / "docs" / "pictures").glob("*.svg")}
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")} == committed, "run scripts/docs_pictures.py"
    assert all(f"{name})" in "".join(p.read_text() for p in (ROOT / "docs").glob("*.md")) for name in committed)
