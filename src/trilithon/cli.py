"""The command line: `trilithon explain | generate | bench | demo | doctor`.

Nothing heavy is imported before a command runs, so that `trilithon --help` answers at once.
"""

from __future__ import annotations

import os
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trilithon.errors import InputError, TrilithonError

if TYPE_CHECKING:
    from torch import nn

    from trilithon.bench.save import Saver
    from trilithon.bench.table import Table

app = typer.Typer(
    name="trilithon",
    help="Prove what attention masks mean, and make attention fast where the proof allows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="A preset (such as llama-3.2-1b), a folder in Hugging Face format, or a hub id.")]
Models = Annotated[list[str], typer.Argument(metavar="MODEL | A.json B.json", help="A model as for generate, or two reports.")]
Layers = Annotated[int | None, typer.Option(help="Keep only the first layers (explain, or presets with random weights).")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16. Default: float16 on a GPU, float32 on a CPU.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: the GPU if there is one.")]
Backend = Annotated[str, typer.Option(help="auto, native, eager or tensorrt.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Prove every mask anew, and keep no proof.")]

ALL = ("qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b")  # what `bench --all` measures
RESULTS = Path("benchmarks/results")


def main() -> None:
    """Run the command line; an error of Trilithon's is its text on stderr and exit code 1."""
    try:
        app()
    except TrilithonError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


def _short(argument: str) -> str:
    """A folder of this machine says nothing to who reads the results: an absolute path is cut to its name."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _version(asked: bool) -> None:
    if asked:
        print(f"trilithon {metadata.version('trilithon')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command()
def explain(
    models: Models,
    inputs: Annotated[
        str | None,
        typer.Option(
            help="Inputs of the call, joined by commas: input_ids, position_ids, attention_mask, token_type_ids."
            " Default: input_ids, for an encoder with attention_mask."
        ),
    ] = None,
    attention: Annotated[str, typer.Option(help="transformers' attention: sdpa or eager.")] = "sdpa",
    layers: Layers = None,
    json: Annotated[Path | None, typer.Option(help="Save the report, or what changed, as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Save the report as one self-contained page.")] = None,
    no_cache: NoCache = False,
) -> None:
    """Say what every attention mask of a model means, with proof. Needs no weights.

    With two saved reports: what changed. The exit code is then 3 if a mask means, needs or runs on something else.
    """
    from rich.console import Console

    if len(models) > 1 or models[0].endswith(".json"):
        from trilithon.report.diff import compare

        raise typer.Exit(3 if compare(models, Console(), json, html) else 0)
    from trilithon.capture import hf
    from trilithon.compiler import explain as explain_model
    from trilithon.options import Options
    from trilithon.report.text import render

    if attention not in ("sdpa", "eager"):
        raise InputError(f"unknown attention {attention!r}", todo="choose sdpa or eager")
    module = hf.load_model(models[0], device="meta", layers=layers, attention=attention)
    example, shapes = (None, None) if inputs is None else hf.example_for(module, _names(inputs))
    report = explain_model(module, example, shapes, options=Options(proof_cache=not no_cache))
    render(report, Console())
    for path in (json, html):
        if path is not None:
            print(f"saved {report.save(path)}")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="Text to continue, for a model that has a tokenizer.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Continue so many random tokens instead of a text.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy; above it, tokens are drawn.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0 = from all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that reach this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of drawn tokens, random prompts and random weights.")] = 0,
    eos: Annotated[bool, typer.Option(help="Stop at the model's end-of-text token.")] = True,
    backend: Backend = "auto",
    dtype: Dtype = None,
    device: Device = None,
    layers: Layers = None,
    max_tokens: Annotated[int | None, typer.Option(help="Capacity of the KV cache. Default: what the job needs.")] = None,
    no_cache: NoCache = False,
) -> None:
    """Continue a prompt, printing tokens as they come, then the speed."""
    from trilithon.bench.live import print_tokens
    from trilithon.bench.measure import random_ids
    from trilithon.compiler import compile as compile_model
    from trilithon.options import Options

    tokenizer = _tokenizer(model, prompt, prompt_tokens)
    module = _load(model, dtype, device, layers, seed)
    if tokenizer is None:
        ids = random_ids(module, prompt_tokens or 16, seed)
    else:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(next(module.parameters()).device)
    capacity = max_tokens or ids.shape[1] + max_new_tokens
    options = Options(proof_cache=not no_cache)
    compiled = compile_model(module, max_tokens=capacity, backend=backend, options=options)
    arguments: dict[str, Any] = {"max_new_tokens": max_new_tokens} | ({} if eos else {"eos_token_id": None})
    if temperature > 0:
        arguments |= {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    _write(str(prompt) if tokenizer else f"[{ids.shape[1]} random tokens] ")
    _, speed = print_tokens(lambda: compiled.stream(ids, **arguments), tokenizer, _write)
    print(f"\n\n{speed}")


@app.command()
def bench(
    model: Annotated[str | None, typer.Argument(help="As for generate. Left out with --all.")] = None,
    every: Annotated[bool, typer.Option("--all", help=f"Measure {', '.join(ALL)}, one after the other.")] = False,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Default: 2048 on a GPU, 128 on a CPU.")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Default: 128 on a GPU, 64 on a CPU.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    layers: Layers = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each row, after one that is not timed.")] = 3,
    backend: Backend = "auto",
    rows: Annotated[
        str, typer.Option(help="Rows to measure, joined by commas; the first is what the others are compared with.")
    ] = "pytorch,hf-dynamic,hf-static,kept,causal,static",
    json: Annotated[
        Path | None,
        typer.Option(help="Save the table as JSON after each row. With --all a folder, by default benchmarks/results."),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Save it as Markdown too; with --all a folder.")] = None,
    png: Annotated[Path | None, typer.Option(help="Save it as a chart too; with --all a folder.")] = None,
    no_cache: NoCache = False,
) -> None:
    """Measure one greedy generation: PyTorch, Hugging Face's caches, Trilithon, and the floor of this machine."""
    from trilithon.bench.rows import free
    from trilithon.bench.save import Saver, device_stem

    if every == (model is not None):
        raise InputError("bench needs a model or --all, one of the two", todo="trilithon bench llama-3.2-1b")
    saver = Saver(json or (RESULTS if every else None), markdown, png)
    failed = False
    for name in ALL if model is None else (model,):
        module = _load(name, dtype, device, layers)
        saves = saver.inside(f"{device_stem(next(module.parameters()).device)}-{name}") if every else saver
        table = _bench(module, name, prompt_tokens, new_tokens, repeats, _names(rows), backend, saves, not no_cache)
        del module
        free()  # before the next is loaded
        failed |= any(row.error for row in table.rows)
    if failed:
        raise typer.Exit(1)


def _bench(
    module: nn.Module,
    name: str,
    prompt_tokens: int | None,
    new_tokens: int | None,
    repeats: int,
    rows: tuple[str, ...],
    backend: str,
    saver: Saver,
    proof_cache: bool,
) -> Table:
    """Measure, print and save one model."""
    from rich.console import Console

    from trilithon.bench.measure import CPU_JOB, GPU_JOB, measure_model, random_ids

    job = GPU_JOB if next(module.parameters()).is_cuda else CPU_JOB
    table = measure_model(
        module,
        name,
        random_ids(module, prompt_tokens or job[0]),
        new_tokens or job[1],
        repeats=repeats,
        rows=rows,
        backend=backend,
        proof_cache=proof_cache,
        command=shlex.join(["trilithon", *map(_short, sys.argv[1:])]),
        after_row=saver.after_row,
    )
    Console().print(table.to_rich())
    for path in saver.finish(table):
        print(f"saved {path}")
    return table


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the reports, the table and the chart.")] = Path("out"),
) -> None:
    """Explain, compile, generate and measure small models on this machine, in a few minutes and without a GPU."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # all that is loaded lies here, and loads in a blink
    from rich.console import Console

    from trilithon.bench.demo import run_demo

    if not run_demo(out, Console()):
        raise typer.Exit(1)


@app.command()
def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions, devices, and what each backend can do here, or why it cannot."""
    from json import dumps

    from trilithon.bench.doctor import as_text, diagnose

    found = diagnose()
    print(dumps(found, indent=2) if json else as_text(found))


def _tokenizer(model: str, prompt: str | None, prompt_tokens: int | None) -> Any | None:
    """The model's tokenizer where a text is to be continued, None where random tokens are."""
    from trilithon.capture.hf import PRESETS, load_tokenizer

    if prompt_tokens is not None:
        if prompt is not None:
            raise InputError("both --prompt and --prompt-tokens were given", todo="give one of them")
        return None
    tokenizer = load_tokenizer(model)
    if tokenizer is None and prompt is not None:
        why = "its weights are random" if model.lower() in PRESETS else "none of its files is a tokenizer's"
        raise InputError(f"{model} has no tokenizer", why=why, todo="give --prompt-tokens 16 instead")
    if tokenizer is not None and not prompt:
        raise InputError("there is no prompt", todo="give --prompt 'some text', or --prompt-tokens 16 for random tokens")
    return tokenizer


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _load(model: str, dtype: str | None, device: str | None, layers: int | None, seed: int = 0) -> nn.Module:
    import torch

    from trilithon.capture.hf import load_model

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    dtype = dtype or ("float32" if device.startswith("cpu") else "float16")
    if dtype not in dtypes:
        raise InputError(f"unknown dtype {dtype!r}", todo=f"choose one of {', '.join(dtypes)}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            f"cannot use device {device!r}", why="torch sees no GPU here", todo="leave --device out; see trilithon doctor"
        )
    return load_model(model, dtype=dtypes[dtype], device=device, layers=layers, seed=seed)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
