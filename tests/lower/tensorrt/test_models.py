"""Whole models on TensorRT: built for a GPU that is not here, and their networks interpreted against eager."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trilithon
from artefacts import change, file_of, manifest_of, names_of
from models.configs import tiny
from trilithon import CannotLower, Compiled, InputError, Options, VerificationFailed
from trilithon.artefact import loading
from trilithon.lower.tensorrt import attention
from trilithon.lower.tensorrt.converters import reduce
from trilithon.lower.tensorrt.converters.registry import CONVERTERS
from trilithon.lower.tensorrt.module import Split, TensorRTModule
from trilithon.lower.tensorrt.network import Network
from trilithon.runtime.program import lowered
from trilithon.runtime.verify import relative_error
from zoo.families import FAMILIES
from zoo.modes import call_of

SM80 = Options(gpu="sm80")


def compiled(model: nn.Module, *arguments: Any, options: Options = SM80, **settings: Any) -> Compiled:
    return trilithon.compile(model, *arguments, backend="tensorrt", options=options, **settings)


@pytest.mark.parametrize(("name", "layers"), [("qwen2.5", 1), ("qwen3", 1), ("llama-3.2", 2), ("mistral", 1)])
def test_tokens_equal_eager(name: str, layers: int) -> None:
    """The rows are of unequal length; mistral's run past its window of 6."""
    model = tiny(name, layers=layers)
    llm = compiled(model, max_tokens=32, options=Options(gpu="sm80", max_batch=2))
    modules = llm.decoder.modules
    assert isinstance(modules.prefill, TensorRTModule) and isinstance(modules.decode, TensorRTModule)  # nothing in PyTorch
    assert modules.extend is None  # it would hold the weights once more
    assert llm.decoder.first_tokens is None  # engines are built for one size
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    want = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0)
    got = llm.generate(ids, attention_mask=mask, max_new_tokens=10, pad_token_id=0)
    assert torch.equal(got, want)
    assert len(set(got[:, 12:].flatten().tolist())) > 2


def test_a_step_names_the_best_token(llm: Compiled) -> None:
    decoder, seen = llm.decoder, []
    decoder.prefill(torch.tensor([[5, 9, 2]]), torch.tensor([0]))
    for token in (7, 11, 200, 31):
        logits = decoder.decode(torch.tensor([token]))
        assert decoder.best.dtype == torch.int64 and torch.equal(decoder.best, logits.argmax(-1))
        seen += decoder.best.tolist()
    assert len(set(seen)) > 1
    engine: Any = decoder.modules.decode
    outputs = [name for name in engine.engine.outputs if not name.startswith("cache")]
    assert outputs == ["output_0", "output_1"]


def test_of_equal_logits_the_first_is_best() -> None:
    model = tiny("llama-3.2", layers=1)
    model.lm_head = nn.Linear(64, 300, bias=False)  # type: ignore[assignment]
    model.lm_head.weight.data.zero_()  # type: ignore[operator, union-attr]
    decoder = compiled(model, max_tokens=16).decoder
    decoder.prefill(torch.tensor([[5, 9, 2]]), torch.tensor([0]))
    decoder.decode(torch.tensor([7]))
    assert decoder.best.tolist() == [0]


