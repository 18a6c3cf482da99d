"""How often the token loops wait for the GPU, counted by torch itself."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from runtime.cycle_decoder import CycleDecoder
from trilithon.runtime.generate import generate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def waits(**arguments: Any) -> int:
    """Synchronisations that torch reports in one `generate`."""
    ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1], [3, 4, 0, 1, 2, 3, 4]], device="cuda")
    decoder = CycleDecoder(5, "cuda")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            generate(decoder, ids, **arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in caught)


LOOPS: dict[str, tuple[dict[str, Any], int]] = {  # what 30 more tokens may cost
    "greedy": ({}, 0),
    "sampling": ({"do_sample": True, "top_p": 0.9, "min_p": 0.1, "seed": 0}, 0),
    "penalty": ({"repetition_penalty": 1.0001}, 0),
    "eos": ({"eos_token_id": 70}, 3),
    "drafts": ({"prompt_lookup_num_tokens": 5}, 5),
    "drafts_and_eos": ({"prompt_lookup_num_tokens": 5, "eos_token_id": 70}, 5),
}


@pytest.mark.parametrize("name", LOOPS)
def test_waits_of_a_loop(name: str) -> None:
    arguments, most = LOOPS[name]
    waits(max_new_tokens=3, **arguments)  # the first calls of a kernel load it
    assert waits(max_new_tokens=31, **arguments) - waits(max_new_tokens=1, **arguments) <= most
