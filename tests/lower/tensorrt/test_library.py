"""Versions of TensorRT that are known to break are named before they do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import trilithon
from trilithon.errors import CannotLower
from trilithon.lower.tensorrt import library


def have(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    monkeypatch.setattr(library, "library", lambda: SimpleNamespace(__name__=name, __version__=version))


def test_a_builder_that_ends_the_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, "tensorrt_rtx", "1.7.1.116")
    with pytest.raises(CannotLower) as caught:
        trilithon.compile(torch.nn.Linear(2, 2), (torch.zeros(1, 2),), backend="tensorrt")
    for said in (
        "cannot build an engine with tensorrt_rtx 1.7.1.116",
        "ends the process",
        "pip install 'tensorrt-rtx>=1.6,<1.7'",
    ):
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "version", "warned"),
    [
        ("tensorrt_rtx", "1.5.0.114", True),
        ("tensorrt_rtx", "1.6.1.120", False),
        ("tensorrt_rtx", "1.7.1.116", False),  # whose builder is refused
        ("tensorrt", "1.5.0", False),
        ("tensorrt", "10.14.1.48", False),
    ],
)
def test_engines_that_may_crash_are_warned_of(
    name: str, version: str, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    have(monkeypatch, name, version)
    library.warn_of_running()
    assert ["corrupted heap" in x.message for x in caplog.records] == ([True] if warned else [])


def test_the_one_that_is_installed_builds() -> None:
    library.check_builder()
