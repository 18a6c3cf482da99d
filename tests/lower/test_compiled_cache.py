"""What Inductor has compiled in one process is found by the next: nothing of ours in a graph differs from run to run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TESTS = Path(__file__).parent.parent
RUN = "from lower.test_compiled_cache import found; found()"


class Model(nn.Module):
    """One attention over tokens; without transformers, which takes seconds to import."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(16, 8), nn.Linear(8, 24), nn.Linear(8, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        b, s = input_ids.shape
        q, k, v = self.qkv(self.embed(input_ids)).view(b, s, 3, 2, 4).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.head(out.transpose(1, 2).reshape(b, s, 8))
        return result


def found() -> None:
    """Print what Inductor's cache gave to a prompt and a step, and the tokens, as JSON."""
    from torch._dynamo.utils import counters

    import trilithon
    from trilithon import Options

    torch.set_num_threads(1)
    torch.manual_seed(0)
    example = {"input_ids": torch.zeros(2, 8, dtype=torch.int64)}
    options = Options(inductor=True, verify=False)
    compiled = trilithon.compile(Model().eval(), example, max_tokens=32, options=options)
    ids = compiled.generate(torch.ones(1, 5, dtype=torch.int64), max_new_tokens=2)
    kept = {name: count for name, count in counters["inductor"].items() if name.startswith("fxgraph_cache")}
    print(json.dumps({"kept": kept, "ids": ids.tolist()}))


@pytest.mark.timeout(300)
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    def run(seed: str) -> dict[str, object]:
        folders = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "TRILITHON_CACHE": str(tmp_path / "proofs")}
        env = {**os.environ, **folders, "PYTHONHASHSEED": seed}
        ran = subprocess.run([sys.executable, "-c", RUN], env=env, cwd=TESTS, capture_output=True, check=True, text=True)
        made: dict[str, object] = json.loads(ran.stdout.splitlines()[-1])
        return made

    first, second = run("1"), run("2")
    assert first["kept"] == {"fxgraph_cache_miss": 2}, "a prompt and a step"
    assert second == {**first, "kept": {"fxgraph_cache_hit": 2}}
