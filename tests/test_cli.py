"""The command line: each command on a tiny model, and the text of its errors."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

import trilithon
from artefacts import file_of, names_of
from runtime.plain_decoder import PlainDecoder
from runtime.tiny_llama import tiny_llama
from trilithon import Compiled, cli, compiler
from trilithon.bench import candidates, demo, doctor
from trilithon.bench.sweep_table import Sweep
from trilithon.bench.table import Table
from trilithon.capture import hf, presets
from trilithon.report.report import Report

transformers.utils.logging.disable_progress_bar()  # on stderr, where tests read errors
CAPACITY = 64  # tokens


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch, capsys) -> Run:
    """Run `trilithon` with these words, in this process."""

    def run(*words: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", ["trilithon", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        return Ran(exit.value.code or 0, out, err)  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A Llama of one layer with random weights over bytes, and its tokenizer."""
    path = tmp_path_factory.mktemp("tiny-llama")
    tiny_llama(vocab_size=256, num_hidden_layers=1, max_position_embeddings=256).save_pretrained(path)
    core = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in bytes_to_unicode().items()}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def compile_once() -> Callable[..., Any]:
    """`trilithon.compile` that compiles each program of the tiny model once: it takes seconds."""
    real, made = compiler.compile, {}

    def compile_once(model: Any, example: Any = None, *, max_tokens: int = 0, backend: str = "auto", **others: Any) -> Any:
        compile_once.max_tokens = max_tokens  # type: ignore[attr-defined]
        key = (example is None, backend, others["options"].max_batch if "options" in others else 1)
        if key not in made:
            made[key] = real(model, example, max_tokens=CAPACITY, backend=backend, **others)
        return made[key]

    return compile_once


@pytest.fixture(autouse=True)
def _compile_once(compile_once, monkeypatch):
    monkeypatch.setattr(compiler, "compile", compile_once)
    monkeypatch.setattr(demo, "compile_model", compile_once)


@pytest.fixture(scope="session")
def config_folder(folder, tmp_path_factory) -> Path:
    """A folder with a configuration and nothing else."""
    path = tmp_path_factory.mktemp("config-only")
    (path / "config.json").write_text((folder / "config.json").read_text())
    return path


def test_help_does_not_import_torch():
    code = "import sys, trilithon.cli; assert not {'torch', 'transformers', 'z3', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_and_version(run):
    text = run("--help").out
    assert all(name in text for name in ("explain", "compile", "export", "inspect", "generate", "bench", "demo", "doctor"))
    assert re.fullmatch(r"trilithon \d+\.\d+\.\d+\S*\n", run("--version").out)


def test_explain_needs_a_configuration_only(run, config_folder, tmp_path):
    page, data = tmp_path / "report.html", tmp_path / "report.json"
    ran = run("explain", config_folder, "--inputs", "input_ids,position_ids", "--html", page, "--json", data)
    assert ran.code == 0, ran.err
    assert "PROVED" in ran.out
    assert "model.layers.0.self_attn" in ran.out
    assert "each row of position_ids is consecutive" in " ".join(ran.out.split())
    assert "queries │█▄" in ran.out
    assert page.read_text().startswith("<!doctype html>")
    report = json.loads(data.read_text())
    (site,) = report["sites"]
    assert (site["verdict"], site["mask"], site["heads"]) == ("proved", "causal", [4, 2])
    assert report["passes"]["fold-grouped-heads"] == 1
    assert set(report["sizes"].values()) == {"input_ids axis 0", "input_ids axis 1"}
    assert set(report["sizes"]) <= set(report["ranges"])
    assert "4 heads, 2 of keys and values" in ran.out


def test_export_says_what_became_of_each_site(run, folder, tmp_path, monkeypatch):
    """The export itself is tested in tests/lower/onnx."""
    given = {}

    def export(module, path, **arguments):
        given.update(arguments)
        path.write_bytes(b"x" * 1_500_000)
        report = dataclasses.replace(trilithon.explain(module), notes=("verified with ONNX Runtime",))
        return trilithon.OnnxModel(path, (path,), report, arguments["opset"], 0.0, "")

    monkeypatch.setattr("trilithon.onnx_export.export_onnx", export)
    ran = run("export", folder, "--out", tmp_path / "llama.onnx", "--opset", "24", "--inputs", "input_ids,attention_mask")
    assert ran.code == 0, ran.err
    assert (given["opset"], given["inputs"], given["verify"]) == (24, ("input_ids", "attention_mask"), True)
    assert "causal" in ran.out and "verified with ONNX Runtime" in ran.out
    assert f"saved {tmp_path / 'llama.onnx'}, 1.5 MB" in ran.out
    refused = run("export", folder, "--out", tmp_path / "llama.onnx", "--opset", "22")
    assert refused.code == 1 and "choose one of 23, 24" in refused.err


