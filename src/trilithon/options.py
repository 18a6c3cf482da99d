"""Options of a compilation: what the user may choose. Facts about a model are proved, never options."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from trilithon.errors import InputError

Backend = Literal["auto", "eager", "native", "tensorrt"]
BACKENDS = ("auto", "eager", "native", "tensorrt")
FORMS = ("auto", "fused", "decomposed")
CACHE_DTYPES = ("int8", "fp8")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to prove, compile and run.

    Attributes:
        solver_seconds: z3 time budget for one site; past it the verdict is UNKNOWN.
        proof_cache: reuse proofs of earlier runs, and keep new ones (in `$TRILITHON_CACHE`, or the user's cache folder).
        when_guard_fails: "general" runs the unrewritten program, "raise" raises GuardFailed.
        inductor: compile native programs with Inductor; None = prompts and the decode step, on a GPU only.
        cuda_graphs: replay decode steps as CUDA graphs, and native prompts of a length that comes again (padded to a multiple
            of 64 tokens; the 4 lengths used last are kept); None = on a GPU only.
        verify: run each compiled program against eager before handing it out. A number is how many times the error of
            eager (both against a wider type) the logits of a TensorRT engine may have on a GPU; True is 3.
        max_batch: rows that the KV cache holds.
        gpu: what TensorRT builds engines for, e.g. "sm80"; None = the GPU at hand.
        attention: how TensorRT attends. "auto" takes its fused attention layer where that is right, else matmul, softmax,
            matmul, or over a cache sums, and the report says why; "fused" raises where the layer cannot serve; "decomposed"
            is matmul, softmax, matmul everywhere.
        engine_cache: folder in which TensorRT engines are kept, and found again by what they were built from: each is as
            large as the weights. None = they are built anew.
        cache_dtype: K and V are kept in 8 bits, with one float32 scale a token and key head: an approximation, whose error
            is measured and stands in the report. "int8" is the closer one; "fp8" is float8_e4m3fn. None = the model's own
            type, exact.
    """

    solver_seconds: float = 10.0
    proof_cache: bool = True
    when_guard_fails: Literal["general", "raise"] = "general"
    inductor: bool | None = None
    cuda_graphs: bool | None = None
    verify: bool | float = True
    max_batch: int = 1
    gpu: str | None = None
    attention: Literal["auto", "fused", "decomposed"] = "auto"
    engine_cache: str | None = None
    cache_dtype: Literal["int8", "fp8"] | None = None

    def __post_init__(self) -> None:
        if self.solver_seconds <= 0:
            raise InputError(f"solver_seconds={self.solver_seconds} must be positive", todo="10 is a good value")
        if self.when_guard_fails not in ("general", "raise"):
            raise InputError(f"when_guard_fails={self.when_guard_fails!r} must be 'general' or 'raise'")
        if self.max_batch < 1:
            raise InputError(f"max_batch={self.max_batch} must be at least 1")

        if self.verify < 0:
            raise InputError(f"verify={self.verify} must be 0 or more", why="it is a number of times the error of eager")
        if self.attention not in FORMS:
            raise InputError(f"attention={self.attention!r} must be one of {', '.join(FORMS)}")
        if self.cache_dtype not in (None, *CACHE_DTYPES):
            raise InputError(f"cache_dtype={self.cache_dtype!r} must be None or one of {', '.join(CACHE_DTYPES)}")

    def __repr__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Options({', '.join(changed)})"
