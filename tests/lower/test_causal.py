"""Causal attention of prompts: where the kernel of our own is used, and that it compiles; its numbers are in `tests/gpu`."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trilithon.lower.native import causal
from trilithon.lower.native.attention import attend
from trilithon.spec.masks import Causal, Chunked, Full, Mask, Padding, SlidingWindow, parse


def heads(tokens: int, width: int = 64, counts: tuple[int, int, int] = (4, 2, 2), wide: int = 0) -> tuple[Tensor, ...]:
    """Queries, keys and values that are parts of one row a token."""
    sizes = [n * width for n in counts]
    rows = torch.randn(1, tokens, sum(sizes) + wide, generator=torch.Generator().manual_seed(0)).half()
    return tuple(x.unflatten(-1, (-1, width)).transpose(1, 2) for x in rows.split([*sizes, wide], -1)[:3])


@pytest.mark.parametrize("mask", [*causal.KINDS.values(), SlidingWindow(1), Causal() & Chunked(1)], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 600])
def test_elsewhere_it_is_sdpa(tokens: int, mask: Mask) -> None:
    q, k, v = heads(tokens)
    found = causal.attend_causal(q, k, v, str(mask), 0.125)
    if mask == Causal():
        assert torch.equal(found, attend(q, k, v, "causal", 0.125, None))
    allowed = mask.materialize(1, 1, tokens, tokens)
    expected = attend(q.double(), k.double(), v.double(), str(mask), 0.125, allowed)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (Causal(), "causal"),
        (Causal() & Causal(), "causal"),
        (SlidingWindow(7), "window"),
        (Causal() & SlidingWindow(7) & SlidingWindow(5), "window"),
        (Causal() & Chunked(7), "chunk"),
        (Causal("lower_right"), ""),
        (SlidingWindow(7, "lower_right"), ""),
        (Causal() & Chunked(7) & Chunked(5), ""),
        (SlidingWindow(7) & Chunked(5), ""),
        (Causal() & Padding(), ""),
        (Chunked(7), ""),
        (Full(), ""),
    ],
    ids=str,
)
def test_kinds_of_masks(mask: Mask, kind: str) -> None:
    assert causal.kind_of(parse(str(mask))) == kind


def test_what_the_kernel_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "is_for", lambda device, dtype: dtype != torch.float32)
    q, k, v = heads(512)
    assert causal._suits(q, k, v, 0.125)
    assert causal._suits(*heads(512, 128, (3, 1, 1)), 0.125)
    side_by_side = [x.contiguous() for x in (q, k, v)]  # heads lie behind each other
    refused: list[tuple[Tensor, ...]] = [
        heads(511),
        heads(512, 32),
        heads(512, 96),
        heads(512, 256),
        heads(512, wide=4),  # rows of no multiple of 16 bytes
        (q.float(), k, v),
        (side_by_side[0], k, v),
        (q, side_by_side[1], v),
        (q, k, side_by_side[2]),
        (q, k[:, :, :-1], v[:, :, :-1]),
        (q.expand(2, -1, -1, -1), k, v),
        (q[:, :3], k, v),
        (q, k, torch.cat([v, v], -1)),
    ]
    assert not any(causal._suits(*x, 0.125) for x in refused)
    assert not causal._suits(q, k, v, -1.0) and not causal._suits(q, k, v, 0.0)
    shifted = torch.zeros(q.numel() + 4).half()[4:].view(1, 512, 4, 64).transpose(1, 2)
    assert shifted.data_ptr() % 16 and not causal._suits(shifted, k, v, 0.125)


@pytest.mark.parametrize("kind", causal.KINDS)
def test_a_kernel_that_goes_wrong_is_not_used(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning says what is used in its place, and why; the op gives what SDPA gives."""
    mask, (q, k, v) = causal.KINDS[kind], heads(512)
    monkeypatch.setattr(causal, "is_for", lambda device, dtype: True)
    plain = causal._through_sdpa(q, k, v, mask, 0.125)
    near = [Full(), *mask.near_misses()] if kind != "chunk" else [Full(), Causal(), Causal() & Chunked(299)]
    wrong = [("it is off by", partial(_by_another, x)) for x in near if _fits(x)]
    wrong.append(("it is off by nan", lambda q, k, v, mask, scale: q * torch.nan))
    wrong.append(("ZeroDivisionError: division by zero", lambda q, k, v, mask, scale: 1 / 0))
    for why, kernel in wrong:
        causal._works.cache_clear()
        monkeypatch.setattr(causal, "attend_by_kernel", kernel)
        assert torch.equal(causal.attend_causal(q, k, v, str(mask), 0.125), plain)
        assert (
            f"causal attention of prompts is PyTorch's, since the kernel of our own cannot be used here: {why}" in caplog.text
        )
        caplog.clear()
    causal._works.cache_clear()
    monkeypatch.setattr(causal, "attend_by_kernel", lambda *given: causal._through_sdpa(*given) + 1e-3)
    assert not torch.equal(causal.attend_causal(q, k, v, str(mask), 0.125), plain), "it is not used"
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    causal._works.cache_clear()


def _by_another(other: Mask, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    return attend(q, k, v, "another", scale, other.materialize(1, 1, q.shape[2], q.shape[2]))


def _fits(mask: Mask) -> bool:
    """Is a near miss one that square scores tell from the mask, and no row of it empty?"""
    return getattr(mask, "align", "upper_left") == "upper_left" and not str(mask).startswith("shifted(-1")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_it_compiles_for_its_gpu(tmp_path: Path) -> None:
    """With nothing spilled; and while values are added up by the weights of one block, the next block's are made."""
    from triton import knobs

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, Path(__file__).with_name("compile_causal.py"), tmp_path], env=environment, check=True)
    for file in tmp_path.iterdir():
        words = [knobs.nvidia.cuobjdump.path, "-sass", str(file)]
        sass = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert "HGMMA" in sass and not re.search(r"\b(STL|LDL)\b", sass), file.name
        marks = re.findall(r"HGMMA|MUFU\.EX2|DEPBAR\.LE gsb0, 0x[01]", sass)
        order = " ".join(x for i, x in enumerate(marks) if i == 0 or x != marks[i - 1])
        # each of two warpgroups
        assert order.count("HGMMA DEPBAR.LE gsb0, 0x1 MUFU.EX2 DEPBAR.LE gsb0, 0x0") == 2, (file.name, order)
    assert len(list(tmp_path.iterdir())) == len(causal.WIDTHS) * (1 + len(causal.KINDS))