def test_explain_eager_attention(run, config_folder):
    ran = run("explain", config_folder, "--attention", "eager")
    assert ran.code == 0, ran.err
    assert "causal" in ran.out


def test_explain_compares_two_reports(run, config_folder, tmp_path):
    first, second, saved = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "diff.json"
    assert run("explain", config_folder, "--json", first).code == 0
    same = run("explain", first, first)
    assert (same.code, same.out.splitlines()[-1]) == (0, "nothing that matters changed")
    data = json.loads(first.read_text())
    data["sites"][0]["mask"] = "window(8)"
    second.write_text(json.dumps(data))
    ran = run("explain", first, second, "--json", saved)
    assert ran.code == 3, ran.err
    assert "causal -> window(8)" in ran.out
    assert json.loads(saved.read_text())["matters"] is True
    ran = run("explain", first, config_folder / "config.json")
    assert ran.code == 1
    assert "config.json is not a report" in ran.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("explain", "a.json"), ("compares two saved reports", "1 was given", "trilithon explain a.json b.json")),
        (("explain", "gpt2", "minilm", "llama-3.2-1b"), ("compares two saved reports", "3 were given")),
        (("explain", "gpt2", "minilm"), ("cannot read gpt2",)),
        (("explain", "a.json", "b.json", "--html", "c.html"), ("compares two saved reports", "a diff has no page")),
        (("explain", "lama-3.2-1b"), ("unknown model 'lama-3.2-1b'", "it is no preset", "did you mean llama-3.2-1b?")),
        (("explain", "gpt2", "--attention", "flash"), ("unknown attention 'flash'", "choose sdpa or eager")),
        (("explain", "gpt2", "--layers", "1", "--inputs", "pixels"), ("no example for the input 'pixels'", "input_ids")),
        (("generate", "gpt2", "--prompt", "hi"), ("gpt2 has no tokenizer", "random", "--prompt-tokens 16")),
        (("generate", "gpt2", "--prompt", "a", "--prompt-tokens", "4"), ("both --prompt and", "one of them")),
        (("generate", "gpt2", "--prompt-tokens", "4", "--dtype", "int8"), ("unknown dtype 'int8'", "float16")),
        (("generate", "gpt2", "--prompt-tokens", "4", "--cache-dtype", "int4"), ("cache_dtype='int4'", "int8, fp8")),
        (("bench", "--device", "cpu"), ("a model or --all",)),
        (("bench", "--all", "--json", "a.json"), ("the files of one model", "give --out DIR")),
        (("bench", "gpt2", "minilm", "--png", "a.png"), ("the files of one model", "give --out DIR")),
        (("bench", "gpt2", "--sweep", "--all"), ("--sweep was given with --all", "--contexts gives the sizes")),
        (("bench", "gpt2", "--sweep", "--contexts", "2k,many"), ("cannot read the sizes '2k,many'", "2k,8k,32k")),
        (("bench", "minilm", "--device", "cpu"), ("cannot measure generation with BertModel", "byte-llama")),
    ],
    ids=lambda value: " ".join(value) if value and value[0] in ("explain", "generate", "bench") else "",
)
def test_an_error_is_its_text_and_exit_code_1(run, words, expected):
    ran = run(*words)
    assert ran.code == 1
    assert ran.out == ""
    assert "Traceback" not in ran.err
    for part in expected:
        assert part in ran.err
    first, *rest = ran.err.splitlines()
    assert not first.startswith(" ")
    assert all(line.startswith("  ") for line in rest)


def test_proofs_are_kept_unless_told_otherwise(run, config_folder, proof_folder):
    assert run("explain", config_folder, "--no-cache").code == 0
    assert not proof_folder.exists()
    assert run("explain", config_folder).code == 0
    assert len(list(proof_folder.iterdir())) == 1


def test_generate_text(run, folder, compile_once):
    ran = run("generate", folder, "--prompt", "Hello", "--max-new-tokens", "12", "--device", "cpu")
    assert ran.code == 0, ran.err
    assert ran.out.startswith("Hello")
    assert compile_once.max_tokens == len("Hello") + 12
    assert re.search(r"^start-up .* s: export .*, verify ", ran.out, re.MULTILINE)
    assert re.search(r"12 tokens in .*: the first after .*, then .* tokens/s", ran.out)


