"""Causal attention of prompts: where the kernel of our own is used, and that it compiles; its numbers are in `tests/gpu`."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trilithon.lower.native import causal
from trilithon.lower.native.attention import attend


def heads(tokens: int, width: int = 64, counts: tuple[int, int, int] = (4, 2, 2), wide: int = 0) -> tuple[Tensor, ...]:
    """Queries, keys and values that are parts of one row a token."""
    sizes = [n * width for n in counts]
    rows = torch.randn(1, tokens, sum(sizes) + wide, generator=torch.Generator().manual_seed(0)).half()
    return tuple(x.unflatten(-1, (-1, width)).transpose(1, 2) for x in rows.split([*sizes, wide], -1)[:3])


@pytest.mark.parametrize("tokens", [1, 7, 600])
def test_elsewhere_it_is_sdpa(tokens: int) -> None:
    q, k, v = heads(tokens)
    found = causal.attend_causal(q, k, v, 0.125)
    assert torch.equal(found, attend(q, k, v, "causal", 0.125, None))
    torch.library.opcheck(causal.ATTEND_CAUSAL, (q, k, v, 0.125))


def test_what_the_kernel_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "is_for", lambda x: x.dtype != torch.float32)
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


def test_a_kernel_that_goes_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The warning says what is used in its place, and why; the op gives what SDPA gives."""
    monkeypatch.setattr(causal, "is_for", lambda x: True)
    q, k, v = heads(512)
    wrong = {
        "it is off by": lambda q, k, v, scale: attend(q, k, v, "full", scale, None),
        "it is off by nan": lambda q, k, v, scale: q * torch.nan,
        "ZeroDivisionError: division by zero": lambda q, k, v, scale: 1 / 0,
    }
    for why, kernel in wrong.items():
        causal._works.cache_clear()
        monkeypatch.setattr(causal, "attend_by_kernel", kernel)
        assert torch.equal(causal.attend_causal(q, k, v, 0.125), attend(q, k, v, "causal", 0.125, None))
        assert (
            f"causal attention of prompts is PyTorch's, since the kernel of our own cannot be used here: {why}" in caplog.text
        )
        caplog.clear()
    causal._works.cache_clear()
    monkeypatch.setattr(causal, "attend_by_kernel", lambda q, k, v, scale: attend(q, k, v, "causal", scale, None) + 1e-3)
    assert not torch.equal(causal.attend_causal(q, k, v, 0.125), attend(q, k, v, "causal", 0.125, None)), "it is not used"
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    causal._works.cache_clear()


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
    assert len(list(tmp_path.iterdir())) == 2 * len(causal.WIDTHS)
