"""`trilithon generate` in several processes."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.shares import small
from parallel.together import Together
from trilithon import cli
from trilithon.bench.measure import random_ids
from trilithon.cli import ranks

WORDS = ["--prompt-tokens", "5", "--max-new-tokens", "6", "--device", "cpu", "--no-eos"]
RUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
LAST = 10  # seconds that another rank may live on


def command(folder: str) -> str:
    """What a process that joins the group of the test prints."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(dist.get_rank()))
        patch.setenv("WORLD_SIZE", str(dist.get_world_size()))
        patch.setattr(sys, "argv", ["trilithon", "generate", folder, *WORDS])
        for name in ("_join", "_leave"):
            patch.setattr(ranks, name, lambda: None)  # the group is there
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code
    return out.getvalue()


def test_the_first_rank_alone_prints_the_tokens_of_one_process(tmp_path: Path, pair: Together) -> None:
    model: Any = small("qwen3-0.6b")
    model.save_pretrained(tmp_path)
    ids = random_ids(model, 5)
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)[0, 5:].tolist()
    first, other = pair(command, str(tmp_path))
    assert other == ""
    assert "16 query heads and 8 key/value heads over 2 ranks: each holds 8 and 4" in first
    assert f"[5 random tokens] {' '.join(map(str, tokens))} " in first.splitlines()


@pytest.mark.parametrize("words", [("compile", "llama-3.2-1b"), ("doctor",), ("compile", "generate")])
def test_commands_of_one_process_are_refused(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends(monkeypatch, lambda: None, *words) == [1]
    assert capsys.readouterr().err == (
        "rank 1: trilithon runs in several processes for one command only, generate\n  leave torchrun out\n"
    )


def test_a_number_of_processes_alone_is_not_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("RANK", raising=False)
    assert ranks.ranks() == 1
    with ranks.joined():
        pass


@pytest.mark.parametrize("code", [1, 3])
def test_a_rank_that_fails_waits_for_nobody(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_join", lambda: None)
    assert ends(monkeypatch, lambda: sys.exit(code), "generate") == [code]


def test_ranks_with_gpus_end_together_and_leave_nccl_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda x: done.append(f"wait on the {x.device}"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroy"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))
    monkeypatch.setattr(ranks, "_join", lambda: None)
    assert ends(monkeypatch, lambda: None, "generate") == [0]
    assert done == ["synchronize", "wait on the cpu"]


def ends(monkeypatch: pytest.MonkeyPatch, work: Any, *words: str) -> list[int]:
    """The codes with which a rank that does `work` ends at once."""
    ended = []

    def end(code: int) -> None:
        ended.append(code)
        raise KeyboardInterrupt  # as if the process were gone

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "argv", ["trilithon", *words])
    monkeypatch.setattr(ranks, "_end", end)
    with pytest.raises(KeyboardInterrupt), ranks.joined():
        work()
    return ended


FAILING = """
import os, sys, time
from trilithon import cli
from trilithon.errors import InputError
import torch, torch.distributed as dist

def load(*_, **__):
    if os.environ["RANK"] == "1":
        print("failed at", time.time(), file=sys.stderr)
        raise InputError("the GPU is full", todo="use a smaller model")
    dist.all_reduce(torch.ones(1))  # waits for rank 1

sys.modules["trilithon.cli.generate"].shared = load  # so that nobody imports transformers
sys.argv = ["trilithon", "generate", "llama-3.2-1b"]
cli.main()
"""


def test_torchrun_ends_all_ranks_when_one_fails(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(FAILING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*RUN, str(port), str(script)], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    ended = time.time()
    assert ran.returncode != 0
    assert "rank 1: the GPU is full\n  use a smaller model\n" in ran.stderr
    failed = float(ran.stderr.partition("failed at ")[2].split()[0])
    assert ended - failed < LAST
