"""A compiled model on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

import trilithon
from batch_runs.lines import ROWS, TOKENS
from runtime.tiny_llama import tiny_llama
from trilithon import Compiled, Options


@pytest.fixture(scope="session")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two narrow layers over bytes that stops now and then, with random weights, and a tokenizer."""
    model = tiny_llama(vocab_size=259, max_position_embeddings=TOKENS, eos_token_id=257, pad_token_id=258)
    llm = trilithon.compile(model, max_tokens=TOKENS, backend="native", options=Options(max_batch=ROWS))
    return llm.save(tmp_path_factory.mktemp("model") / "artefact", trilithon.load_tokenizer("byte-llama"))


@pytest.fixture(scope="session")
def llm(artefact: Path) -> Compiled:
    return trilithon.load(artefact)
