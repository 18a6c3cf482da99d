"""Verify what was built: run it once against eager before handing it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from trilithon.errors import VerificationFailed
from trilithon.lower.inputs import Input
from trilithon.runtime.canary import Canary, kept, require_same
from trilithon.runtime.decoder import CachedDecoder
from trilithon.runtime.original import Original, wide, widened
from trilithon.runtime.program import Module
from trilithon.spec.assumption import Assumption

# Relative error (Frobenius) that rounding explains. Reordered sums in a deep random network stay far below it;
# a wrong mask, scale or position is of order 1.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
# What keeping K and V in 8 bits may add: about three times what models show on the canary prompts (docs/backends.md).
CACHE_TOLERANCE = {torch.int8: 3e-2, torch.float8_e4m3fn: 1e-1}
BUG = "nothing was compiled. This is a bug of Trilithon or of a kernel: please report it with trilithon doctor"
COARSE = "nothing was compiled. Leave cache_dtype out, or choose int8, which is closer than fp8"


def relative_error(got: Tensor, want: Tensor) -> float:
    """`||got - want|| / ||want||`, computed in float64; inf where `got` is not finite and `want` is."""
    a, b = got.double(), want.double()
    if not bool(torch.isfinite(a).all()):
        return float("inf")
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def compare(name: str, got: Tensor, want: Tensor) -> float:
    """The relative error of `got`, which eager says should be `want`.

    Raises:
        VerificationFailed: the shapes differ.
    """
    if got.shape != want.shape:
        raise VerificationFailed(f"{name} gives {list(got.shape)}, eager gives {list(want.shape)}", todo="please report this")
    return relative_error(got, want)


def require(name: str, error: float, limit: float, because: str, todo: str = BUG) -> float:
    """The error.

    Args:
        limit: the error that is allowed, and why.

    Raises:
        VerificationFailed: it is larger, or no number.
    """
    if not error <= limit:
        raise VerificationFailed(
            f"{name} disagrees with eager",
            why=f"the relative error on the canary input is {error:.2e}, and {limit:.0e} is allowed: {because}",
            todo=todo,
        )
    return error


@torch.no_grad()
def verify_program(
    fast: Module,
    general: GraphModule,
    held: Mapping[str, Tensor],
    guards: tuple[Assumption, ...],
    inputs: Sequence[Input],
    device: torch.device,
    times: float | None = None,
    canaries: list[Canary] | None = None,
) -> float:
    """Run both modules on random inputs that meet the guards, and compare what they give; see `verify`.

    Args:
        fast: the rewritten program, lowered.
        general: the program as it was captured.
        held: fake tensors of the inputs, as exported.
        inputs: the sizes that `fast` takes.
        device: of the program's weights.
        times: None: one small size, and the error that rounding explains is `TOLERANCE`. Else several sizes, and that
            many times the error of `general`, both against it in a wider type; that error is the largest over the sizes.
        canaries: takes in the first size, for a file.
    """
    wider = None if times is None else widened(general)
    found: list[tuple[float, float, torch.dtype]] = []  # the error of each output, and eager's own
    first: list[tuple[Mapping[str, Tensor], list[Tensor]]] = []
    for length in (9,) if times is None else (9, 1, 17, 512):
        given = canary_inputs(inputs, held, guards, 2, length, device)
        arguments = list(given.values())
        got, want = _tensors(fast(*arguments)), _tensors(general(*arguments))
        exact = want if wider is None else _tensors(wider(*(wide(x) for x in arguments)))
        first.append((given, [x for x, y in zip(exact, want, strict=True) if y.is_floating_point()]))
        for mine, theirs, truth in zip(got, want, exact, strict=True):
            if theirs.is_floating_point():
                found.append((compare("the rewritten program", mine, truth), relative_error(theirs, truth), theirs.dtype))
    own = max((own for _, own, _ in found), default=0.0)
    errors = [require("the rewritten program", error, *_allowed(times, own, dtype)) for error, _, dtype in found]
    if canaries is not None:
        limits = [_allowed(times, own, dtype)[0] for _, _, dtype in found[: len(first[0][1])]]
        canaries.append(kept(*first[0], limits))
    return max(errors, default=0.0)


def _allowed(times: float | None, own: float, dtype: torch.dtype) -> tuple[float, str]:
    """So many times eager's own error, or what rounding explains; and the reason in words."""
    if times is None:
        return TOLERANCE.get(dtype, 1e-3), f"rounding in {dtype} explains no more"
    allowed = max(times * max(own, float(torch.finfo(dtype).eps)), LEAST.get(dtype, 0.0))
    return allowed, f"eager {dtype} is off by {own:.0e}{HINTS.get(dtype, '')}"


