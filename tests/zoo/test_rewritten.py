"""Rewritten programs of the zoo compute what the exported ones do: also where biases, caps and sinks keep their masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trilithon.capture.export import capture
from trilithon.compiler import lower
from zoo.families import FAMILIES
from zoo.modes import call_of

CASES = (
    ("llama4", "sdpa"),
    ("gemma2", "eager"),
    ("gemma3", "sdpa"),
    ("gpt-oss", "eager"),
    ("bloom", "eager"),
    ("falcon-alibi", "sdpa"),
    ("xglm", "eager"),
    ("mistral", "eager"),
    ("modernbert", "sdpa"),
    ("mpnet", "eager"),
    ("deberta-v2", "eager"),
    ("t5", "sdpa"),
)


def right_padded(b: int, s: int) -> Tensor:
    return (torch.arange(s) < torch.tensor([s, max(s - 2, 1), max(s // 2, 1)][:b])[:, None]).long()


@pytest.mark.parametrize("ones", [True, False], ids=["ones", "padded"])
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_same_values(name: str, attention: str, ones: bool) -> None:
    """Where a guard asks for all ones, the padded call must fail, and not compute something else."""
    family = FAMILIES[name]
    model, example, shapes = call_of(family, family.make(attention), "ids+padding")
    program = capture(model, example, shapes).program
    calls = dict(example)
    for key in [key for key, value in example.items() if isinstance(value, Tensor)]:
        b, s = 3, 9 if "decoder" in key else 11
        padding = torch.ones(b, s, dtype=torch.int64) if ones else right_padded(b, s)
        calls[key] = torch.randint(3, 60, (b, s)) if "ids" in key else padding
    rewritten = lower(program)
    with torch.no_grad():  # with gradients, SDPA lays its result out in a way that the export did not see
        expected = program.module()(**calls)
    try:
        with torch.no_grad():
            got = rewritten.module()(**calls)
    except RuntimeError as broken:
        assert not ones
        if "all ones" not in str(broken):
            raise
        return
    mine, theirs = (torch.utils._pytree.tree_leaves(x) for x in (got, expected))
    for a, e in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-4, atol=2e-5)
