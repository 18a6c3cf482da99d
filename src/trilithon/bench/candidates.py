"""The rows of `trilithon bench`: the same greedy generation by PyTorch, by Hugging Face's caches and by Trilithon.

Every row starts from the same model object and makes exactly `new_tokens` tokens; no token ends a generation. The rows
without a cache run the whole sequence again for each new token, and compute the logits of its last token only, where
the model has an argument for that. The row that keeps the mask differs from the next one in the mask alone: both are
exported, run on the same backend, and compiled by Inductor where the other is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trilithon.bench.roofline import DecoderSize
from trilithon.bench.rows import Candidate
from trilithon.capture import hf
from trilithon.compiled import Compiled
from trilithon.compiler import compile as compile_model
from trilithon.errors import InputError, TrilithonError
from trilithon.lower.backend import lower_module, resolve_backend
from trilithon.lower.inputs import Input, rows, tokens
from trilithon.options import Options
from trilithon.prove.verdict import Verdict

ROWS = ("pytorch", "hf-dynamic", "hf-static", "kept", "causal", "static")
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
    """The rows that were asked for, in the order of `ROWS`.

    Args:
        model: a Hugging Face causal LM, on the device of `ids`.
        ids: `[b s]` int64, the prompts.
        rows: names among `ROWS`.
        backend: of Trilithon's rows.
        proof_cache: as in `Options`, for the rows that compile.
        compiled: `model` compiled for enough tokens, if the caller has it; then its row builds nothing.

    Raises:
        InputError: a row has another name, or the model is not a causal LM.
    """
    unknown = [row for row in rows if row not in ROWS]
    if unknown or not rows:
        raise InputError(
            f"unknown row {unknown[0]!r}" if unknown else "no row to measure", todo=f"the rows are {', '.join(ROWS)}"
        )
    if not hf.is_causal_lm(model):
        raise InputError(
            f"cannot measure generation with {type(model).__name__}",
            why="it is not a causal language model",
            todo="pick a preset such as byte-llama or qwen3-0.6b; `trilithon explain` takes encoders too",
        )
    contest = _Contest(model, ids, new_tokens, backend, Options(proof_cache=proof_cache), compiled)
    return [contest.candidate(row) for row in ROWS if row in rows]


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

    def candidate(self, row: str) -> Candidate:
        window = getattr(self.model.config, "sliding_window", None)
        form = f"window({window})" if window else "causal"
        names: dict[str, tuple[str, Callable[[], Callable[[], Tensor]], str]] = {
            "pytorch": ("PyTorch, no cache", self._pytorch, "eager, SDPA attention"),
            "hf-dynamic": ("HF dynamic cache", lambda: self._hugging_face(None), ""),
            "hf-static": ("HF static cache", lambda: self._hugging_face("static"), "compiled by HF itself on a GPU"),
            "kept": ("Trilithon mask kept, no cache", self._kept, "exported, its mask a tensor"),
            "causal": (f"Trilithon {form}, no cache", self._causal, "the mask proved and rewritten"),
            "static": ("Trilithon static cache", self._static, ""),
        }
        name, make, note = names[row]
        return Candidate(name=name, make=make, note=note)

    def _pytorch(self) -> Callable[[], Tensor]:
        only_last = _last_only(self.model)
        return self._without_cache(lambda ids: self.model(input_ids=ids, use_cache=False, **only_last).logits)

    def _hugging_face(self, cache: str | None) -> Callable[[], Tensor]:
        arguments: dict[str, Any] = {
            "max_new_tokens": self.new_tokens,
            "do_sample": False,
            "use_cache": True,
            "eos_token_id": None,  # a generation that ends early would do less work
            "attention_mask": torch.ones_like(self.ids),
            "cache_implementation": cache,
        }
        return lambda: self.model.generate(self.ids, **arguments)  # type: ignore[operator]

    def _kept(self) -> Callable[[], Tensor]:
        program, backend = self._last_token.program, resolve_backend(self.backend)
        b, s = self.ids.shape
        sizes = (rows(b), tokens(s + self.new_tokens))
        inputs = tuple(Input(name, expected.dtype, sizes) for name, expected in program.expected.items())
        general: Any = program.general
        return self._without_cache(lower_module(general, backend, self.options, role="sequence", name="kept", inputs=inputs))

    def _causal(self) -> Callable[[], Tensor]:
        open_sites = [s for s in self._last_token.report.sites if s.verdict is not Verdict.PROVED]
        if open_sites:
            raise TrilithonError(f"{len(open_sites)} masks were not proved", why=open_sites[0].reason)
        return self._without_cache(self._last_token)

    def _static(self) -> Callable[[], Tensor]:
        rows, prompt = self.ids.shape
        options = replace(self.options, max_batch=rows)
        compiled = self.compiled or compile_model(
            self.model, max_tokens=prompt + self.new_tokens, backend=self.backend, options=options
        )
        return lambda: compiled.generate(self.ids, max_new_tokens=self.new_tokens, eos_token_id=None)

    @cached_property
    def _last_token(self) -> Compiled:
        """The model compiled for `input_ids` alone, giving the logits of the last token where it can."""
        example, shapes = hf.example_for(self.model, ("input_ids",))
        only_last = _last_only(self.model)
        shapes |= dict.fromkeys(only_last)
        example |= only_last
        most = self.ids.shape[1] + self.new_tokens
        return compile_model(
            self.model, example, max_tokens=most, dynamic_shapes=shapes, backend=self.backend, options=self.options
        )

    def _without_cache(self, logits: LogitsOf) -> Callable[[], Tensor]:
        @torch.no_grad()
        def run() -> Tensor:
            ids = self.ids
            for _ in range(self.new_tokens):
                ids = torch.cat([ids, logits(ids)[:, -1].argmax(-1, keepdim=True)], 1)
            return ids

        return run


def _last_only(model: nn.Module) -> dict[str, int]:
    """The argument that makes a model compute the logits of its last token only, if it has one."""
    has = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if has else {}
