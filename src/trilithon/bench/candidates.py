"""The rows of `trilithon bench`: the same greedy generation by PyTorch, by Hugging Face's caches and by Trilithon.

Every row starts from the same model object and makes exactly as many tokens as it is told; no token ends a generation. The rows
without a cache run the whole sequence again for each new token, and compute the logits of its last token only, where
the model has an argument for that. The row that keeps the mask differs from the next one in the mask alone: both are
exported, run on the same backend, and compiled by Inductor where the other is.

Only Trilithon's rows load what they need: the prover, and TensorRT. The others run where z3 is not installed.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trilithon.bench import torch_tensorrt_row
from trilithon.bench.roofline import DecoderSize
from trilithon.bench.rows import Candidate, Run
from trilithon.capture import hf
from trilithon.compiled import Compiled
from trilithon.errors import InputError, TrilithonError
from trilithon.options import Options
from trilithon.prove.verdict import Verdict
from trilithon.report.report import Report
from trilithon.runtime.program import Program

ROWS = ("pytorch", "hf-dynamic", "hf-static", "kept", "causal", "static")
TENSORRT_ROWS = ("trt-decomposed", "trt-mask", "trt-causal", "trt-static", "trt-graph")
TORCH_TENSORRT_ROWS: dict[str, tuple[str, str, dict[str, bool]]] = {  # name, note, settings that are not its defaults
    "torch-tensorrt": ("Torch-TensorRT, no cache", "as shipped (attn_bias_is_causal=True)", {}),
    "torch-tensorrt-masked": (
        "Torch-TensorRT mask kept, no cache",
        "attn_bias_is_causal=False",
        {"attn_bias_is_causal": False},
    ),
}
EVERYWHERE = ("pytorch", "hf-dynamic", "hf-static", "hf-flex", "kept", "causal", "static")  # need no other package
KNOWN = (*EVERYWHERE, *TENSORRT_ROWS, *TORCH_TENSORRT_ROWS)
log = logging.getLogger(__name__)
LogitsOf = Callable[[Tensor], Tensor]  # ids [b s] -> logits [b, s or 1, v]


def candidates(
    model: nn.Module,
    ids: Tensor,
    new_tokens: int,
    *,
    rows: Sequence[str] = ROWS,
    backend: str = "auto",
    proof_cache: bool = True,
    compiled: Compiled | None = None,
) -> list[Candidate]:
    """The rows that were asked for, in the order of `KNOWN`.

    Args:
        model: a Hugging Face causal LM, on the device of `ids`.
        ids: `[b s]` int64, the prompts.
        rows: names among `KNOWN`.
        backend: of Trilithon's rows.
        proof_cache: as in `Options`, for the rows that compile.
        compiled: `model` compiled for enough tokens, if the caller has it; then its row builds nothing.

    Raises:
        InputError: a row has another name, or the model is not a causal LM.
    """
    unknown = [row for row in rows if row not in KNOWN]
    if unknown or not rows:
        raise InputError(
            f"unknown row {unknown[0]!r}" if unknown else "no row to measure", todo=f"the rows are {', '.join(KNOWN)}"
        )
    if not hf.is_causal_lm(model):
        raise InputError(
            f"cannot measure generation with {type(model).__name__}",
            why="it is not a causal language model",
            todo="pick a preset such as byte-llama or qwen3-0.6b; `trilithon explain` takes encoders too",
        )
    contest = _Contest(model, ids, new_tokens, backend, Options(proof_cache=proof_cache), compiled)
    return [contest.candidate(row) for row in KNOWN if row in rows]


def runnable(device: torch.device) -> tuple[str, ...]:
    """The rows among `KNOWN` that can run on `device` with what is installed; a warning says which cannot, and why."""
    from trilithon.lower.tensorrt.library import library

    found = [*EVERYWHERE]
    packages: list[tuple[Sequence[str], Callable[[], Any]]] = [
        (TENSORRT_ROWS, library),
        (tuple(TORCH_TENSORRT_ROWS), lambda: torch_tensorrt_row.library(device)),
    ]
    for names, package in packages:
        try:
            if device.type != "cuda":
                raise TrilithonError("cannot measure an engine here", why=f"the model is on {device.type}, not on a GPU")
            package()
            found += names
        except TrilithonError as error:
            log.warning("rows left out: %s: %s", ", ".join(names), error.why or error.what)
    return tuple(found)


def decoder_size(model: nn.Module) -> DecoderSize:
    """The sizes of a Hugging Face dense decoder that the floor of a job depends on."""
    config: Any = model.config
    heads, hidden = config.num_attention_heads, config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return DecoderSize(
        layers=config.num_hidden_layers,
        hidden=hidden,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        intermediate=inner or 4 * hidden,
        vocabulary=config.vocab_size,
        mlp_matrices=3 if any("gate" in name for name, _ in model.named_parameters()) else 2,
        window_keys=getattr(config, "sliding_window", None),
    )


@dataclass
class _Contest:
    """One model and one job, in all ways; the two Trilithon rows without a cache share a compiled program."""

    model: nn.Module
    ids: Tensor
    new_tokens: int
    backend: str
    options: Options
    compiled: Compiled | None
    details: dict[str, str] = field(default_factory=dict)  # row -> what came out of building it

    def candidate(self, row: str) -> Candidate:
        window = getattr(self.model.config, "sliding_window", None)
        form = f"window({window})" if window else "causal"
        names: dict[str, tuple[str, Callable[[], Run], str]] = {
            "pytorch": ("PyTorch, no cache", self._pytorch, "eager, SDPA attention"),
            "hf-dynamic": ("HF dynamic cache", lambda: self._hugging_face(self.model, None), ""),
            "hf-static": (
                "HF static cache",
                lambda: self._hugging_face(self.model, "static"),
                "compiled by HF itself on a GPU",
            ),
            "hf-flex": ("HF FlexAttention, dynamic cache", self._flex, "attn_implementation='flex_attention'"),
            "kept": (
                "Trilithon mask kept, no cache",
                lambda: self._kept(row, self.backend, self.options),
                "exported, its mask a tensor",
            ),
            "causal": (f"Trilithon {form}, no cache", lambda: self._causal(row, self._last_token), "the mask proved"),
            "static": ("Trilithon static cache", lambda: self._static(self.backend), ""),
            "trt-decomposed": (
                "TensorRT decomposed, no cache",
                lambda: self._on_tensorrt(row),
                "matmul, softmax, matmul, and the mask",
            ),
            "trt-mask": (
                "TensorRT IAttention and mask, no cache",
                lambda: self._on_tensorrt(row),
                "the mask made in the network",
            ),
            "trt-causal": (f"TensorRT IAttention {form}, no cache", lambda: self._on_tensorrt(row), "the mask proved"),
            "trt-static": ("TensorRT static cache", lambda: self._on_tensorrt(row), "written in place"),
            "trt-graph": ("TensorRT static cache, CUDA graph", lambda: self._on_tensorrt(row), "written in place"),
        }
        if row in TORCH_TENSORRT_ROWS:
            name, note, settings = TORCH_TENSORRT_ROWS[row]
            names[row] = (name, lambda: self._torch_tensorrt(row, settings), note)
        name, make, note = names[row]
        return Candidate(name=name, make=make, note=note, details=lambda: self.details.get(row, ""))

    def _pytorch(self) -> Run:
        only_last = _last_only(self.model)
        return self._without_cache(lambda ids: self.model(input_ids=ids, use_cache=False, **only_last).logits)

    def _flex(self) -> Run:
        return self._hugging_face(hf.sharing_weights(self.model, attention="flex_attention"), None)

    def _hugging_face(self, model: Any, cache: str | None) -> Run:
        arguments: dict[str, Any] = {
            "do_sample": False,
            "use_cache": True,
            "eos_token_id": None,  # a generation that ends early would do less work
            "attention_mask": torch.ones_like(self.ids),
            "cache_implementation": cache,
        }
        return lambda new_tokens: model.generate(self.ids, max_new_tokens=new_tokens, **arguments)

    def _kept(self, row: str, backend: str, options: Options) -> Run:
        return self._compiled(row, self._last_token_of(backend, options, proved=False))

    def _causal(self, row: str, made: tuple[Program, Report]) -> Run:
        open_sites = [s for s in made[1].sites if s.verdict is not Verdict.PROVED]
        if open_sites:
            raise TrilithonError(f"{len(open_sites)} masks were not proved", why=open_sites[0].reason)
        return self._compiled(row, made)

    def _compiled(self, row: str, made: tuple[Program, Report]) -> Run:
        """A program verified as every compiled one is; its row says in what form it was built."""
        program, report = made
        self.details[row] = "; ".join(note.split(", since ")[0] for note in report.notes if "halves" in note)
        return self._without_cache(lambda ids: program(input_ids=ids))

    def _static(self, backend: str, cuda_graphs: bool | None = None) -> Run:
        from trilithon.compiler import compile as compile_model

        rows, prompt = self.ids.shape
        options = replace(self.options, max_batch=rows, cuda_graphs=cuda_graphs)
        compiled = (self.compiled if backend == self.backend else None) or compile_model(
            self.model, max_tokens=prompt + self.new_tokens, backend=backend, options=options
        )
        return run_compiled(compiled, self.ids)

    def _on_tensorrt(self, row: str) -> Run:
        if not self.ids.is_cuda:
            raise TrilithonError("cannot measure an engine here", why="there is no GPU", todo="leave the trt- rows out")
        if row in ("trt-static", "trt-graph"):
            return self._static("tensorrt", cuda_graphs=row == "trt-graph")
        if row == "trt-causal":
            return self._causal(row, self._last_token_of("tensorrt", replace(self.options, attention="fused")))
        form: Any = "decomposed" if row == "trt-decomposed" else "fused"
        return self._kept(row, "tensorrt", replace(self.options, attention=form))

    def _torch_tensorrt(self, row: str, settings: dict[str, bool]) -> Run:
        library = torch_tensorrt_row.library(self.ids.device)
        most = self.ids.shape[1] + self.new_tokens
        built = torch_tensorrt_row.build(library, self.model, self.ids, most, _last_only(self.model), settings)
        self.details[row] = built.made_of
        return self._without_cache(built.logits)

    @cached_property
    def _last_token(self) -> tuple[Program, Report]:
        return self._last_token_of(self.backend, self.options)

    def _last_token_of(self, backend: str, options: Options, proved: bool = True) -> tuple[Program, Report]:
        """The model's call with `input_ids` alone, compiled, giving the logits of the last token where it can."""
        from trilithon.compiler import analyse, compile_program
        from trilithon.lower.backend import resolve_backend
        from trilithon.prove.program import prover_of
        from trilithon.rewrite.pipeline import rewrite

        example, shapes = hf.example_for(self.model, ("input_ids",))
        only_last = _last_only(self.model)
        shapes |= dict.fromkeys(only_last)
        example |= only_last
        most = self.ids.shape[1] + self.new_tokens
        analysis = analyse(self.model, example, shapes, (), options)
        if not proved:
            program, _ = rewrite(analysis.captured.program, (), prover_of(analysis.captured.program))
            analysis = replace(analysis, proved=(), rewritten=program)
        return compile_program(analysis, resolve_backend(backend), options, most)

    def _without_cache(self, logits: LogitsOf) -> Run:
        @torch.no_grad()
        def run(new_tokens: int) -> Tensor:
            ids = self.ids
            for _ in range(new_tokens):
                ids = torch.cat([ids, logits(ids)[:, -1].argmax(-1, keepdim=True)], 1)
            return ids

        return run


def run_compiled(compiled: Compiled, ids: Tensor) -> Run:
    """Generation by our program; random ids may be those of padding, which here they are not."""
    return lambda new_tokens: compiled.generate(ids, max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=None)


def _last_only(model: nn.Module) -> dict[str, int]:
    """The argument that makes a model compute the logits of its last token only, if it has one."""
    has = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if has else {}