def test_a_compiled_report_has_the_heads_before_repetition(folder):
    report = compiler.compile(hf.load_model(str(folder)), max_tokens=CAPACITY).report
    assert [site.heads for site in report.sites] == [(4, 2)]
    assert report.passes["fold-grouped-heads"] == 1


def test_generate_equals_hugging_face(run, folder):
    words = ("generate", folder, "--prompt-tokens", "5", "--max-new-tokens", "9", "--device", "cpu", "--seed", "3")
    ran = run(*words)
    shown = [int(word) for word in ran.out.splitlines()[0].partition("] ")[2].split()]
    model = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.randint(0, 256, (1, 5), generator=torch.Generator().manual_seed(3))
    assert shown == model.generate(ids, max_new_tokens=9, do_sample=False)[0, 5:].tolist()


def test_generate_draws_the_same_with_the_same_seed(run, folder):
    words = ("generate", folder, "--prompt-tokens", "4", "--max-new-tokens", "8", "--temperature", "2", "--device", "cpu")
    first, again, other = (run(*words, "--seed", seed).out.splitlines()[0] for seed in ("1", "1", "2"))
    assert first == again
    assert first != other


def test_generate_stops_at_a_text(run, folder):
    words = ("generate", folder, "--prompt", "Hello", "--max-new-tokens", "12", "--device", "cpu")
    whole = run(*words).out.partition("\n\n")[0]
    ran = run(*words, "--stop", whole[8:10], "--stop", "never there")
    assert ran.code == 0, ran.err
    assert ran.out.partition("\n\n")[0] == whole[:10]
    random = run("generate", folder, "--prompt-tokens", "4", "--stop", "a", "--device", "cpu")
    assert random.code == 1 and "--stop was given without a text" in random.err


