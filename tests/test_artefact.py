"""Native models on disk: what is loaded is what was saved, or is refused."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count, cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import trilithon
from artefacts import change, file_of, manifest_of, names_of
from models.configs import tiny
from models.test_seq2seq import made, prompts
from trilithon import CannotLower, Compiled, GuardFailed, InputError, Options, TrilithonError, VerificationFailed
from trilithon.artefact import digest, loading, native, saving, weights, writer
from trilithon.artefact.files import check_files, files_of
from trilithon.artefact.inspection import inspect, is_whole
from trilithon.artefact.manifest import FIELDS, FORMAT, MANIFEST, read_manifest
from trilithon.capture import hf
from trilithon.capture.source import source_of
from trilithon.lower import graph_ops
from trilithon.lower.graph_data import from_data
from trilithon.lower.graph_ops import called
from trilithon.lower.native.fused import tune

IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, Compiled]:
    model = tiny("llama-3.2")
    return model, trilithon.compile(model, max_tokens=64, options=Options(max_batch=2))


@pytest.fixture(scope="module")
def saved(llama: tuple[nn.Module, Compiled], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama[1].save(tmp_path_factory.mktemp("artefact") / "saved")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to be broken."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def tokens(llm: Compiled, ids: Tensor = IDS, **arguments: Any) -> Tensor:
    return llm.generate(ids, max_new_tokens=20, pad_token_id=0, **arguments)


# ------------------------------------------------------------ there and back


def test_the_same_tokens(llama: tuple[nn.Module, Compiled], saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of prompts of unequal lengths, of a conversation, with drafts; and nothing is unpickled."""
    (_, llm), never = llama, lambda *args, **options: pytest.fail("it was unpickled")
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, never)
    again = trilithon.load(saved)
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    assert torch.equal(tokens(again, attention_mask=mask), tokens(llm, attention_mask=mask))
    assert len(set(tokens(again)[:, 9:].flatten().tolist())) > 2
    assert torch.equal(tokens(again, IDS[:1], prompt_lookup_num_tokens=5), tokens(llm, IDS[:1]))
    turns = [x.conversation() for x in (again, llm)]
    first = [turn.generate(IDS[:1], max_new_tokens=4) for turn in turns]
    assert torch.equal(*first)
    assert torch.equal(*(turn.generate(IDS[1:, :3], max_new_tokens=4) for turn in turns))
    assert torch.equal(again(IDS), llm(IDS))


