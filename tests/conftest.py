"""Shared test set-up."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; Triton reads it once, when torch imports it

# Inductor asks what vectors the compiler knows by building five libraries in each new cache folder; g++ 12 knows all of them.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import torch
import torch._dynamo.config

sys.path.insert(0, str(Path(__file__).parent))  # the table of masks is shared by several folders

from exports import shared
from trilithon.capture import export

torch.set_num_threads(1)  # tiny models: threads cost more than they bring
torch._dynamo.config.fake_tensor_cache_enabled = False  # tiny models: keeping costs more than it saves


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look through it again and again, and looks less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def shared_exports() -> Iterator[None]:
    """A Hugging Face model is exported once a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_first_route", shared(export._first_route))
        yield


@pytest.fixture(scope="session", autouse=True)
def proof_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Path]]:
    """Folders for cached proofs, far from the user's own. Fixtures of the whole session share the first."""
    folder = tmp_path_factory.mktemp("proofs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRILITHON_CACHE", str(folder / "session"))
        yield (folder / str(n) for n in count())


@pytest.fixture(autouse=True)
def proof_folder(proof_folders: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this test's proofs: no test reads what another has proved."""
    folder = next(proof_folders)
    monkeypatch.setenv("TRILITHON_CACHE", str(folder))
    return folder
