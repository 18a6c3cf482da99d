"""Reports as JSON: all fields, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from report.reports import EVERYTHING, report
from trilithon.errors import InputError
from trilithon.report.saved import read_report

SAVED = json.loads(EVERYTHING.to_json())


def without(field: str, place: tuple[str | int, ...] = ()) -> str:
    data = json.loads(EVERYTHING.to_json())
    found = data
    for step in place:
        found = found[step]
    del found[field]
    return json.dumps(data)


def test_what_is_saved_is_read(tmp_path):
    data = read_report(EVERYTHING.save(tmp_path / "r.json"))
    assert data == EVERYTHING.to_dict()
    assert data["warnings"] == ["the configuration promises a window of 4096 keys, and no mask has one"]
    site = data["sites"][-1]
    assert (site["softcap"], site["sinks"], site["cached"], site["validated_cells"]) == (50.0, True, True, 12345)
    assert (site["mask"], site["nearest"], site["heads"]) == ("formula(k <= q and (h != 2 or k >= q - 3))", "causal", [8, 2])
    assert data["sites"][0]["softcap"] is None and data["sites"][0]["validated_cells"] is None


def test_a_report_without_sites_is_read(tmp_path):
    assert read_report(report().save(tmp_path / "r.json"))["sites"] == []


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("{", ("r.json is not a report", "it is not JSON", "trilithon explain MODEL --json FILE")),
        ("[]", ("r.json is not a report", "no format number")),
        ('{"model": "x"}', ("r.json is not a report", "no format number")),
        (
            json.dumps({**SAVED, "format": 99}),
            ("the report", "of format 99", "this version reads format 1", "explain the model"),
        ),
        (without("sites"), ("r.json is not a report", "it lacks sites")),
        (without("warnings"), ("r.json is not a report", "it lacks warnings")),
        (without("verdict", ("sites", 3)), ("r.json is not a report", "it lacks sites[3].verdict")),
        (without("source", ("sites", 0, "assumptions", 1)), ("it lacks sites[0].assumptions[1].source",)),
        (json.dumps({**SAVED, "sites": [1]}), ("it lacks sites[0].name",)),
    ],
    ids=["text", "list", "no format", "other format", "sites", "warnings", "verdict", "source", "no site"],
)
def test_a_file_that_is_no_report(tmp_path, text, lines):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_report(path)
    for line in lines:
        assert line in str(caught.value)


@pytest.mark.parametrize(("name", "why"), [("missing.json", "No such file"), (".", "directory")])
def test_a_file_that_cannot_be_read(tmp_path: Path, name, why):
    with pytest.raises(InputError, match="cannot read") as caught:
        read_report(tmp_path / name)
    assert why in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "r.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="it is not JSON"):
        read_report(path)