def test_another_process_loads_it(llama: tuple[nn.Module, Compiled], saved: Path) -> None:
    """One that has no TensorRT, and in which nothing was compiled; it imports nothing that would take seconds."""
    code = f"""
import sys
sys.modules["tensorrt"] = sys.modules["tensorrt_rtx"] = None
import torch, trilithon
print(trilithon.load({str(saved)!r}).generate(torch.tensor({IDS.tolist()}), max_new_tokens=20, pad_token_id=0).tolist())
assert not {{"torch._dynamo", "sympy", "z3", "transformers"}} & set(sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == tokens(llama[1]).tolist()


def test_what_inductor_compiles(llama: tuple[nn.Module, Compiled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, steps and calls, traced by Dynamo as a whole; their kernels are not made here."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    llm = trilithon.compile(llama[0], max_tokens=64, options=Options(max_batch=2, inductor=True))
    again = trilithon.load(llm.save(tmp_path / "saved"))
    assert torch.equal(tokens(again), tokens(llama[1])) and "compiled by Inductor" in again.decoder.modules.prefill.note
    assert torch.equal(again(IDS), llm(IDS))


def test_guards_are_checked_and_the_general_program_runs(llama: tuple[nn.Module, Compiled], saved: Path) -> None:
    model, _ = llama
    again, positions = trilithon.load(saved), torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]]).expand(2, -1)
    with torch.no_grad():
        want = model(input_ids=IDS, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(again(IDS, position_ids=positions), want, rtol=1e-4, atol=1e-4)
    assert again.guard_failures == 1
    assert again.report.guards and again.report.guards == llama[1].report.guards


def test_without_a_general_program(llama: tuple[nn.Module, Compiled], tmp_path: Path) -> None:
    llm = trilithon.compile(llama[0], max_tokens=16, options=Options(when_guard_fails="raise"))
    folder = llm.save(tmp_path / "saved")
    assert not any(name.startswith("general") for name in names_of(folder))
    with pytest.raises(GuardFailed):
        trilithon.load(folder)(IDS, position_ids=torch.zeros_like(IDS))


def test_what_is_saved(llama: tuple[nn.Module, Compiled], saved: Path) -> None:
    call, general = (f"{kind}-input_ids-position_ids.json" for kind in ("call", "general"))
    programs = {"prefill.json", "decode.json", "extend.json", call, general}
    assert names_of(saved) == {*programs, "weights.safetensors", "canaries.safetensors"}
    weights = load_file(file_of(saved, "weights.safetensors"))
    own = {p.data_ptr(): p.nbytes for p in llama[0].parameters()}
    assert sum(x.nbytes for x in weights.values() if x.is_floating_point()) < sum(own.values()) + 5000  # each once
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1
    data = manifest_of(saved)
    assert {"python", "trilithon", "torch", "transformers", "z3-solver", "safetensors", "triton"} <= data["versions"].keys()
    assert data["target"] == {"backend": "native", "device": "cpu", "gpu": None}
    assert data["model"]["kind"] == "module" and data["model"]["config"]["num_hidden_layers"] == 2
    for site, proof in zip(llama[1].report.sites, data["proofs"], strict=True):
        assert proof["mask"] == "causal" and proof["formula"] == site.formula and site.formula
        assert proof["assumptions"][0]["text"] == "each row of position_ids is consecutive"
        assert (proof["assumptions"][0]["source"], proof["alternatives"][0]["mask"]) == (
            "guard",
            "causal & documents(position_ids)",
        )
    assert "/" not in json.dumps({**data, "proofs": 0, "report": 0, "model": 0})  # no place of this machine


def test_the_report_says_how_it_was_verified(llama: tuple[nn.Module, Compiled], saved: Path) -> None:
    report = trilithon.load(saved).report
    said = report.notes[-1]
    assert said.startswith("loaded: its programs were verified against eager when they were compiled (trilithon ")
    assert f"torch {torch.__version__}" in said and "; their relative error here is " in said
    assert report.notes[:-1] == llama[1].report.notes
    assert [site.to_dict() for site in report.sites] == [site.to_dict() for site in llama[1].report.sites]


def test_changed_weights_are_not_saved(tmp_path: Path) -> None:
    """A load would refuse them. A conversation goes on after a save as if there had been none."""
    model = tiny("llama-3.2")
    llm = trilithon.compile(model, max_tokens=64, options=Options(max_batch=2))
    other, turn = llm.conversation(), llm.conversation()
    want = [other.generate(ids, max_new_tokens=4) for ids in (IDS[:1], IDS[1:, :3])][1]
    turn.generate(IDS[:1], max_new_tokens=4)
    llm.save(tmp_path / "saved")
    assert torch.equal(turn.generate(IDS[1:, :3], max_new_tokens=4), want)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(-1)
    with pytest.raises(VerificationFailed, match="if its weights were changed since, compile it again"):
        llm.save(tmp_path / "changed")
    assert not (tmp_path / "changed").exists()


def test_what_was_not_verified_says_so(llama: tuple[nn.Module, Compiled], tmp_path: Path) -> None:
    llm = trilithon.compile(llama[0], max_tokens=16, options=Options(verify=False))
    again = trilithon.load(llm.save(tmp_path))
    assert again.report.notes[-1].startswith("loaded: its programs were not verified when they were compiled")
    assert inspect(tmp_path)["verified"] == {"call-input_ids-position_ids": None, "decoder": None}


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_a_ring_and_a_cache_of_8_bits(cache_dtype: Any, tmp_path: Path) -> None:
    llm = trilithon.compile(tiny("mistral"), max_tokens=64, options=Options(max_batch=2, cache_dtype=cache_dtype))
    again = trilithon.load(llm.save(tmp_path))
    assert torch.equal(tokens(again), tokens(llm)) and again.decoder.shapes == llm.decoder.shapes


def test_an_encoder_decoder(tmp_path: Path) -> None:
    (_, llm), (ids, mask) = made("t5"), prompts()
    again = trilithon.load(llm.save(tmp_path))
    arguments = {"attention_mask": mask, "max_new_tokens": 10}
    assert torch.equal(again.generate(ids, **arguments), llm.generate(ids, **arguments))
    with pytest.raises(InputError, match="holds no conversation"):
        again.conversation()


class Plain(nn.Module):
    """A user's own, without a cache."""

    def __init__(self, odd: bool = False) -> None:
        super().__init__()
        self.linear, self.odd = nn.Linear(8, 8), odd
        self.register_buffer("twice", self.linear.weight.detach()[:4])  # a part of the same memory

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)[:, None]
        y = nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True)[:, 0]
        return torch.special.bessel_j0(y) if self.odd else y @ self.twice.T  # type: ignore[operator]