def test_a_wrong_best_token_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def least(net: Network, self: Any, dim: int, keepdim: bool) -> Any:
        return reduce._place_or_flat(net, "MIN", self, dim, keepdim)

    monkeypatch.setitem(CONVERTERS, torch.ops.aten.argmax.default, least)
    with pytest.raises(VerificationFailed, match="names a token that is not the best"):
        compiled(tiny("llama-3.2", layers=1), max_tokens=32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_halves_are_as_exact_as_eager(dtype: torch.dtype) -> None:
    exact = tiny("qwen2.5", layers=1).double()
    ids = torch.randint(3, 300, (1, 21), generator=torch.Generator().manual_seed(2))
    half = tiny("qwen2.5", layers=1)
    half.load_state_dict(exact.state_dict())
    half.to(dtype)
    llm = compiled(half, max_tokens=32)
    with torch.no_grad():
        reference, eager = exact(input_ids=ids).logits, half(input_ids=ids).logits
    assert relative_error(llm(ids), reference) <= 2 * relative_error(eager, reference)
    fast: Any = llm.program.fast
    assert {site.form for site in fast.module.engine.sites} == {"fused"}


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "bert", "vit", "t5"])
def test_model_needs_no_pytorch(name: str) -> None:
    family = FAMILIES[name]
    mode = {"vit": "pixels", "gpt2": "ids+positions", "gemma3": "ids+positions"}.get(name, "ids+padding")
    model, example, shapes = call_of(family, family.make("sdpa"), mode)
    llm = compiled(model, example, dynamic_shapes=shapes, max_tokens=64, options=Options(gpu="sm80", max_batch=4))
    given = {name: example[name] for name in llm.program.inputs}
    general: Any = llm.program.general
    with torch.no_grad():
        got, want = (torch.utils._pytree.tree_leaves(x) for x in (llm(**given), general(*given.values())))
    assert isinstance(lowered(llm.program.fast), TensorRTModule)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


class HasAnOddOne(nn.Module):
    """Two layers, and between them what TensorRT lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        y = self.first(x).view(b, s, 4, 4).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True)
        y = torch.special.bessel_j0(y).transpose(1, 2).reshape(b, s, 16)
        result: Tensor = self.second(y)
        return result


def test_what_tensorrt_lacks_stays_in_pytorch() -> None:
    model, x = HasAnOddOne().eval(), torch.randn(2, 7, 16)
    split = compiled(model, {"x": x}, max_tokens=32, options=Options(gpu="sm80", max_batch=4))
    fast = split.program.fast
    assert isinstance(fast, Split)
    assert len(fast.engines) == 2
    assert any("special_bessel_j0" in note and "has no converter" in note for note in split.report.notes)
    x = torch.randn(3, 9, 16)
    with torch.no_grad():
        torch.testing.assert_close(split(x=x), model(x))
    with pytest.raises(CannotLower, match="stays in PyTorch"):
        split.save("nowhere")


def test_a_wrong_engine_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither form is right here, so the error names the first attention whose result is wrong."""
    right = attention._primitives

    def wrong(net: Network, site: attention.Attention) -> Any:
        result = right(net, site)
        return net.elementwise("PROD", result, net.number(2.0, torch.float32)) if "layers.1" in site.name else result

    monkeypatch.setattr(attention, "_primitives", wrong)
    with pytest.raises(VerificationFailed, match=r"the first attention that differs is model\.layers\.1\.self_attn"):
        compiled(tiny("llama-3.2"), max_tokens=32)


@pytest.fixture(scope="module")
def llm() -> Compiled:
    return compiled(tiny("llama-3.2"), max_tokens=32)


def test_saved_and_loaded(llm: Compiled, tmp_path: Path) -> None:
    folder = llm.save(tmp_path / "saved")
    assert names_of(folder) == {"prefill.plan", "decode.plan", "weights.safetensors", "canaries.safetensors"}
    again = trilithon.load(folder, device="cpu")
    assert again.report.sites == [replace(site, lifted=None) for site in llm.report.sites]
    assert again.report.notes[:-1] == llm.report.notes
    assert again.report.notes[-1].startswith("loaded: its programs were verified against eager when they were compiled")
    assert again.report.notes[-1].endswith("; the engines were not run")
    assert (again.max_tokens, again.decoder.shapes) == (llm.max_tokens, llm.decoder.shapes)
    for name in ("prefill", "decode"):
        mine, theirs = (getattr(x.decoder.modules, name).engine for x in (again, llm))
        assert mine.plan.read_bytes() == theirs.plan.read_bytes()
        assert (mine.inputs, mine.outputs, mine.aliases, mine.layers) == (
            theirs.inputs,
            theirs.outputs,
            theirs.aliases,
            theirs.layers,
        )
    with pytest.raises(CannotLower, match="cannot run on the CPU"):
        again.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=2)
    with pytest.raises(CannotLower, match="only prefill and decode were saved"):
        again(torch.ones(1, 4, dtype=torch.int64))
    saved_over = {path.name for path in folder.iterdir()}
    assert {path.name for path in again.save(folder).iterdir()} == saved_over
    trilithon.load(folder, device="cpu")


