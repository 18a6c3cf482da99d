"""Reports as JSON: what the file holds, and reading one back as plain data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypedDict, cast

from trilithon.errors import InputError

HOW = "write a report with trilithon explain MODEL --json FILE"
FORMAT = 1  # of the JSON; raise it when a field is added, removed or changes its meaning


class AssumptionData(TypedDict):
    """An `Assumption`."""

    text: str
    source: str
    table: str
    kind: str


class FormData(TypedDict):
    """Another proved form of a mask, each assumption with its source."""

    mask: str
    assumptions: list[str]


class SiteData(TypedDict):
    """A `SiteReport`: masks and biases as their text."""

    name: str
    kind: str
    verdict: str
    mask: str | None
    nearest: str | None
    bias: str | None
    softcap: float | None
    sinks: bool
    assumptions: list[AssumptionData]
    witness: dict[str, int]
    reason: str
    formula: str
    where: str
    runs_on: str
    alternatives: list[FormData]
    heads: list[int | None] | None
    solver_seconds: float
    cached: bool
    validated_cells: int | None


class ReportData(TypedDict):
    """A `Report`."""

    format: int
    model: str
    inputs: list[str]
    route: str
    failures: list[str]
    ranges: dict[str, list[int | None]]
    sizes: dict[str, str]
    sites: list[SiteData]
    passes: dict[str, int]
    seconds: dict[str, float]
    versions: dict[str, str]
    notes: list[str]
    warnings: list[str]


def read_report(path: str | Path) -> ReportData:
    """Read what `Report.save` wrote as JSON.

    Raises:
        InputError: there is no such file, or it is no report, or one of another format.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}", why=error.strerror or str(error), todo=HOW) from None
    except ValueError:  # of the JSON, or of its bytes
        raise _no_report(path, "it is not JSON") from None
    if not isinstance(data, dict) or "format" not in data:
        raise _no_report(path, "it has no format number")
    if data["format"] != FORMAT:
        raise InputError(
            f"cannot read the report {path} of format {data['format']}",
            why=f"this version reads format {FORMAT}",
            todo="explain the model again with this version, or read it with the version that wrote it",
        )
    missing = _missing(data)
    if missing:
        raise _no_report(path, f"it lacks {missing}")
    return cast(ReportData, data)


def _no_report(path: Path, why: str) -> InputError:
    return InputError(f"{path} is not a report", why=why, todo=HOW)


def _missing(data: dict[str, Any]) -> str:
    """The first field that is not there, e.g. "sites[3].verdict", or ""."""
    for place, found, fields in _parts(data):
        for name in fields:
            if not isinstance(found, dict) or name not in found:
                return f"{place}{name}"
    return ""


def _parts(data: dict[str, Any]) -> Iterator[tuple[str, Any, Iterable[str]]]:
    """The report, its sites and their assumptions, each with its place and the fields that it must have."""
    yield "", data, ReportData.__annotations__
    for i, site in enumerate(data["sites"]):
        yield f"sites[{i}].", site, SiteData.__annotations__
        for j, assumption in enumerate(site["assumptions"]):
            yield f"sites[{i}].assumptions[{j}].", assumption, AssumptionData.__annotations__
