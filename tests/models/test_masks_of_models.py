"""What Hugging Face really hands to attention: each architecture, in each mode, as sdpa and as eager attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import trilithon
from models.configs import tiny
from trilithon import Causal, Mask, Padding, SlidingWindow, Verdict
from trilithon.capture import hf

IDS, POSITIONS, MASK = ("input_ids",), ("input_ids", "position_ids"), ("input_ids", "attention_mask")
PADDED = Padding("attention_mask")
CASES: list[tuple[str, tuple[str, ...], Mask, str | None]] = [
    ("llama-3.2", IDS, Causal(), None),
    ("llama-3.2", POSITIONS, Causal(), "consecutive"),
    ("llama-3.2", MASK, Causal() & PADDED, None),
    ("mistral", IDS, SlidingWindow(6), None),
    ("mistral", POSITIONS, SlidingWindow(6), "consecutive"),
    ("mistral", MASK, SlidingWindow(6) & PADDED, None),
    ("bert", MASK, PADDED, None),
]


def in_eager(mask: Mask) -> tuple[Mask, str]:
    """Eager attention under padding: a row without keys is the mean of V, so a guard must see to it that each has one."""
    return {
        Causal() & PADDED: (mask, "right_padded"),
        SlidingWindow(6) & PADDED: (SlidingWindow(6), "all_ones"),
        PADDED: (mask, "nonempty"),
    }[mask]


@pytest.mark.parametrize(
    ("name", "inputs", "mask", "guard", "attention"),
    [(*case, kind) for case in CASES for kind in (("sdpa", "eager") if case[1] == MASK else ("sdpa",))],
    ids=str,
)
def test_every_site_is_proved(name: str, inputs: tuple[str, ...], mask: Mask, guard: str | None, attention: str) -> None:
    """Without padding eager attention has no guard of its own; the zoo has it."""
    if attention == "eager":
        mask, guard = in_eager(mask)
    model = tiny(name, attention, layers=1)
    example, shapes = hf.example_for(model, inputs)
    report = trilithon.explain(model, example, shapes)
    assert len(report.sites) == 1
    for site in report.sites:
        assert site.verdict is Verdict.PROVED, site.reason
        assert site.mask == mask
        assert {a.kind for a in site.assumptions if a.source == "guard"} == ({guard} if guard else set())
        assert "modeling_" in site.where
        assert site.kind == ("sdpa" if attention == "sdpa" else "decomposed")


@pytest.mark.parametrize(("name", "attention"), [("qwen2.5", "sdpa"), ("gpt2", "eager"), ("mistral", "sdpa")])
def test_compiled_call_equals_eager_in_every_mode(name: str, attention: str) -> None:
    model = tiny(name, attention)
    llm = trilithon.compile(model, max_tokens=64)
    ids = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    packed = torch.cat([torch.arange(9), torch.arange(8)]).expand(2, -1)

    def eager(**given: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(use_cache=False, **given).logits
        return logits

    torch.testing.assert_close(llm(ids), eager(input_ids=ids), rtol=1e-4, atol=1e-4)
    assert llm.guard_failures == 0
    got, want = llm(ids, position_ids=packed), eager(input_ids=ids, position_ids=packed)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert llm.guard_failures == 1  # really packed: the general program ran
    got, want = llm(ids, attention_mask=mask), eager(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)
