"""`trilithon generate`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trilithon.cli.common import (
    Backend,
    CacheDtype,
    Device,
    Dtype,
    Eos,
    Layers,
    MinNewTokens,
    MinP,
    Model,
    NoCache,
    RepetitionPenalty,
    Stop,
    Temperature,
    TopK,
    TopP,
    app,
    generation,
    load,
)
from trilithon.cli.ranks import ranks, shared
from trilithon.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trilithon.compiled import Compiled
    from trilithon.options import Options


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="Text to continue, for a model that has a tokenizer.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Continue so many random tokens instead of a text.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    min_new_tokens: MinNewTokens = 0,
    temperature: Temperature = 0.0,
    top_k: TopK = 50,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Annotated[int, typer.Option(help="Of drawn tokens, random prompts and random weights.")] = 0,
    eos: Eos = True,
    stop: Stop = [],  # noqa: B006
    prompt_lookup: Annotated[int, typer.Option(help="Guess up to so many tokens (15 at most) from the text so far.")] = 0,
    backend: Backend = "auto",
    dtype: Dtype = None,
    device: Device = None,
    layers: Layers = None,
    max_tokens: Annotated[int | None, typer.Option(help="Capacity of the KV cache. Default: what the job needs.")] = None,
    cache_dtype: CacheDtype = None,
    no_cache: NoCache = False,
) -> None:
    """Continue a prompt, printing tokens as they come, then the speed."""
    from trilithon.artefact import is_artefact
    from trilithon.options import Options

    options = Options(proof_cache=not no_cache, cache_dtype=cache_dtype)  # type: ignore[arg-type]
    tokenizer = _tokenizer(model, prompt, prompt_tokens)
    text = None if tokenizer is None else tokenizer(prompt, return_tensors="pt").input_ids
    if is_artefact(model):
        compiled, ids = _load_compiled(model, device, text, prompt_tokens, seed, options)
    else:
        module = load(model, dtype, device, layers, seed) if ranks() == 1 else shared(model, dtype, device, layers, seed)
        compiled, ids = _compile(module, backend, text, prompt_tokens, seed, max_new_tokens, max_tokens, options)
    arguments = generation(max_new_tokens, min_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, eos)
    arguments |= _stops(stop, tokenizer) | _drafts(prompt_lookup) | ({"seed": seed} if temperature > 0 else {})
    _write(str(prompt) if tokenizer else f"[{ids.shape[1]} random tokens] ")
    speed = _print_generated(compiled, ids, tokenizer, arguments)
    print("\n", speed, compiled.start_up, sep="\n")


def _stops(stop: list[str], tokenizer: Any | None) -> dict[str, Any]:
    if stop and tokenizer is None:
        raise InputError("--stop was given without a text", why="random tokens have no text to stop at", todo="leave it out")
    return {"stop_strings": stop, "tokenizer": tokenizer} if stop else {}


def _drafts(prompt_lookup: int) -> dict[str, Any]:
    return {"prompt_lookup_num_tokens": prompt_lookup} if prompt_lookup else {}


def _print_generated(compiled: Compiled, ids: Tensor, tokenizer: Any | None, arguments: dict[str, Any]) -> str:
    """Print the tokens as they come; the speed in words."""
    from trilithon.bench.live import TokenPrinter

    printer = TokenPrinter(tokenizer, _write)
    result = compiled.generate(ids, streamer=printer, return_dict_in_generate=True, **arguments)
    drafts = f"; {result.accepted} of {result.drafted} drafts accepted" if "prompt_lookup_num_tokens" in arguments else ""
    return f"{printer.speed}{drafts}"


def _compile(
    module: nn.Module,
    backend: str,
    text: Tensor | None,
    prompt_tokens: int | None,
    seed: int,
    max_new_tokens: int,
    max_tokens: int | None,
    options: Options,
) -> tuple[Compiled, Tensor]:
    """The compiled model, and the prompt on its device."""
    from trilithon.bench.measure import random_ids
    from trilithon.compiler import compile as compile_model

    ids = random_ids(module, prompt_tokens or 16, seed)
    ids = ids if text is None else text.to(ids.device)
    capacity = max_tokens or ids.shape[1] + max_new_tokens
    return compile_model(module, max_tokens=capacity, backend=backend, options=options), ids


def _load_compiled(
    folder: str, device: str | None, text: Tensor | None, prompt_tokens: int | None, seed: int, options: Options
) -> tuple[Compiled, Tensor]:
    """What `trilithon compile` saved, and the text, or random tokens of low numbers, which every vocabulary has."""
    import torch

    from trilithon.artefact import load as load_compiled

    if ranks() > 1:
        why = "what is saved is compiled for one process"
        raise InputError("ranks cannot share a compiled model", why=why, todo="give the model that it was compiled from")
    if options.cache_dtype is not None:
        raise InputError(
            "--cache-dtype was given with a compiled model", why="it keeps K and V as it was compiled", todo="leave it out"
        )
    compiled = load_compiled(folder, device)
    if compiled.origin is not None and compiled.origin.backend == "tensorrt" and compiled.decoder.device.type == "cpu":
        todo = "run it where the GPU is, or generate from the model itself with --backend native"
        raise InputError(f"cannot run {folder} here", why="it holds engines for a GPU", todo=todo)
    random = torch.randint(3, 256, (1, prompt_tokens or 16), generator=torch.Generator().manual_seed(seed))
    return compiled, (random if text is None else text).to(compiled.decoder.device)


def _tokenizer(model: str, prompt: str | None, prompt_tokens: int | None) -> Any | None:
    """The model's tokenizer where a text is to be continued, None where random tokens are."""
    from trilithon.artefact import is_artefact, tokenizer_folder
    from trilithon.capture.hf import PRESETS, load_tokenizer

    if prompt_tokens is not None:
        if prompt is not None:
            raise InputError("both --prompt and --prompt-tokens were given", todo="give one of them")
        return None
    saved = tokenizer_folder(model) if is_artefact(model) else None
    tokenizer = load_tokenizer(model if saved is None else str(saved))
    if tokenizer is None and prompt is not None:
        why = "its weights are random" if model.lower() in PRESETS else "none of its files is a tokenizer's"
        raise InputError(f"{model} has no tokenizer", why=why, todo="give --prompt-tokens 16 instead")
    if tokenizer is not None and not prompt:
        raise InputError("there is no prompt", todo="give --prompt 'some text', or --prompt-tokens 16 for random tokens")
    return tokenizer


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
