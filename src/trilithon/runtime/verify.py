"""Verify what was built: run it once against eager before handing it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from trilithon.errors import VerificationFailed
from trilithon.lower.inputs import Input
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


def verify(name: str, got: Tensor, want: Tensor, limit: float | None = None, because: str = "", todo: str = BUG) -> float:
    """The relative error of `got`, which eager says should be `want`.

    Args:
        limit: the error that is allowed, and why; None = what rounding explains.

    Raises:
        VerificationFailed: the shapes differ, or the error is more than rounding explains.
    """
    if got.shape != want.shape:
        raise VerificationFailed(f"{name} gives {list(got.shape)}, eager gives {list(want.shape)}", todo="please report this")
    error = relative_error(got, want)
    if limit is None:
        limit, because = TOLERANCE.get(want.dtype, 1e-3), f"rounding in {want.dtype} explains no more"
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
) -> float:
    """Run both modules on random inputs that meet the guards, and compare what they give; see `verify`.

    Args:
        fast: the rewritten program, lowered.
        general: the program as it was captured.
        held: fake tensors of the inputs, as exported.
        inputs: the sizes that `fast` takes.
        device: of the program's weights.
        times: None: one small size, and the error that rounding explains is `TOLERANCE`. Else several sizes, and that
            many times the error of `general`, both against it in a wider type.
    """
    wider = None if times is None else widened(general)
    worst = 0.0
    for length in (9,) if times is None else (9, 1, 17, 512):
        arguments = list(canary_inputs(inputs, held, guards, 2, length, device).values())
        got, want = _tensors(fast(*arguments)), _tensors(general(*arguments))
        exact = want if wider is None else _tensors(wider(*(wide(x) for x in arguments)))
        for mine, theirs, truth in zip(got, want, exact, strict=True):
            if theirs.is_floating_point():
                worst = max(worst, _verify_beside("the rewritten program", mine, theirs, truth, times))
    return worst


def _verify_beside(name: str, got: Tensor, eager: Tensor, exact: Tensor, times: float | None) -> float:
    """The error of `got`; with `times` held to so many times that of `eager`, both against `exact`."""
    if times is None:
        return verify(name, got, eager)
    own = relative_error(eager, exact)
    allowed = max(times * max(own, float(torch.finfo(eager.dtype).eps)), LEAST.get(eager.dtype, 0.0))
    return verify(name, got, exact, allowed, f"eager {eager.dtype} is off by {own:.0e}{HINTS.get(eager.dtype, '')}")


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

    The first prompt is run with left padding too, where the cache has room for it.

    Args:
        original: the model; what it is given beside tokens, the decoder has taken in.
        lengths: tokens of each prompt; those that the cache cannot hold are shortened.
        times: None: the error that rounding explains is `TOLERANCE`. Else it is that many times the model's own, both
            against the model in a wider type (float64 for float32, float32 for halves).

    A cache of 8 bits may be off by `CACHE_TOLERANCE` more than rounding explains.
    """
    rows = min(2, decoder.max_batch)
    most = max(lengths) + 3
    ids = torch.randint(0, 5, (rows, most), generator=torch.Generator().manual_seed(0)).to(decoder.device)
    stored = next((shape.stored for shape in decoder.shapes), None)
    judge = _Judge(original, None if times is None else original.widened(), times or 0.0, stored)
    worst = 0.0
    for n, length in enumerate(dict.fromkeys(min(length, decoder.cache_tokens - 1) for length in lengths)):
        total = min(length + 3, decoder.cache_tokens)
        worst = max(worst, _verify_prompt(decoder, judge, ids[:, :total], length, [0] * rows))
        if n == 0 and length >= 3:
            pads = [0, 2][-rows:]  # of one row the padding is cut off, of two rows that of the second is masked
            worst = max(worst, _verify_prompt(decoder, judge, ids[:, :total], length, pads))
    return worst


def _verify_prompt(decoder: CachedDecoder, judge: _Judge, ids: Tensor, prompt: int, pads: list[int]) -> float:
    """One prompt, of which row i has `pads[i]` tokens of left padding and so many tokens less."""
    total, pad = ids.shape[1], torch.tensor(pads, device=decoder.device)
    padded = torch.stack([torch.cat([torch.zeros_like(row[:p]), row[: prompt - p]]) for row, p in zip(ids, pads, strict=True)])
    got, best = [decoder.prefill(padded, pad).clone()], [decoder.best.clone()]
    row = torch.arange(len(ids), device=decoder.device)
    for i in range(prompt, total):
        got.append(decoder.decode(ids[row, i - pad]).clone())
        best.append(decoder.best.clone())
    name = f"prefill of {prompt} tokens and decode" + (" with left padding" if any(pads) else "")
    error = judge.verify(name, torch.stack(got, 1), ids, [slice(prompt - 1 - p, total - p) for p in pads])
    _verify_best(torch.stack(best, 1), torch.stack(got, 1))
    return error


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


@dataclass(frozen=True)
class _Judge:
    """Says what logits should be, and how far off they may be."""

    original: Original
    wider: Original | None
    times: float
    stored: torch.dtype | None = None  # of 8 bits, where the cache is kept so

    def verify(self, name: str, got: Tensor, ids: Tensor, tokens: list[slice]) -> float:
        """The error of `got [b n v]`, the logits at `tokens` of each row of `ids`."""
        want = self.original.logits(ids, tokens, got.shape[-1])
        if self.wider is None and self.stored is not None:
            limit = TOLERANCE.get(want.dtype, 1e-3) + CACHE_TOLERANCE[self.stored]
            return verify(name, got, want, limit, f"rounding, and a cache in {self.stored}, explain no more", COARSE)
        if self.wider is None:
            return verify(name, got, want)
        return _verify_beside(name, got, want, self.wider.logits(ids, tokens, got.shape[-1]), self.times)