def test_generate_counts_drafts(run, folder, monkeypatch):
    """The same tokens; the words are those of a decoder without tricks."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    report = Report(model="tiny", inputs=(), route="", sites=[])
    made = Compiled(programs={}, report=report, build=None, decoder=PlainDecoder(model), max_tokens=CAPACITY, defaults={})
    monkeypatch.setattr(compiler, "compile", lambda *args, **options: made)
    words = ("generate", folder, "--prompt", "abababababab", "--max-new-tokens", "9", "--device", "cpu")
    plain, drafted = run(*words), run(*words, "--prompt-lookup", "4", "--repetition-penalty", "1.0", "--min-new-tokens", "2")
    assert drafted.code == 0, drafted.err
    assert drafted.out.splitlines()[0] == plain.out.splitlines()[0]
    assert re.search(r"tokens/s; \d+ of \d+ drafts accepted", drafted.out)
    assert "drafts" not in plain.out
    assert "between 1 and 15" in run(*words, "--prompt-lookup", "16").err


def test_generate_that_does_not_fit(run, folder, compile_once):
    words = ("generate", folder, "--prompt-tokens", "8", "--max-new-tokens", CAPACITY, "--max-tokens", "70", "--device", "cpu")
    ran = run(*words)
    assert compile_once.max_tokens == 70
    assert ran.code == 1
    assert f"8 prompt tokens and {CAPACITY} new ones do not fit" in ran.err


def test_bench_measures_all_rows(run, folder, tmp_path):
    data, chart, text = tmp_path / "a" / "bench.json", tmp_path / "b" / "bench.png", tmp_path / "bench.md"
    words = ("bench", folder, "--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "2", "--device", "cpu")
    ran = run(*words, "--json", data, "--png", chart, "--markdown", text)
    assert ran.code == 0, ran.err
    table = Table.from_json(data.read_text())
    names = [row.name for row in table.rows]
    assert names == [
        "PyTorch, no cache",
        "HF dynamic cache",
        "HF static cache",
        "Trilithon mask kept, no cache",
        "Trilithon causal, no cache",
        "Trilithon static cache",
    ]
    assert [row.error for row in table.rows] == [""] * 6
    assert [row.tokens_equal_baseline for row in table.rows] == [None] + [True] * 5
    assert all(row.timing is not None and len(row.timing.seconds) == 2 for row in table.rows)
    assert all(row.first_token_seconds is not None and row.seconds_per_token is not None for row in table.rows)
    weights = sum(p.numel() for p in hf.load_model(str(folder)).parameters())
    assert table.weight_bytes == 4 * weights and table.cache_bytes is not None
    assert table.command.startswith("trilithon bench ")
    assert {"torch", "trilithon", "transformers"} <= set(table.versions)
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert "Trilithon static" in ran.out
    assert text.read_text() == table.to_markdown()
    assert [line.partition(":")[0] for line in ran.err.splitlines() if " in all; median " in line] == names


@pytest.fixture
def tiny_presets(folder, monkeypatch):
    real = hf.load_model
    monkeypatch.setattr(hf, "load_model", lambda name, **options: real(str(folder), device=options["device"]))


def test_bench_all_saves_each_preset(run, tiny_presets, tmp_path):
    words = ("--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1", "--device", "cpu", "--rows", "pytorch")
    ran = run("bench", "--all", *words, "--out", tmp_path)
    assert ran.code == 0, ran.err
    saved = {path.name: Table.from_json(path.read_text()).model for path in tmp_path.glob("*.json")}
    assert saved == {f"cpu-{name}.json": name for name in cli.PRESETS}
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}
    assert set(cli.PRESETS) <= set(hf.PRESETS)


def test_bench_all_measures_what_can_run(run, tiny_presets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def runnable(device):
        asked.append(device)
        return ("pytorch", "hf-dynamic")

    monkeypatch.setattr(candidates, "runnable", runnable)
    words = ("--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1", "--device", "cpu")
    ran = run("bench", "gpt2", "qwen3-0.6b", "--all", *words)
    assert ran.code == 0, ran.err
    assert asked == [torch.device("cpu")] * 2
    (made,) = tmp_path.iterdir()
    assert re.fullmatch(r"benchmark-\d{4}-\d\d-\d\d", made.name)
    assert {path.stem for path in made.iterdir()} == {"cpu-gpt2", "cpu-qwen3-0.6b"}
    names = [row.name for row in Table.from_json((made / "cpu-gpt2.json").read_text()).rows]
    assert names == ["PyTorch, no cache", "HF dynamic cache"]


def test_bench_sweep(run, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--batches", "2,1", "--contexts", "1k,8", "--new-tokens", "3", "--repeats", "1", "--device", "cpu")
    ran = run("bench", folder, "--sweep", *words)
    assert ran.code == 0, ran.err
    (made,) = tmp_path.iterdir()
    stem = f"cpu-{folder.name}-sweep"
    assert {path.name for path in made.iterdir()} == {f"{stem}.json", f"{stem}.md", f"{stem}.png"}
    sweep = Sweep.from_json((made / f"{stem}.json").read_text())
    assert [(t.batch, t.prompt_tokens) for t in sweep.tables] == [(1, 5), (1, 1021), (2, 5), (2, 1021)]
    assert [bool(t.rows[0].error) for t in sweep.tables] == [False, True] * 2
    assert "1 x 1k" in ran.out
    assert "batch 2, context 8: Trilithon static cache: build" in ran.err
    words = ("--batches", "1", "--contexts", "1k", "--new-tokens", "2", "--repeats", "1", "--device", "cpu")
    assert run("bench", folder, "--sweep", *words, "--json", tmp_path / "one.json").code == 1  # nothing was measured
    assert (tmp_path / "one.json").exists()


def test_a_prompt_without_a_tokenizer(run, config_folder):
    ran = run("generate", config_folder, "--prompt", "hi")
    assert ran.code == 1
    assert "has no tokenizer" in ran.err and "none of its files is a tokenizer's" in ran.err


def test_bench_rows_can_be_chosen(run, folder, tmp_path):
    words = ("bench", folder, "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1", "--device", "cpu")
    data = tmp_path / "bench.json"
    assert run(*words, "--rows", "hf-dynamic,pytorch", "--json", data).code == 0
    assert [row.name for row in Table.from_json(data.read_text()).rows] == ["PyTorch, no cache", "HF dynamic cache"]
    ran = run(*words, "--rows", "pytorch,fast")
    assert ran.code == 1
    assert "unknown row 'fast'" in ran.err
    assert "hf-static" in ran.err


def test_compile_saves_engines_for_another_gpu(run, folder, tmp_path):
    out = tmp_path / "engines"
    ran = run("compile", folder, "--gpu", "sm80", "--out", out, "--max-tokens", "32", "--dtype", "float32")
    assert ran.code == 0, ran.err
    words = " ".join(ran.out.split())
    assert "prefill: matmul-softmax-matmul (float32: IAttention has kernels for float16 and bfloat16 alone)" in words
    assert {"prefill.plan", "decode.plan", "tokenizer/tokenizer.json"} <= names_of(out)
    ran = run("generate", out, "--prompt", "ab", "--device", "cpu")
    assert ran.code == 1
    assert "it holds engines for a GPU" in ran.err


def test_compile_inspect_generate(run, folder, tmp_path):
    """A native model that was saved says what it is, and goes on with its own tokenizer as the model itself does."""
    out = tmp_path / "saved"
    ran = run("compile", folder, "--backend", "native", "--out", out, "--max-tokens", CAPACITY, "--dtype", "float32")
    assert ran.code == 0, ran.err
    assert "tokenizer/tokenizer.json" in names_of(out)
    words = ("--prompt", "ab", "--max-new-tokens", "8", "--device", "cpu")
    mine, theirs = run("generate", out, *words), run("generate", folder, *words)
    assert mine.code == theirs.code == 0, mine.err
    assert mine.out.splitlines()[0] == theirs.out.splitlines()[0]

    ran = run("inspect", out)
    assert ran.code == 0, ran.err
    assert f"{folder.name}  (folder, LlamaForCausalLM)" in ran.out
    assert "native on cpu" in ran.out and "PROVED" in ran.out and "each row of position_ids is consecutive" in ran.out
    found = json.loads(run("inspect", out, "--json").out)
    assert found["model"]["config"]["hidden_size"] == 32
    assert {file["state"] for file in found["files"]} == {"ok"} and found["other_files"] == []
    assert all(proof["formula"] and proof["assumptions"] for proof in found["proofs"])

    path = file_of(out, "tokenizer/tokenizer.json")
    path.write_text(path.read_text()[:-1])
    ran = run("inspect", out)
    assert ran.code == 1 and f"tokenizer.json  {path.stat().st_size + 1} bytes  truncated" in ran.out
    ran = run("generate", out, *words)
    assert ran.code == 1 and "is damaged or was changed" in ran.err


@pytest.mark.parametrize(("name", "says"), [("nowhere", "there is no such folder"), (".", "there is no trilithon.json in it")])
def test_inspect_what_is_no_artefact(run, tmp_path, name, says):
    ran = run("inspect", tmp_path / name)
    assert ran.code == 1 and says in ran.err and ran.out == ""


def test_doctor(run):
    found = json.loads(run("doctor", "--json").out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"].startswith("3.")
    assert {"cpu", "auto", "native", "eager", "tensorrt"} <= {*found["devices"], *found["backends"]}
    assert found["backends"]["native"]["works"]
    assert all(answer["says"] for answer in (*found["backends"].values(), *found["integrations"].values()))
    assert found["integrations"]["transformers"]["works"]
    text = run("doctor").out
    assert f"torch           {torch.__version__}" in text
    assert "native          works" in text and "integrations" in text


def test_doctor_says_why_not(run, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", types.SimpleNamespace(__version__="2.9.0"))
    own = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "ray" else own(package))
    found = json.loads(run("doctor", "--json").out)["integrations"]
    assert found["ray"] == {"works": False, "says": "Ray is not installed; pip install 'trilithon[ray]'"}
    assert found["torchrun"]["works"] and "gloo" in found["torchrun"]["says"]
    assert found["torch.compile"] == {"works": False, "says": "Inductor needs a C++ compiler; install g++"}
    assert not found["torch-tensorrt"]["works"] and "written for 2.11" in found["torch-tensorrt"]["says"]
    assert "torch-tensorrt  does not work: this plug-in was written for 2.11" in run("doctor").out

    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    module = types.ModuleType("torch_tensorrt.dynamo.lowering.passes._aten_lowering_pass")
    monkeypatch.setitem(sys.modules, "torch_tensorrt", types.SimpleNamespace(__version__="2.13.0"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found = json.loads(run("doctor", "--json").out)["integrations"]
    assert found["torch.compile"]["works"] and found["torch.compile"]["says"].endswith("then Inductor")
    assert found["torch-tensorrt"] == {"works": True, "says": "install() plugs into Torch-TensorRT 2.13.0"}


def test_demo(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "BYTE_LLAMA", folder)
    monkeypatch.setattr(demo, "EXHIBITS", (demo.EXHIBITS[1], demo.Exhibit("no-such-model", ("input_ids",), "is left out")))
    monkeypatch.setattr(demo, "PROMPT_TOKENS", 8)
    monkeypatch.setattr(demo, "NEW_TOKENS", 40)
    monkeypatch.setattr(demo, "GENERATED_TOKENS", 10)
    monkeypatch.setattr(demo, "REPEATS", 1)
    ran = run("demo", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err + ran.out
    words = " ".join(ran.out.split())
    assert ran.out.count("same tokens as eager: yes") == 2
    assert "1 of 1 masks proved: causal, if each row of position_ids is consecutive" in words.replace("│ ", "")
    assert "no-such-model (input_ids): left out" in words
    assert "total time" in words
    saved = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"bench.json", "bench.png", "byte-llama-compiled.html", "byte-llama-input_ids-position_ids.html"} <= saved