# What an engine may be off by though eager is nearer: TensorRT-RTX has no products of float32, only sums of TF32 products.
LEAST = {torch.float32: 1e-4}
HINTS = {
    torch.float32: "; TensorRT-RTX multiplies float32 in TF32, and more exactly if NVIDIA_TF32_OVERRIDE=0 is set before the "
    "process starts"
}


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in (output if isinstance(output, (tuple, list)) else [output]) if isinstance(x, Tensor)]


def canary_inputs(
    inputs: Sequence[Input],
    held: Mapping[str, Tensor],
    guards: tuple[Assumption, ...],
    rows: int,
    length: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Random inputs by name, of so many rows and tokens where they may be, that meet the guards; types are those of `held`."""
    generator = torch.Generator().manual_seed(0)
    sizes: dict[str, int] = {}  # of a size symbol, as the first input has it
    made: dict[str, Tensor] = {}
    for spec in inputs:
        like = held[spec.name]
        wanted = [rows, *[length] * len(spec.axes)]
        fitting = (min(max(axis.low, n), axis.high) for axis, n in zip(spec.axes, wanted, strict=False))
        shape = tuple(sizes.setdefault(str(size), n) for size, n in zip(like.shape, fitting, strict=True))
        made[spec.name] = _canary(spec, shape, guards, generator).to(like.dtype).to(device)
    return made


def _canary(spec: Input, shape: tuple[int, ...], guards: tuple[Assumption, ...], generator: torch.Generator) -> Tensor:
    """A random input of this shape: what its guard asks for, or what its name says."""
    guard = next((g for g in guards if g.table == spec.name), None)
    if guard is not None:
        return guard.sample(shape, spec.dtype, generator)
    if spec.dtype.is_floating_point:
        return torch.randn(shape, generator=generator)
    if "mask" in spec.name:
        return torch.ones(shape)
    if "position" in spec.name:
        return torch.arange(shape[-1]).expand(shape)
    return torch.randint(0, 2 if spec.dtype == torch.bool or "type" in spec.name else 5, shape, generator=generator)


@torch.no_grad()
def verify_decoder(
    decoder: CachedDecoder, original: Original, lengths: Sequence[int] = (6,), times: float | None = None
) -> float:
    """Prefill random prompts, decode three tokens behind each, and compare each step's logits with the model's full forward.

    The first prompt is run with left padding too, where the cache has room for it; as it is, it is the decoder's canary.

    Args:
        original: the model; what it is given beside tokens, the decoder has taken in.
        lengths: tokens of each prompt; those that the cache cannot hold are shortened.
        times: None: the error that rounding explains is `TOLERANCE`. Else it is that many times the model's own, both
            against the model in a wider type (float64 for float32, float32 for halves); its own is the largest over the
            prompts, each of which shows a few tokens only.

    A cache of 8 bits may be off by `CACHE_TOLERANCE` more than rounding explains.
    """
    rows = min(2, decoder.max_batch)
    most = max(lengths) + 3
    ids = torch.randint(0, 5, (rows, most), generator=torch.Generator().manual_seed(0)).to(decoder.device)
    prompts = []
    for n, length in enumerate(dict.fromkeys(min(length, decoder.cache_tokens - 1) for length in lengths)):
        total = min(length + 3, decoder.cache_tokens)
        prompts.append((ids[:, :total], length, (0,) * rows))
        if n == 0 and length >= 3:
            prompts.append((ids[:, :total], length, (0, 2)[-rows:]))  # of one row the padding is cut off, else masked
    if decoder.prompts is not None:
        prompts += prompts[:1] * 2  # by now they are replayed, from what the capture left behind
    wider = None if times is None else original.widened()
    shown = [_run_prompt(decoder, original, wider, *prompt) for prompt in prompts]
    stored = next((shape.stored for shape in decoder.shapes), None)
    dtype, own = shown[0].dtype, max(each.own for each in shown)
    limit, because = _allowed(times, own, dtype)
    if times is None and stored is not None:
        limit, because = limit + CACHE_TOLERANCE[stored], f"rounding, and a cache in {stored}, explain no more"
    todo = BUG if stored is None else COARSE
    worst = max(require(each.name, each.error, limit, because, todo) for each in shown)
    decoder.canary = kept({"ids": prompts[0][0], **original.given}, [shown[0].exact], [limit])
    return worst


@torch.no_grad()
def check_decoder(decoder: CachedDecoder, canary: Canary) -> float:
    """Hold a loaded decoder to its canary; the relative error.

    Raises:
        VerificationFailed: it is off by more than it may be.
    """
    ids = canary.given["ids"].to(decoder.device)
    if decoder.context.module is not None:
        decoder.take_context(tuple(canary.given[name].to(decoder.device) for name in decoder.context.inputs), len(ids))
    prompt = ids.shape[1] - canary.wanted[0].shape[1] + 1
    return require_same("the decoder", [_decoded(decoder, ids, prompt, (0,) * len(ids))[0]], canary)


@torch.no_grad()
def check_program(fast: Module, canary: Canary, device: torch.device) -> float:
    """Hold a loaded program, which takes its inputs in the canary's order, to its canary; the relative error.

    Raises:
        VerificationFailed: it is off by more than it may be.
    """
    got = _tensors(fast(*(x.to(device) for x in canary.given.values())))
    return require_same("the rewritten program", [x for x in got if x.is_floating_point()], canary)


class _Shown(NamedTuple):
    """What a prompt shows: the error of a decoder's logits, and that of the model's own, both against a wider model."""

    name: str
    error: float
    own: float
    dtype: torch.dtype
    exact: Tensor


def _run_prompt(
    decoder: CachedDecoder, original: Original, wider: Original | None, ids: Tensor, prompt: int, pads: tuple[int, ...]
) -> _Shown:
    """Run a prompt, of which row i has `pads[i]` tokens of left padding and so many tokens less, and the tokens behind it."""
    total = ids.shape[1]
    got, best = _decoded(decoder, ids, prompt, pads)
    _verify_best(best, got)
    tokens = [slice(prompt - 1 - p, total - p) for p in pads]  # the prompt's last, and those behind it
    want = original.logits(ids, tokens, got.shape[-1])
    exact = want if wider is None else wider.logits(ids, tokens, got.shape[-1])
    name = f"prefill of {prompt} tokens and decode" + (" with left padding" if any(pads) else "")
    return _Shown(name, compare(name, got, exact), relative_error(want, exact), want.dtype, exact)


def _decoded(decoder: CachedDecoder, ids: Tensor, prompt: int, pads: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Logits `[b n v]` and best tokens `[b n]` of a prompt's last token and those behind it; arguments as `_run_prompt`'s."""
    pad = torch.tensor(pads, device=decoder.device)
    padded = torch.stack([torch.cat([torch.zeros_like(row[:p]), row[: prompt - p]]) for row, p in zip(ids, pads, strict=True)])
    logits, best = [decoder.prefill(padded, pad).clone()], [decoder.best.clone()]
    row = torch.arange(len(ids), device=decoder.device)
    for i in range(prompt, ids.shape[1]):
        logits.append(decoder.decode(ids[row, i - pad]).clone())
        best.append(decoder.best.clone())
    return torch.stack(logits, 1), torch.stack(best, 1)


def _verify_best(best: Tensor, logits: Tensor) -> None:
    """No logit of `[b n v]` is higher than that of the token `[b n]` that the decoder names; equal ones may be."""
    inside = best.clamp(0, logits.shape[-1] - 1)
    of_best = logits.gather(-1, inside[..., None])[..., 0]
    wrong = (best != inside) | (of_best != logits.amax(-1))
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        raise VerificationFailed(
            "decode names a token that is not the best",
            why=f"in step {token} of row {row} it names {int(best[row, token])}, and its logits are highest at "
            f"{int(logits[row, token].argmax())}",
            todo=BUG,
        )