def test_a_module_without_a_cache(tmp_path: Path) -> None:
    model, x = Plain().eval(), torch.randn(2, 5, 8)
    again = trilithon.load(trilithon.compile(model, {"x": x}).save(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(again(x=x), model(x))
    with pytest.raises(TrilithonError):
        again.generate(torch.ones(1, 3, dtype=torch.int64))


def test_what_no_file_can_hold(tmp_path: Path) -> None:
    """Nothing is written then."""
    llm = trilithon.compile(Plain(odd=True).eval(), {"x": torch.randn(2, 5, 8)})
    with pytest.raises(CannotLower, match=r"special_bessel_j0.* is not in the table"):
        llm.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_where_a_model_came_from(tmp_path: Path) -> None:
    model = trilithon.load_model("gpt2", layers=1, device="meta")
    found = source_of(model)
    assert (found["kind"], found["id"], found["revision"]) == ("preset", "gpt2", "random weights, seed 0")
    model = tiny("gpt2")
    model.save_pretrained(tmp_path / "mine")  # type: ignore[operator]
    found = source_of(trilithon.load_model(str(tmp_path / "mine")))
    assert (found["kind"], found["id"]) == ("folder", "mine") and found["class"].endswith("GPT2LMHeadModel")
    model.config._name_or_path, model.config._commit_hash = "org/name", "0123abc"  # type: ignore[union-attr, assignment]
    found = source_of(model)
    assert (found["kind"], found["id"], found["revision"]) == ("hub", "org/name", "0123abc")
    assert source_of(Plain()) == {
        "kind": "module",
        "id": None,
        "revision": None,
        "class": f"{__name__}.Plain",
        "config": None,
    }


def test_tuned_settings_go_along(saved: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this device are kept for its kernels, those of another for when it is saved again."""
    here, there = {"0" * 24 + "-00000000": {"rows": 4}}, {"1" * 24 + "-00000000": {"rows": 8}}
    change(folder, lambda data: data["tuned"].update(cpu=here, other=there))
    again = trilithon.load(folder)
    assert json.loads((tune.kernel_folder() / f"{'0' * 24}-00000000.json").read_text()) == {"rows": 4}
    assert not (tune.kernel_folder() / f"{'1' * 24}-00000000.json").exists()
    assert manifest_of(again.save(folder))["tuned"] == {"cpu": here, "other": there}
    for wrong in ({"../x": {"rows": 1}}, {"0" * 24 + "-00000000": {"rows": "os"}}, {"0" * 24 + "-00000000": []}):
        change(folder, lambda data, wrong=wrong: data["tuned"].update(cpu=wrong))
        with pytest.raises(InputError, match="cannot read"):
            trilithon.load(folder)


# ------------------------------------------------------------ saved over, and interrupted


def test_saved_over_while_it_is_used(llama: tuple[nn.Module, Compiled], folder: Path) -> None:
    """Weights are mapped from files that are gone; a third process reads what is there now."""
    again, other = trilithon.load(folder), trilithon.compile(tiny("qwen3"), max_tokens=32)
    want = tokens(again)
    kept = {path.name for path in folder.iterdir()}
    assert {path.name for path in again.save(folder).iterdir()} == kept  # the same contents, the same names
    assert torch.equal(tokens(trilithon.load(folder)), want)
    other.save(folder)
    assert "weights.safetensors" in names_of(folder)  # and nothing of the old one
    assert torch.equal(tokens(again), want)
    assert torch.equal(tokens(trilithon.load(folder), IDS[:1]), tokens(other, IDS[:1]))
    again.save(folder)
    assert torch.equal(tokens(trilithon.load(folder)), want)


def whole(folder: Path) -> str:
    """The digest of what a reader finds, every file of which is as it was written."""
    manifest = read_manifest(folder)
    check_files(files_of(folder, manifest), hashes=True)
    return str(manifest["files"]["weights.safetensors"]["sha256"])


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_save_leaves_the_old_one(
    error: type[BaseException], llama: tuple[nn.Module, Compiled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is interrupted; and where nothing was, nothing is."""
    other = trilithon.compile(Plain().eval(), {"x": torch.randn(2, 5, 8)})
    other.save(tmp_path / "saved")
    before, names = whole(tmp_path / "saved"), names_of(tmp_path / "saved")
    for name in ("replace", "fsync"):
        for stop in count():
            calls, real = count(), getattr(os, name)

            def breaks(*args: Any, stop: int = stop, calls: Any = calls, real: Any = real) -> Any:
                if next(calls) == stop:
                    raise error("no space left")
                return real(*args)

            monkeypatch.setattr(os, name, breaks)
            try:
                llama[1].save(tmp_path / "saved")
            except error:
                monkeypatch.undo()
                at_the_end = whole(tmp_path / "saved") != before  # the manifest stands; its folder was not synchronised
                assert not at_the_end or name == "fsync"
                if not at_the_end:
                    assert names_of(tmp_path / "saved") == names
                    continue
            monkeypatch.undo()
            assert stop > 5 and whole(tmp_path / "saved") != before
            other.save(tmp_path / "saved")
            assert names_of(tmp_path / "saved") == names
            break
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(error("no space left")))
    with pytest.raises(error):
        llama[1].save(tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()


def test_at_any_moment_a_reader_finds_one_of_both(
    llama: tuple[nn.Module, Compiled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that looks when the process was ended at once, without a chance to clean up."""
    folder = trilithon.compile(Plain().eval(), {"x": torch.randn(2, 5, 8)}).save(tmp_path / "saved")
    seen = [whole(folder)]

    def looking(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            seen.append(whole(folder))
            result = real(*args)
            seen.append(whole(folder))
            return result

        return call

    monkeypatch.setattr(os, "replace", looking(os.replace))
    monkeypatch.setattr(writer, "remove_file", looking(writer.remove_file))
    llama[1].save(folder)
    assert len(dict.fromkeys(seen)) == 2 and seen.index(seen[-1]) > 8
    assert seen == sorted(seen, key=[seen[0], seen[-1]].index)  # never back


def test_what_an_ended_process_left_is_removed(folder: Path) -> None:
    left = [folder / f"weights-{'0' * 16}.safetensors", folder / ".new-1-weights.safetensors"]
    for path in (*left, folder / "notes.txt"):
        path.write_text("x")
    assert inspect(folder)["other_files"] == sorted(path.name for path in (*left, folder / "notes.txt"))
    trilithon.load(folder).save(folder)
    assert not any(path.exists() for path in left) and (folder / "notes.txt").exists()


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 2000, 5003])
@pytest.mark.parametrize("piece", [1, 7, 1000, 2500])
@pytest.mark.parametrize("able", [True, False], ids=["side by side", "one behind the other"])
def test_a_file_is_hashed_in_blocks(size: int, piece: int, able: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "BLOCK", 1000)
    monkeypatch.setattr(digest, "READ", 64)
    if not able:
        monkeypatch.delattr(os, "preadv")
    content = bytes((7 * i + i // 256) % 256 for i in range(size))
    written = digest.Digest()
    for start in range(0, size, piece):
        written.update(memoryview(content)[start : start + piece])
    blocks = [hashlib.sha256(content[start : start + 1000]) for start in range(0, max(size, 1), 1000)]
    together = hashlib.sha256(b"".join(x.digest() for x in blocks))
    path = tmp_path / "x"
    path.write_bytes(content)
    with path.open("rb", buffering=0) as file:
        want = (together if len(blocks) > 1 else blocks[0]).hexdigest()
        assert digest.digest_of(file, size) == written.hexdigest() == want


def test_damage_in_any_block_is_found(
    llama: tuple[nn.Module, Compiled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "BLOCK", 1 << 12)
    folder = llama[1].save(tmp_path / "saved")
    path = file_of(folder, "weights.safetensors")
    content = path.read_bytes()
    assert len(content) > 4 << 12 and whole(folder)
    for place in (0, 1 << 12, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(InputError, match="is damaged"):
            trilithon.load(folder)
    path.write_bytes(content[1 << 12 : 2 << 12] + content[: 1 << 12] + content[2 << 12 :])  # blocks in another order
    with pytest.raises(InputError, match="is damaged"):
        trilithon.load(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(0, 3), (), (1,), (16,), (5, 7, 3)])
def test_weights_go_to_a_gpu_in_blocks(dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their bytes, whatever part of a number a block ends in; here without memory that is pinned."""
    pieces: list[int] = []
    monkeypatch.setattr(weights, "PINNED", 13)
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: pieces.append(x.numel()) or x.clone())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    made = weights._to_gpu(x, torch.device("cpu"))
    assert torch.equal(made, x) and made.dtype == dtype
    assert made.shape == x.shape and sum(pieces) == x.nbytes and max(pieces) <= 13


def test_two_writers(llama: tuple[nn.Module, Compiled], folder: Path) -> None:
    with writer.writing(folder), pytest.raises(InputError, match="is saving into it"):
        llama[1].save(folder)
    assert whole(folder)


def test_a_folder_that_cannot_be_written(llama: tuple[nn.Module, Compiled], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot save into"):
        llama[1].save(tmp_path / "file")


def test_a_reader_that_is_overtaken(saved: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between manifest and files another model is saved: the reader takes that."""
    other, real, done = trilithon.compile(tiny("qwen3"), max_tokens=32), loading.check_files, []

    def late(files: Any, hashes: bool) -> None:
        if not done:
            done.append(other.save(folder))
        real(files, hashes)

    monkeypatch.setattr(loading, "check_files", late)
    assert torch.equal(tokens(trilithon.load(folder), IDS[:1]), tokens(other, IDS[:1]))


# ------------------------------------------------------------ damaged and tampered with


@pytest.fixture
def unused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where anything is read, made or lowered of what was saved."""
    monkeypatch.setattr(loading._Reader, "__post_init__", lambda self: pytest.fail("it was used"))
    for module, name in ((loading, "decode"), (loading.weights, "read"), (native, "read_blueprint"), (loading, "keep")):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail("it was used"))


def flipped(data: bytes, strides: int) -> Iterator[bytes]:
    """Each with one bit changed: all of the beginning and the end, and in strides of the middle."""
    places = {*range(12), *range(len(data) - 8, len(data)), *range(0, len(data), max(1, len(data) // strides))}
    for place in sorted(place for place in places if 0 <= place < len(data)):
        yield data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :]


@pytest.mark.usefixtures("unused")
def test_each_region_of_each_file(folder: Path) -> None:
    for name in names_of(folder):
        path = file_of(folder, name)
        data = path.read_bytes()
        cut = [data[:n] for n in (0, 1, 8, len(data) // 2, len(data) - 1)]
        for changed in (*flipped(data, 16), *cut, data + b"\0", data[::-1]):
            path.write_bytes(changed)
            with pytest.raises(InputError, match="is damaged or was changed") as raised:
                trilithon.load(folder)
            assert str(path) in str(raised.value) and "Copy it again" in str(raised.value)
        assert not is_whole(inspect(folder))
        path.unlink()
        with pytest.raises(InputError, match=f"{path.name} is missing"):
            trilithon.load(folder)
        path.write_bytes(data)


@pytest.mark.usefixtures("unused")
def test_each_region_of_the_manifest(folder: Path) -> None:
    path = folder / MANIFEST
    data = path.read_bytes()
    for changed in (*flipped(data, 1500), *(data[:n] for n in (0, 1, len(data) // 2, len(data) - 1)), data + b" ", b"[" * 9999):
        path.write_bytes(changed)
        with pytest.raises(InputError):
            trilithon.load(folder)


OTHERS: tuple[Any, ...] = (None, True, 7, 1.5, "x", [], {})


@pytest.mark.usefixtures("unused")
@pytest.mark.parametrize("name", [name for name in FIELDS if name != "digest"])
def test_each_field_of_the_manifest(name: str, folder: Path) -> None:
    """Of another type, missing, or not what the digest says."""
    data = manifest_of(folder)
    for other in OTHERS:
        if type(other) is FIELDS[name]:
            continue
        change(folder, lambda data, other=other: data.update({name: other}))
        with pytest.raises(InputError):
            trilithon.load(folder)
    change(folder, lambda data: data.pop(name))
    with pytest.raises(InputError):
        trilithon.load(folder)
    (folder / MANIFEST).write_text(json.dumps(data | {name: OTHERS}, indent=1))
    with pytest.raises(InputError):
        trilithon.load(folder)


def test_any_value_of_the_manifest(folder: Path) -> None:
    """Changed with a digest that belongs to it: refused in words, or of no effect; never an error of another kind."""
    data, places = manifest_of(folder), list[tuple[Any, ...]]()

    def walk(value: Any, place: tuple[Any, ...]) -> None:
        places.append(place)
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            walk(value[key], (*place, key))

    for name in set(data) - {"report", "proofs", "model", "digest"}:  # these are read, not run
        walk(data[name], (name,))
    refused = 0
    text, tried = (folder / MANIFEST).read_text(), sorted(places, key=str)[::3]
    for (*outer, last), other in zip(tried, cycle(OTHERS), strict=False):

        def put(data: Any, outer: Any = outer, last: Any = last, other: Any = other) -> None:
            for key in outer:
                data = data[key]
            data[last] = other

        (folder / MANIFEST).write_text(text)
        change(folder, put)
        try:
            trilithon.load(folder, verify=False)
        except TrilithonError:
            refused += 1
    assert len(tried) > 50 and refused > len(tried) / 2


@pytest.mark.usefixtures("unused")
@pytest.mark.parametrize(
    "file",
    ["../secret", "/etc/hostname", "a/b/c", "a/../../secret", "..", ".", "", "a\\..\\b", "C:secret", "a\0b", ".hidden", 7],
)
def test_a_path_out_of_the_folder(file: Any, folder: Path) -> None:
    (folder.parent / "secret").write_bytes(file_of(folder, "weights.safetensors").read_bytes())
    change(folder, lambda data: data["files"]["weights.safetensors"].update(file=file))
    with pytest.raises(InputError, match="no name of a file of this folder"):
        trilithon.load(folder)


@pytest.mark.usefixtures("unused")
def test_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    path = file_of(folder, "weights.safetensors")
    outside = path.rename(tmp_path / "outside")
    path.symlink_to(outside)
    with pytest.raises(InputError, match="it is a link or no regular file"):
        trilithon.load(folder)
    path.unlink()
    os.mkfifo(path)  # it is not waited for
    with pytest.raises(InputError, match="it is a link or no regular file"):
        trilithon.load(folder)
    path.unlink()
    inner = tmp_path / "inner"
    inner.mkdir()
    outside.rename(inner / "w")
    (folder / "tokenizer-0").symlink_to(inner)
    change(folder, lambda data: data["files"]["weights.safetensors"].update(file="tokenizer-0/w"))
    with pytest.raises(InputError, match="it is a link or no regular file"):
        trilithon.load(folder)
    manifest = (folder / MANIFEST).rename(tmp_path / MANIFEST)
    (folder / MANIFEST).symlink_to(manifest)
    with pytest.raises(InputError, match="holds no compiled model"):
        trilithon.load(folder)


def test_another_format(folder: Path) -> None:
    for other in (4, FORMAT + 1):
        change(folder, lambda data, other=other: data.update(format=other))
        with pytest.raises(InputError, match=f"its format is {other}, this version reads {FORMAT}"):
            trilithon.load(folder)
    (folder / MANIFEST).write_text('{"format": 4}')
    with pytest.raises(InputError, match="compile the model again with this version"):
        inspect(folder)


def test_another_version_is_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(folder, lambda data: data["versions"].update(torch="1.0.0", transformers="1.0"))
    trilithon.load(folder)
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        f"the model was compiled with torch 1.0.0, and this is {torch.__version__}"
    ]


def rewrite_file(folder: Path, name: str, act: Callable[[Path], None]) -> None:
    """Change a file, and give the manifest the hash that belongs to it."""
    path = file_of(folder, name)
    act(path)
    with path.open("rb", buffering=0) as file:
        found = digest.digest_of(file, path.stat().st_size)
    change(folder, lambda data: data["files"][name].update(bytes=path.stat().st_size, sha256=found))


def test_other_weights_are_found_by_the_canary(folder: Path) -> None:
    """Hashes that agree say only that files are as they were written."""

    def swap(path: Path) -> None:
        held = load_file(path)
        name = next(name for name, x in held.items() if x.dim() == 2)
        save_file({**held, name: held[name].flip(0).contiguous()}, path)

    rewrite_file(folder, "weights.safetensors", swap)
    with pytest.raises(VerificationFailed, match="does not give what eager gave when it was compiled"):
        trilithon.load(folder)
    trilithon.load(folder, verify=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here(folder: Path) -> None:
    change(folder, lambda data: data["target"].update(device="cuda", gpu="NVIDIA H100"))
    with pytest.raises(InputError, match="torch sees no GPU here") as raised:
        trilithon.load(folder)
    assert "device='cpu'" in str(raised.value)
    assert tokens(trilithon.load(folder, "cpu")).shape == (2, 29)


# ------------------------------------------------------------ what a graph may hold

X = ["placeholder", "x", "x", [], {"dict": {}}]
END = ["output", "output", "output", [{"#": 1}], {"dict": {}}]


def graph_with(*node: Any) -> list[Any]:
    return [X, list(node), END]


def test_a_graph_runs() -> None:
    gm = from_data(graph_with("call_function", "y", "aten.add.Tensor", [{"#": 0}, 2], {"dict": {}}), {}, CPU)
    assert gm(torch.tensor(3)) == 5


def test_the_operations_of_transformers_are_made_known_when_one_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that needs none does not wait for them."""
    asked = list[str]()
    monkeypatch.setattr(hf, "register_operations", lambda: asked.append("transformers"))
    called("aten.neg.default")
    assert not asked
    with suppress(ValueError):  # a transformers that has none
        called(graph_ops.TRANSFORMERS)
    assert asked == ["transformers"]


@pytest.mark.parametrize(
    "name",
    [
        "aten.from_file.default",
        "aten.add_.Tensor",
        "aten.add.out",
        "aten.set_.source_Tensor",
        "aten.as_strided.default",
        "aten.add",
        "aten.add.__class__",
        "operator.attrgetter",
        "operator.methodcaller",
        "builtins.eval",
        "os.system",
        "torch.load",
        "torch.sym_max.__globals__",
        "trilithon._put",
        "trilithon.attention",
        "trilithon.holds.default",
        "",
        "aten",
    ],
)
def test_what_is_not_in_the_table(name: str) -> None:
    with pytest.raises(ValueError, match="is no operation that a saved graph may call"):
        called(name)
    with pytest.raises(ValueError, match="is no operation that a saved graph may call"):
        from_data(graph_with("call_function", "y", name, [{"#": 0}, 2], {"dict": {}}), {}, CPU)


@pytest.mark.parametrize(
    "node",
    [
        ("call_function", "y", "aten.neg.default", [{"#": 1}], {"dict": {}}),
        ("call_function", "y", "aten.neg.default", [{"#": -1}], {"dict": {}}),
        ("call_function", "y\nimport os", "aten.neg.default", [{"#": 0}], {"dict": {}}),
        ("call_function", "y", "aten.neg.default", [{"#": 0}], {"dict": {"a=b()": 1}}),
        ("call_function", "y", "aten.neg.default", [{"#": 0}], [1]),
        ("call_method", "y", "numpy", [{"#": 0}], {"dict": {}}),
        ("call_module", "y", "x", [{"#": 0}], {"dict": {}}),
        ("get_attr", "y", "__class__", [], {"dict": {}}),
        ("placeholder", "y", "y=b()", [], {"dict": {}}),
        ("call_function", "y", "aten.neg.default", [{"code": "1"}], {"dict": {}}),
        ("call_function", "y", "aten.neg.default", [{"dtype": "torch.load"}], {"dict": {}}),
        ("call_function", "y", "aten.neg.default", [{"#": 0}], {"dict": {}}, ["torch.float32", [{}]]),
        ("call_function", "y"),
    ],
)
def test_what_no_graph_may_hold(node: tuple[Any, ...]) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, IndexError, AttributeError)):
        from_data(graph_with(*node), {}, CPU)


def test_texts_in_a_graph_are_texts() -> None:
    """A graph's code is made of what it holds."""
    text = "none'); import os; ('"
    gm = from_data(graph_with("call_function", "y", "aten.gelu.default", [{"#": 0}], {"dict": {"approximate": text}}), {}, CPU)
    with pytest.raises(RuntimeError, match="approximate argument must be"):
        gm(torch.ones(2))


def test_saving_keeps_no_code(saved: Path) -> None:
    assert saving.WEIGHTS in manifest_of(saved)["files"]
    for path in saved.iterdir():
        head = path.read_bytes()[:2]
        assert head != b"PK" and head[:1] != b"\x80"  # neither a zip file nor a pickle
