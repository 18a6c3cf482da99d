"""Lines of batch runs, and the files they stand in."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from trilithon import cli

ROWS, TOKENS = 4, 96
ARGUMENTS = {"max_new_tokens": 12}  # of lines that do not say


def some_lines(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of unlike lengths, as text or as tokens, that ask for unlike numbers of tokens."""
    generator, lines = random.Random(seed), []
    for number in range(count):
        ids = [generator.randrange(97, 123) for _ in range(generator.randint(1, 40))]
        prompt: dict[str, Any] = {"prompt": bytes(ids).decode()} if number % 2 else {"input_ids": ids}
        if number % 3:
            prompt["max_new_tokens"] = generator.choice([2, 5, 30])
        lines.append({"id": f"line {number}"} | prompt)
    return lines


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_id(path: Path) -> dict[Any, dict[str, Any]]:
    """The lines of an output, each of which must be there once."""
    lines = read_lines(path)
    found = {line["id"]: line for line in lines}
    assert len(found) == len(lines), "an id stands there twice"
    return found


def command(artefact: Path, folder: Path, *more: str) -> list[str]:
    words = ["batch", "--model", str(artefact), "--input", str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl")]
    return [*words, "--max-new-tokens", "12", *more]


def run_here(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["trilithon", *words])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return int(exit.value.code or 0)
