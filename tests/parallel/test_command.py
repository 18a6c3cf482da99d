"""`trilithon generate` in several processes."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

from parallel.together import together
from trilithon import cli
from trilithon.capture import hf
from trilithon.cli import ranks

WORDS = ["--prompt-tokens", "5", "--max-new-tokens", "6", "--device", "cpu", "--no-eos"]
RUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 300, "head_dim": 16}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3)
    hf.from_config(config).save_pretrained(path)
    return path


def command(folder: str) -> str:
    """What a process that joins the group of the test prints."""
    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    out = io.StringIO()
    sys.argv = ["trilithon", "generate", folder, *WORDS]
    patch: Any = ranks
    patch._join = patch._leave = lambda: None  # the group is there
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    return out.getvalue()


def test_the_first_rank_alone_prints_the_tokens_of_one_process(folder, tmp_path, monkeypatch, capsys):
    first, other = together(2, tmp_path, command, str(folder))
    assert other == ""
    assert "2 query heads and 2 key/value heads over 2 ranks: each holds 1 and 1" in first
    monkeypatch.setattr(sys, "argv", ["trilithon", "generate", str(folder), *WORDS])
    with pytest.raises(SystemExit):
        cli.main()
    alone = capsys.readouterr().out
    tokens = next(line for line in alone.splitlines() if line.startswith("[5 random tokens]"))
    assert tokens in first.splitlines()
    assert len(tokens.split()) > 6 and torch.cuda.device_count() == 0


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    run = [*RUN, str(port), "-m", "trilithon", *words]
    return subprocess.run(run, env=environment, capture_output=True, text=True, timeout=100, check=False)


def test_torchrun_ends_where_a_command_is_not_for_several_processes():
    ran = torchrun("compile", "llama-3.2-1b")
    assert ran.returncode != 0
    assert "trilithon runs in several processes for one command only, generate" in ran.stderr


@pytest.mark.parametrize("code", [1, 3])
def test_a_rank_that_fails_waits_for_nobody(code, monkeypatch):
    ended = []

    def end(code: int) -> None:
        ended.append(code)
        raise KeyboardInterrupt  # as if the process were gone

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(ranks, "_join", lambda: None)
    monkeypatch.setattr(ranks, "_end", end)
    with pytest.raises(KeyboardInterrupt), ranks.joined():
        sys.exit(code)
    assert ended == [code]
