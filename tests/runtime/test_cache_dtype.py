"""K and V kept in 8 bits: how far the logits are off, what verification refuses, and the decoder's methods over such caches."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import trilithon
from models.configs import tiny
from runtime.tiny_llama import VOCABULARY, tiny_llama
from trilithon import InputError, Options, VerificationFailed
from trilithon.caching import make_decoder
from trilithon.capture import hf
from trilithon.compiler import Analysis, _source, analyse
from trilithon.errors import CannotLower
from trilithon.prove.locality import TokenInputs
from trilithon.rewrite import cache_ops
from trilithon.rewrite.cache_ops import quantise, read_cache, slot_positions, write_cache, write_cache_8bit
from trilithon.runtime.decoder import CachedDecoder
from trilithon.runtime.original import original_model
from trilithon.runtime.verify import CACHE_TOLERANCE, relative_error, verify_decoder

FAMILIES = ("llama-3.2", "qwen3", "mistral")  # the last keeps rings of 6 + 15 slots
DTYPES = ("int8", "fp8")
HALF_STEP = {torch.int8: 0.5, torch.float8_e4m3fn: 16.0}  # largest error of a number of the largest magnitude, in scales


@cache
def model_of(family: str) -> nn.Module:
    return tiny_llama(max_position_embeddings=4096) if family == "tiny" else tiny(family)


@cache
def analysis_of(family: str) -> Analysis:
    """Captured and proved once for all types."""
    example, shapes = hf.example_for(model_of(family), ("input_ids", "position_ids"))
    return analyse(model_of(family), example, shapes, (), Options())


@cache
def made(family: str, dtype: str | None, max_tokens: int = 96) -> tuple[CachedDecoder, tuple[str, ...]]:
    """The decoder, verified, and what the report says of it."""
    analysis, options = analysis_of(family), Options(max_batch=3, cache_dtype=dtype)  # type: ignore[arg-type]
    decoder, notes = make_decoder(_source(model_of(family), None, analysis), max_tokens, "native", options)
    assert isinstance(decoder, CachedDecoder)
    return decoder, notes


def decoder_of(family: str, dtype: str | None, max_tokens: int = 96) -> CachedDecoder:
    return made(family, dtype, max_tokens)[0]


def logits_of(family: str, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model_of(family)(input_ids=ids, use_cache=False).logits
    return logits


def random_ids(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def prefilled(decoder: CachedDecoder, ids: Tensor) -> Tensor:
    return decoder.prefill(ids, torch.zeros(len(ids), dtype=torch.int64)).clone()


# ---------------------------------------------------------------- the functions


@pytest.mark.parametrize("dtype", list(HALF_STEP))
def test_a_number_is_off_by_half_a_step_at_most(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 16) * torch.tensor([1e-6, 1.0, 1e4]).view(1, 3, 1, 1)
    values, scales = quantise(x, dtype)
    assert values.dtype == dtype
    assert scales.shape == (2, 3, 5, 1)
    off = (read_cache(values, scales, torch.float64) - x.double()).abs()
    assert bool((off <= scales * HALF_STEP[dtype] * 1.0001).all())
    assert bool((off.amax() > 0).all())


@pytest.mark.parametrize("dtype", list(HALF_STEP))
def test_zeros_stay_zeros_and_what_is_not_finite_does_not_become_finite(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 1, 3, 4)
    x[0, 0, 1, 2], x[0, 0, 2, 1] = torch.inf, torch.nan
    back = read_cache(*quantise(x, dtype), torch.float32)
    assert torch.equal(back[0, 0, 0], x[0, 0, 0])
    assert not bool(torch.isfinite(back[0, 0, 1:]).any())


@pytest.mark.parametrize("dtype", list(HALF_STEP))
def test_each_token_is_written_with_its_own_scale(dtype: torch.dtype) -> None:
    """More tokens than slots, rows of unlike counts."""
    x = torch.randn(2, 2, 9, 8) * torch.rand(2, 2, 9, 1)
    start, counts = torch.tensor([3, 0]), torch.tensor([9, 4])
    plain = write_cache(torch.zeros(2, 2, 5, 8), x, start, counts)
    kept, scales = write_cache_8bit(torch.zeros(2, 2, 5, 8).to(dtype), torch.zeros(2, 2, 5, 1), x, start, counts)
    used = (slot_positions(start + counts, 5) >= start[:, None])[:, None, :, None]
    got = read_cache(kept, scales, torch.float32)
    assert torch.equal(got * used, read_cache(*quantise(plain, dtype), torch.float32) * used)


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_compiled_write_is_the_same(tokens: int) -> None:
    x, start, counts = torch.randn(2, 2, tokens, 8), torch.tensor([3, 9]), torch.tensor([tokens, 1])
    empty = torch.zeros(2, 2, 5, 8, dtype=torch.int8), torch.zeros(2, 2, 5, 1)
    want = write_cache_8bit(*(c.clone() for c in empty), x, start, counts)
    got = torch.compile(write_cache_8bit, backend="aot_eager")(*(c.clone() for c in empty), x, start, counts)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert bool((want[1] != 0).any())


# ---------------------------------------------------------------- the error, and what is refused


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_within_the_tolerance_and_not_exact(family: str, dtype: str) -> None:
    decoder, ids = decoder_of(family, dtype), random_ids(2, 40)
    assert relative_error(prefilled(decoder, ids[:, :20]), logits_of(family, ids[:, :20])[:, -1]) < 1e-5  # reads no cache
    steps = [decoder.decode(ids[:, i]).clone() for i in range(20, 26)]
    several = decoder.extend(ids[:, 26:40])
    error = relative_error(torch.cat([torch.stack(steps, 1), several], 1), logits_of(family, ids)[:, 20:])
    assert 1e-4 < error < CACHE_TOLERANCE[cache_ops.STORED[dtype]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", ["none", "of another token", "of another head"])
def test_wrong_scales_are_refused(wrong: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(x: Tensor, kept: torch.dtype) -> tuple[Tensor, Tensor]:
        values, scales = quantise(x, kept)
        changed = {"none": scales * 0, "of another token": scales.roll(1, 2), "of another head": scales.roll(1, 1)}
        return values, changed[wrong]

    decoder, model = decoder_of("mistral", dtype), model_of("mistral")
    eager = original_model(model, {"use_cache": False}, {}, TokenInputs("input_ids", None), {})
    assert verify_decoder(decoder, eager) > 1e-4
    monkeypatch.setattr(cache_ops, "quantise", off)
    with pytest.raises(VerificationFailed, match="Leave cache_dtype out"):
        verify_decoder(decoder, eager)


def test_the_report_says_that_it_is_an_approximation() -> None:
    (note,) = [note for note in made("llama-3.2", "int8")[1] if "approximation" in note]
    assert "int8" in note
    assert 1e-4 < float(note.split("against eager ")[1].split()[0]) < 2e-2
    assert not any("approximation" in note for note in made("tiny", None)[1])


def test_an_unknown_type_is_an_error() -> None:
    with pytest.raises(InputError, match="cache_dtype='int4' must be None or one of int8, fp8"):
        Options(cache_dtype="int4")  # type: ignore[arg-type]


def test_tensorrt_refuses_with_a_reason() -> None:
    with pytest.raises(CannotLower, match="IKVCacheUpdate"):
        trilithon.compile(model_of("llama-3.2"), backend="tensorrt", options=Options(cache_dtype="fp8"))


@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_bytes_of_the_cache(dtype: str | None) -> None:
    """Two layers of 2 key heads of 8 numbers, K and V, 96 slots a row, 3 rows."""
    decoder = decoder_of("tiny", dtype)
    heads = 3 * 96 * 2 * 2 * 2
    assert decoder.cache_bytes == decoder.most_cache_bytes == heads * (8 * 4 if dtype is None else 8 + 4)


def test_byte_llama_writes_readable_text_with_nearly_the_right_logits() -> None:
    model, tokenizer = trilithon.load_model("byte-llama"), hf.load_tokenizer("byte-llama")
    llm = trilithon.compile(model, max_tokens=96, options=Options(cache_dtype="int8"))
    assert any("approximation" in note for note in llm.report.notes)
    ids = tokenizer("The for statement is used to", return_tensors="pt").input_ids
    made = llm.generate(ids, max_new_tokens=40, return_dict_in_generate=True, output_logits=True, eos_token_id=None)
    assert made.logits is not None
    with torch.no_grad():
        want = model(input_ids=made.sequences, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    assert relative_error(torch.stack(made.logits, 1), want) < CACHE_TOLERANCE[torch.int8]
    chosen = want.gather(2, made.sequences[:, ids.shape[1] :, None]).squeeze(2)
    assert bool((want.amax(2) - chosen <= 0.5).all())  # each token is eager's own choice, or nearly as likely
    assert tokenizer.decode(made.sequences[0, ids.shape[1] :]).isascii()


# ---------------------------------------------------------------- the decoder's methods


def undisturbed(decoder: CachedDecoder, ids: Tensor, prompt: int) -> Tensor:
    """Logits of the last token of the prompt and of each behind, a token a step."""
    return torch.stack(
        [prefilled(decoder, ids[:, :prompt]), *(decoder.decode(ids[:, i]).clone() for i in range(prompt, ids.shape[1]))], 1
    )


@pytest.mark.parametrize(("family", "dtype"), [("tiny", "int8"), ("tiny", "fp8"), ("mistral", "int8")])
def test_rewind_save_restore_and_select_carry_the_scales(family: str, dtype: str) -> None:
    decoder, ids = decoder_of(family, dtype), random_ids(2, 34)
    want = undisturbed(decoder, ids, 24)[:, -4:]
    prefilled(decoder, ids[:, :24])
    for i in range(24, 30):
        decoder.decode(ids[:, i])
    saved = decoder.save()

    def rest() -> Tensor:
        return torch.stack([decoder.decode(ids[:, i]).clone() for i in range(30, 34)], 1)

    assert torch.equal(rest(), want)
    decoder.rewind(torch.tensor([30, 30]))
    assert torch.equal(rest(), want)
    prefilled(decoder, random_ids(3, 40, seed=1))
    decoder.restore(saved)
    decoder.select(torch.tensor([1, 0]))
    decoder.select(torch.tensor([1, 0, 0]))
    decoder.select(torch.tensor([0, 1]))
    assert torch.equal(rest(), want)


def test_a_cache_that_grows_keeps_its_scales() -> None:
    decoder, ids = decoder_of("tiny", "int8", 2000), random_ids(1, 1030)
    small = decoder.cache_bytes
    prefilled(decoder, ids[:, :1022])
    got = torch.stack([decoder.decode(ids[:, i]).clone() for i in range(1022, 1030)], 1)
    assert decoder.cache_bytes > small
    assert torch.equal(got, undisturbed(decoder, ids, 1022)[:, 1:])  # now it has room from the start
