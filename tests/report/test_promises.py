"""A configuration that promises what the exported graph lacks, or the reverse, is a warning."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trilithon.compiler import explain
from trilithon.options import Options
from trilithon.prove.verdict import Verdict
from trilithon.report.promises import broken_promises
from trilithon.report.report import SiteReport
from trilithon.spec import term as t
from trilithon.spec.masks import B, CacheLength, Causal, Chunked, Full, Mask, Padding, SlidingWindow
from zoo.families import FAMILIES
from zoo.modes import call_of

RANGES: dict[str, tuple[int, int | None]] = {"s0": (1, 4096), "s1": (1, 64)}


def site(layer: int, mask: Mask, softcap: float | None = None, verdict: Verdict = Verdict.PROVED) -> SiteReport:
    return SiteReport(f"model.layers.{layer}.self_attn", "sdpa", verdict, mask, (), {}, "", softcap=softcap)


def config(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"sliding_window": None} | values)


MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
KEPT = {
    "no window": (config(), [site(0, Causal())]),
    "windows": (config(sliding_window=8), [site(0, SlidingWindow(8) & Padding()), site(1, SlidingWindow(8))]),
    "alternating": (config(**MIXED), [site(0, SlidingWindow(8)), site(1, Causal())]),
    "chunks": (
        config(attention_chunk_size=6, layer_types=["chunked_attention"]),
        [site(0, Causal() & Chunked(6, position=t.read("position_ids", (B, t.var("q")), "int")))],
    ),
    "window that no example reaches": (config(sliding_window=4096), [site(0, Causal())]),
    "switched off": (config(sliding_window=8, use_sliding_window=False), [site(0, Causal())]),
    "cache": (config(sliding_window=8), [site(0, CacheLength(t.var("q"), 8))]),
    "softcap": (config(attn_logit_softcapping=50.0), [site(0, Causal(), softcap=50.0)]),
    "encoder": (config(sliding_window=8), [site(0, Full())]),
    "not proved": (config(sliding_window=8), [site(0, Causal(), verdict=Verdict.UNKNOWN)]),
    "says nothing": (SimpleNamespace(), [site(0, SlidingWindow(3))]),
    "no configuration": (None, [site(0, SlidingWindow(3))]),
}
BROKEN = {
    "lost window": (config(sliding_window=8), [site(0, Causal())], "a window of 8 keys, the exported graph has no window"),
    "other window": (
        config(sliding_window=8),
        [site(0, SlidingWindow(7))],
        "a window of 8 keys, the exported graph has a window of 7",
    ),
    "window from nowhere": (config(), [site(0, SlidingWindow(7))], "promises no window, the exported graph has a window of 7"),
    "wrong layer": (
        config(**MIXED),
        [site(0, SlidingWindow(8)), site(1, SlidingWindow(8))],
        "layer 1: the configuration promises no",
    ),
    "lost chunk": (
        config(attention_chunk_size=6, layer_types=["chunked_attention"]),
        [site(0, Causal())],
        "a chunk of 6 keys, the exported graph has no chunk",
    ),
    "lost cap": (config(attn_logit_softcapping=50.0), [site(0, Causal())], "softcap 50.0, the exported graph has None"),
    "many": (config(sliding_window=8), [site(0, Causal()), site(3, Causal())], "layers 0, 3: "),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_promise_that_is_kept_is_no_warning(name: str) -> None:
    said, sites = KEPT[name]
    assert broken_promises(said, sites, RANGES) == ()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_one_warning(name: str) -> None:
    said, sites, text = BROKEN[name]
    (warning,) = broken_promises(said, sites, RANGES)
    assert text in warning


def test_the_report_of_a_model_warns() -> None:
    """The window of the export, against a configuration that says another."""
    family = FAMILIES["mistral"]
    model, example, shapes = call_of(family, family.make(), "ids")
    options = Options(proof_cache=False)
    assert explain(model, example, shapes, options=options).warnings == ()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trilithon.compiler.hf.text_config", lambda model: config(sliding_window=7))
        (warning,) = explain(model, example, shapes, options=options).warnings
    assert "promises a window of 7 keys, the exported graph has a window of 5 keys" in warning