def test_an_engine_is_found_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, options = tiny("llama-3.2", layers=1), Options(gpu="sm80", engine_cache=str(tmp_path), verify=False)

    def plans() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.plan")}

    compiled(model, max_tokens=32, options=options)
    first = plans()
    assert len(first) == 2
    again = compiled(model, max_tokens=32, options=options)
    assert plans() == first
    assert again.decoder.modules.decode.engine.plan.name in first  # type: ignore[attr-defined]
    next(model.parameters()).data[5] += 1.0
    compiled(model, max_tokens=32, options=options)
    assert len(plans()) == 4
    for about in tmp_path.glob("*.json"):
        about.write_text("{}")
    compiled(model, max_tokens=32, options=options)
    assert "cannot be read and is built again" in caplog.text


def test_what_cannot_be_loaded(llm: Compiled, tmp_path: Path) -> None:
    llm.save(tmp_path)
    built = manifest_of(tmp_path)["versions"]["tensorrt"]
    package, number = built.split()
    for other in (f"{package} 1.4.0.76", f"other {number}"):
        change(tmp_path, lambda data, other=other: data["versions"].update(tensorrt=other))
        with pytest.raises(InputError, match=f"they were built with {other}, and this is {built}"):
            trilithon.load(tmp_path, device="cpu")
    change(tmp_path, lambda data: data["versions"].update(tensorrt=f"{package} {number}.1"))
    trilithon.load(tmp_path, device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="it holds engines for a GPU, and torch sees none here"):
            trilithon.load(tmp_path)


def test_no_engine_is_loaded_before_it_is_checked(llm: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a plan mapped, or a weight read."""
    llm.save(tmp_path)
    for reached in ("read_engines", "check"):
        monkeypatch.setattr(loading, reached, lambda *args: pytest.fail("it was used"))
    monkeypatch.setattr(loading.weights, "read", lambda *args: pytest.fail("it was read"))
    for name in ("prefill.plan", "decode.plan"):
        path = file_of(tmp_path, name)
        plan = path.read_bytes()
        for place in (*range(0, len(plan), max(1, len(plan) // 20)), len(plan) - 1):
            path.write_bytes(plan[:place] + bytes([plan[place] ^ 1]) + plan[place + 1 :])
            with pytest.raises(InputError, match=f"{path.name} is damaged"):
                trilithon.load(tmp_path, device="cpu")
        path.write_bytes(plan)


def test_inspect_needs_no_tensorrt(llm: Compiled, tmp_path: Path) -> None:
    llm.save(tmp_path)
    block = "import sys; sys.modules['tensorrt'] = sys.modules['tensorrt_rtx'] = None"
    code = f"{block}; sys.argv = ['trilithon', 'inspect', {str(tmp_path)!r}]; from trilithon.cli import main; main()"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "tensorrt on sm80" in ran.stdout and "tensorrt_rtx" in ran.stdout and "PROVED" in ran.stdout


def test_a_living_model_keeps_its_plans(llm: Compiled, tmp_path: Path) -> None:
    """TensorRT reads a plan when it is first run: by then the folder may hold another model."""
    again = trilithon.load(llm.save(tmp_path / "saved"), device="cpu")
    for path in (tmp_path / "saved").iterdir():
        path.unlink()
    again.save(tmp_path / "other")
    for name in ("prefill.plan", "decode.plan", "weights.safetensors"):
        assert manifest_of(tmp_path / "other")["files"][name]["sha256"]
    trilithon.load(tmp_path / "other", device="cpu")


@pytest.mark.parametrize(("gpu", "text"), [("sm61", "this TensorRT builds for sm75, sm80"), (None, "there is no GPU")])
def test_an_unknown_gpu_is_refused(gpu: str | None, text: str) -> None:
    if gpu is None and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(CannotLower, match=text):
        compiled(tiny("llama-3.2"), max_tokens=16, options=Options(gpu=gpu))


def test_report_says_what_each_site_became(llm: Compiled) -> None:
    for site in llm.report.sites:
        assert site.runs_on.startswith("prefill: ")
        assert "decode: " in site.runs_on
