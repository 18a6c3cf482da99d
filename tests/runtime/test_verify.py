"""A compiled program that computes something else is not handed out."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import trilithon
from models.configs import tiny
from trilithon import Options, VerificationFailed
from trilithon.prove.locality import TokenInputs
from trilithon.runtime import verify as verify_module
from trilithon.runtime.decoder import CachedDecoder
from trilithon.runtime.original import Original, original_model
from trilithon.runtime.verify import verify_decoder

LENGTHS = (6, 1, 17, 200)  # the last is more than the cache holds


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny("llama-3.2")


@pytest.fixture(scope="module", params=[1, 2], ids=["one row", "two rows"])
def decoder(model: nn.Module, request: pytest.FixtureRequest) -> CachedDecoder:
    return trilithon.compile(model, max_tokens=32, options=Options(verify=False, max_batch=request.param)).decoder


def original(model: nn.Module) -> Original:
    return original_model(model, {"use_cache": False}, {}, TokenInputs("input_ids", None), {})


@pytest.mark.parametrize("times", [None, 3.0])
def test_a_right_decoder_passes(decoder: CachedDecoder, model: nn.Module, times: float | None) -> None:
    assert 0.0 < verify_decoder(decoder, original(model), LENGTHS, times) < 1e-5


def test_the_error_is_in_units_of_eager(decoder: CachedDecoder, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is more than what is allowed in any case."""
    assert verify_decoder(decoder, original(model), LENGTHS, 0.001) < 1e-4
    monkeypatch.setattr(verify_module, "LEAST", {})
    with pytest.raises(VerificationFailed, match=r"eager torch\.float32 is off by \de-0\d; TensorRT-RTX multiplies"):
        verify_decoder(decoder, original(model), LENGTHS, 0.001)


@pytest.mark.parametrize("times", [None, 3.0])
@pytest.mark.parametrize("wrong", ["prefill", "decode"])
def test_a_wrong_decoder_does_not(decoder: CachedDecoder, model: nn.Module, wrong: str, times: float | None) -> None:
    """Each of its programs in turn gives logits that are off by a tenth of their size."""
    right = getattr(decoder.modules, wrong)
    noise = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 0.1

    def off(*arguments: torch.Tensor) -> Any:
        made = right(*arguments)
        logits = made[0] if wrong == "decode" else made
        logits = logits + noise * logits.abs().max()
        return (logits, logits[:, -1].argmax(-1)) if wrong == "decode" else logits

    object.__setattr__(decoder.modules, wrong, off)
    try:
        with pytest.raises(VerificationFailed, match="disagrees with eager"):
            verify_decoder(decoder, original(model), LENGTHS, times)
    finally:
        object.__setattr__(decoder.modules, wrong, right)


@pytest.mark.parametrize(
    ("change", "named"), [(lambda best: (best + 1) % 300, ""), (lambda best: best + 300, r"3\d\d|[45]\d\d")]
)
def test_a_wrong_best_token_shows(decoder: CachedDecoder, model: nn.Module, change: Any, named: str) -> None:
    right = decoder.modules.decode

    def off(*arguments: torch.Tensor) -> Any:
        logits, best = right(*arguments)
        return logits, change(best)

    object.__setattr__(decoder.modules, "decode", off)
    try:
        with pytest.raises(VerificationFailed, match=rf"not the best.*\n.*step 1 of row 0 it names ({named})"):
            verify_decoder(decoder, original(model), LENGTHS)
    finally:
        object.__setattr__(decoder.modules, "decode", right)


def test_any_of_equal_logits_is_best() -> None:
    """Kernels that round the logits last may name another than the first."""
    logits = torch.tensor([[[1.0, 3.0, 0.0, 3.0]]])
    for best in (1, 3):
        verify_module._verify_best(torch.tensor([[best]]), logits)
    for best in (0, 2, -1, 4):
        with pytest.raises(VerificationFailed, match=f"it names {best}, and its logits are highest at 1"):
            verify_module._verify_best(torch.tensor([[best]]), logits)


def test_wrong_padding_shows(decoder: CachedDecoder, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that takes padding for tokens."""
    right = CachedDecoder.prefill
    monkeypatch.setattr(CachedDecoder, "prefill", lambda self, ids, pad: right(self, ids, pad * 0))
    with pytest.raises(VerificationFailed, match="with left padding disagrees"):
        verify_decoder(decoder, original(model))


def test_prompts_that_go_wrong_when_replayed_show(decoder: CachedDecoder, model: nn.Module) -> None:
    """The first two of a size run and are captured; what is read then and freed shows later."""
    runs = []

    def run(tokens: torch.Tensor, start: torch.Tensor, counts: torch.Tensor, held: Iterable[torch.Tensor]) -> torch.Tensor:
        runs.append(tokens.shape)
        logits = decoder.modules.prefill(tokens, start, counts, *held)
        return logits if len(runs) < 3 else logits * 1.5

    decoder.prompts = SimpleNamespace(run=run)  # type: ignore[assignment]
    try:
        with pytest.raises(VerificationFailed, match="prefill of 6 tokens and decode disagrees"):
            verify_decoder(decoder, original(model))
    finally:
        decoder.prompts = None
