"""How long the stages of a compilation take: no time is counted twice, and none is lost."""

from __future__ import annotations

import itertools

import pytest
import torch._dynamo.utils as dynamo

import trilithon
from trilithon import stages
from trilithon.capture import hf
from trilithon.stages import StartUp, clocked, stage, verifying


@pytest.fixture
def clock(monkeypatch):
    """Each look at the clock is a second after the one before."""
    seconds = itertools.count(0.0)
    monkeypatch.setattr(stages.time, "perf_counter", lambda: next(seconds))


def test_a_stage_within_another_is_not_counted_in_it(clock):
    with clocked() as found, stage("build"), stage("tune"):
        pass
    assert found.seconds == {"build": 2.0, "tune": 1.0, "other": 2.0}


def test_a_stage_that_fails_ends(clock):
    with clocked() as found:
        with pytest.raises(ZeroDivisionError), stage("prove"):
            _ = 1 / 0
        with stage("verify"):
            pass
    assert found.seconds == {"prove": 1.0, "verify": 1.0, "other": 3.0}


def test_stages_come_in_their_order_and_may_come_again(clock):
    with clocked() as found:
        for name in ("verify", "export", "verify"):
            with stage(name):
                pass
    assert list(found.seconds.items())[:2] == [("export", 1.0), ("verify", 2.0)]


def test_a_clock_within_another_has_its_own_time(clock):
    with clocked() as outer, stage("build"), clocked() as inner, stage("prove"):
        pass
    assert inner.seconds["prove"] == 1.0
    assert "prove" not in outer.seconds


def test_no_clock_no_count():
    with stage("build"), verifying():
        pass


def test_what_is_compiled_while_verifying_is_built(clock, monkeypatch):
    spent = {"entire_frame_compile": 5e9}
    monkeypatch.setattr(dynamo, "cumulative_time_spent_ns", spent)
    with clocked() as found, verifying():
        spent["entire_frame_compile"] += 0.75e9
    assert found.seconds == {"build": 0.75, "verify": 0.25, "other": 2.0}


def test_as_text():
    found = StartUp({"export": 9.1, "prove": 2.0, "tune": 0.04, "other": 0.3})
    assert str(found) == "start-up 11.4 s: export 9.1, prove 2.0, tune 0.0"
    assert str(StartUp({"export": 1.0, "other": 0.3})) == "start-up 1.3 s: export 1.0, other 0.3"


def test_the_stages_of_a_compilation():
    compiled = trilithon.compile(hf.load_model("byte-llama"), max_tokens=32)
    found = compiled.start_up
    assert list(found.seconds) == ["export", "prove", "rewrite", "build", "verify", "other"]
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert found.seconds["other"] < 0.1 * found.total
    assert str(found) in str(compiled.report)
    assert compiled.report.to_dict()["seconds"] == found.seconds


def test_the_stages_of_an_explanation():
    report = trilithon.explain(hf.load_model("byte-llama"))
    assert list(report.start_up.seconds) == ["export", "prove", "rewrite", "other"]
