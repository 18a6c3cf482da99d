"""Exports that tests share are those of the model at hand: its own weights, and only if nothing else differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from exports import shared
from models.configs import tiny
from trilithon.capture import export, hf
from trilithon.capture.export import Captured

NAMES = ("input_ids", "position_ids")


class Counted:
    """Captures through `shared`, and counts what would be exported: the first is, and stands for all others."""

    def __init__(self) -> None:
        self.exports = 0
        self.first: Captured | None = None
        self.capture = shared(self._made)

    def _made(self, *given: Any) -> Captured:
        self.exports += 1
        self.first = self.first or export.capture(*given[:3])
        return self.first

    def __call__(self, model: nn.Module, names: tuple[str, ...] = NAMES) -> Captured:
        return self.capture(model, *hf.example_for(model, names))


@pytest.fixture(scope="module")
def counted() -> Counted:
    made = Counted()
    made(tiny("gpt2"))
    return made


def test_the_next_model_gets_the_program_with_its_own_weights(counted: Counted) -> None:
    before, model = counted.exports, tiny("gpt2")
    for parameter in model.parameters():
        parameter.data.add_(0.01)
    program = counted(model).program
    assert counted.exports == before
    ids = torch.randint(3, 300, (3, 11), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids, "position_ids": torch.arange(11).expand(3, -1), "use_cache": False}
    with torch.no_grad():
        torch.testing.assert_close(program.module()(**given).logits, model(**given).logits)
    own = dict(model.named_parameters())
    assert any(name in own for name in program.state_dict)
    assert all(program.state_dict[name] is own[name] for name in program.state_dict if name in own)


def patched(model: Any) -> nn.Module:
    model.transformer.h[0].attn.forward = model.transformer.h[0].attn.forward
    return model  # type: ignore[no-any-return]


def unscaled(model: Any) -> nn.Module:
    model.transformer.h[0].attn.scale_attn_weights = False
    return model  # type: ignore[no-any-return]


def untied(model: Any) -> nn.Module:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "other",
    [
        lambda: tiny("gpt2", "eager"),
        lambda: tiny("gpt2").double(),
        lambda: patched(tiny("gpt2")),
        lambda: unscaled(tiny("gpt2")),
        lambda: untied(tiny("gpt2")),
    ],
    ids=["attention", "dtype", "patched", "setting", "tied"],
)
def test_another_model_is_exported(other: Callable[[], nn.Module], counted: Counted) -> None:
    before = counted.exports
    counted(other())
    assert counted.exports == before + 1


def test_another_call_is_exported(counted: Counted) -> None:
    before = counted.exports
    counted(tiny("gpt2"), ("input_ids",))
    assert counted.exports == before + 1
