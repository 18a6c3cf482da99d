"""Native models that were saved on a GPU, and where they are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import trilithon
from artefacts import manifest_of
from trilithon.lower.native.fused import tune
from trilithon.lower.native.fused.remembered import text_of
from trilithon.lower.native.step import NativeStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("preset", ["llama-3.2-1b", "qwen3-0.6b"])
def test_saved_and_loaded(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens, kernels and settings; none is measured again, though the cache of settings is another."""
    model = trilithon.load_model(preset, device="cuda", layers=2, dtype=torch.float16)
    llm = trilithon.compile(model, max_tokens=256)
    folder = llm.save(tmp_path / "saved")
    gpu = torch.cuda.get_device_name()
    assert manifest_of(folder)["target"] == {"backend": "native", "device": "cuda", "gpu": gpu}
    monkeypatch.setenv("TRILITHON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "_fastest", lambda *args: pytest.fail("a kernel was measured again"))
    again = trilithon.load(folder)
    ids = torch.randint(3, 1000, (1, 40), generator=torch.Generator().manual_seed(0)).cuda()
    assert torch.equal(again.generate(ids, max_new_tokens=32), llm.generate(ids, max_new_tokens=32))
    mine, theirs = again.decoder.modules.decode, llm.decoder.modules.decode
    assert isinstance(mine, NativeStep) and isinstance(theirs, NativeStep)
    assert mine.note == theirs.note and mine.tuned == theirs.tuned == manifest_of(folder)["tuned"][gpu]
    prompts = [x.decoder.modules.prefill.one_row for x in (again, llm)]
    assert text_of(prompts[0]) == text_of(prompts[1]), "another prompt"


def test_from_a_gpu_to_a_cpu_and_back(tmp_path: Path) -> None:
    model = trilithon.load_model("qwen2.5-0.5b", device="cuda", layers=2)
    llm = trilithon.compile(model, max_tokens=64)
    ids = torch.randint(3, 1000, (1, 9), generator=torch.Generator().manual_seed(0))
    want = llm.generate(ids.cuda(), max_new_tokens=8).cpu()
    there = trilithon.load(llm.save(tmp_path / "gpu"), "cpu")
    assert torch.equal(there.generate(ids, max_new_tokens=8), want)
    back = trilithon.load(there.save(tmp_path / "cpu"), "cuda")
    assert torch.equal(back.generate(ids.cuda(), max_new_tokens=8).cpu(), want)
