"""Rewritten programs of the zoo compute what the exported ones do, with biases, caps and sinks too."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

from trilithon.capture.export import capture
from trilithon.capture.sites import find_sites
from trilithon.compiler import lower
from trilithon.lower.native.lower import lower_native
from trilithon.rewrite.op import ATTENTION
from trilithon.rewrite.unlift import input_names, unlift
from zoo.families import FAMILIES, Family
from zoo.modes import PLAIN, call_of

CASES = (  # most of them exported for test_zoo.py too
    ("llama4", "sdpa"),
    ("gemma2", "eager"),
    ("gemma3", "sdpa"),
    ("gpt-oss", "eager"),
    ("bloom", "eager"),
    ("falcon-alibi", "eager"),
    ("xglm", "eager"),
    ("mistral", "sdpa"),
    ("modernbert", "sdpa"),
    ("mpnet", "eager"),
    ("deberta-v2", "eager"),
    ("t5", "eager"),
)


def right_padded(b: int, s: int) -> Tensor:
    return (torch.arange(s) < torch.tensor([s, max(s - 2, 1), max(s // 2, 1)][:b])[:, None]).long()


def short(name: str) -> Family:
    """Of one layer, where a layer has three attentions."""
    family = FAMILIES[name]
    return replace(family, base={**(family.base or {}), "num_layers": 1}) if family.kind == "seq2seq" else family


@lru_cache(maxsize=1)  # the two calls of a case follow each other
def padded(name: str, attention: str) -> tuple[dict[str, Any], ExportedProgram, ExportedProgram]:
    """An example call with masks, the program exported of it, and that program rewritten."""
    family = short(name)
    model, example, shapes = call_of(family, family.make(attention), "ids+padding")
    program = capture(model, example, shapes).program
    return example, program, lower(program)


@pytest.mark.parametrize("ones", [True, False], ids=["ones", "padded"])
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_same_values(name: str, attention: str, ones: bool) -> None:
    """Where a guard asks for all ones, the padded call must fail, and not compute something else."""
    example, program, rewritten = padded(name, attention)
    calls = dict(example)
    for key in [key for key, value in example.items() if isinstance(value, Tensor)]:
        b, s = 3, 9 if "decoder" in key else 11
        padding = torch.ones(b, s, dtype=torch.int64) if ones else right_padded(b, s)
        calls[key] = torch.randint(3, 60, (b, s)) if "ids" in key else padding
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


SCORES = (
    ("bloom", "eager"),
    ("mpt", "eager"),
    ("falcon-alibi", "sdpa"),
    ("falcon-alibi", "eager"),
    ("gemma2", "eager"),
    ("gpt-oss", "eager"),
    ("t5", "sdpa"),
)


@pytest.mark.parametrize(("name", "attention"), SCORES)
def test_changed_scores_are_rewritten(name: str, attention: str) -> None:
    """No site stays as exported, and neither the canonical op nor PyTorch's kernels differ from the program."""
    family = short(name)
    model, example, shapes = call_of(family, family.make(attention), "ids")
    program = capture(model, example, shapes).program
    rewritten = lower(program)
    targets = [n.target for n in rewritten.graph.nodes]
    assert targets.count(ATTENTION) == len(find_sites(program.graph))
    ids = {key: torch.randint(3, 60, (3, 9 if "decoder" in key else 11)) for key in PLAIN[family.kind]["ids"]}
    call = {**example, **ids}
    with torch.no_grad():
        expected, got = program.module()(**call), rewritten.module()(**call)
        native = lower_native(unlift(rewritten))(*(call[key] for key in input_names(rewritten)))
    leaves = torch.utils._pytree.tree_leaves
    for e, op, kernel in zip(*map(leaves, (expected, got, native)), strict=True):
        torch.testing.assert_close(op, e, rtol=2e-4, atol=2e-5)
        torch.testing.assert_close(kernel, e, rtol=2e-4, atol=2e-5)
