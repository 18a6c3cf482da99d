"""What the commands share: the application, its arguments, and loading a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from trilithon.errors import InputError

if TYPE_CHECKING:
    from torch import nn

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
CacheDtype = Annotated[
    str | None, typer.Option(help="Keep K and V in 8 bits, int8 or fp8: an approximation. Default: as the model, exact.")
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Prove every mask anew, and keep no proof.")]

MinNewTokens = Annotated[int, typer.Option(min=0, help="No end-of-text token before so many.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy; above it, tokens are drawn.")]
TopK = Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0 = from all.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that reach this probability together.")]
MinP = Annotated[float, typer.Option(help="Draw no token less likely than this part of the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1, tokens already seen become less likely.")]
Eos = Annotated[bool, typer.Option(help="Stop at the model's end-of-text token.")]
Stop = Annotated[list[str], typer.Option(help="Stop at this text; may be given several times.")]


def generation(
    max_new_tokens: int,
    min_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    eos: bool,
) -> dict[str, Any]:
    """These options as arguments of `generate`; what draws only where something is drawn."""
    found: dict[str, Any] = {} if eos else {"eos_token_id": None}
    found |= {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens, "repetition_penalty": repetition_penalty}
    drawn = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return found | drawn if temperature > 0 else found


def names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def load(
    model: str, dtype: str | None, device: str | None, layers: int | None, seed: int = 0, *, in_host_memory: bool = False
) -> nn.Module:
    """The model on `device`; or, in the type that it would have there, in the host's memory."""
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
    return load_model(model, dtype=dtypes[dtype], device="cpu" if in_host_memory else device, layers=layers, seed=seed)
