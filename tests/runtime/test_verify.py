"""A compiled program that computes something else is not handed out."""

from __future__ import annotations

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

    def off(*arguments: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = right(*arguments)
        return logits + noise * logits.abs().max()

    object.__setattr__(decoder.modules, wrong, off)
    try:
        with pytest.raises(VerificationFailed, match="disagrees with eager"):
            verify_decoder(decoder, original(model), LENGTHS, times)
    finally:
        object.__setattr__(decoder.modules, wrong, right)


def test_wrong_padding_shows(decoder: CachedDecoder, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that takes padding for tokens."""
    right = CachedDecoder.prefill
    monkeypatch.setattr(CachedDecoder, "prefill", lambda self, ids, pad: right(self, ids, pad * 0))
    with pytest.raises(VerificationFailed, match="with left padding disagrees"):
        verify_decoder(decoder, original(model))
