"""A Hugging Face model whose own `generate` runs on the compiled programs."""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from trilithon.capture import hf
from trilithon.compiler import compile as compile_model
from trilithon.errors import InputError
from trilithon.integrations.compiled_cache import CompiledCache
from trilithon.integrations.conditions import (
    KNOWN,
    Unchanged,
    left_padding,
    why_not_generate,
    why_not_now,
    why_not_places,
)
from trilithon.options import Options
from trilithon.report.report import Report
from trilithon.runtime.memory import Memory
from trilithon.runtime.prompts import same_device


def accelerate(
    model: Any,
    *,
    max_tokens: int | None = None,
    backend: str = "auto",
    options: Options = Options(),  # noqa: B008 (frozen)
) -> Accelerated:
    """Compile a Hugging Face causal LM, and let its own `model.generate(...)` run on the compiled programs.

    Logits processors, stopping criteria, streamers, sampling, beams and assisted decoding are transformers' own and work as
    before, as `model(...)` and `generate(use_cache=False)` do. What the programs cannot serve (see
    `trilithon.integrations.conditions`) runs as before, with one warning that says why.

        with accelerate(model, max_tokens=2048, options=Options(max_batch=4)):
            model.generate(**inputs, num_beams=4)

    Args:
        model: in eval mode. It is changed in place until `restore` or the end of a `with` block.
        max_tokens, backend, options: as `trilithon.compile` takes them; `max_batch` counts beams too.

    Raises:
        CannotCache: no KV cache could be inserted soundly; the model is left as it is.
        InputError, CaptureError, CannotLower, VerificationFailed: as `trilithon.compile` does; or it is accelerated already.
    """
    if not hf.is_hf(model) or model.config.is_encoder_decoder:
        what = "an encoder-decoder" if hf.is_hf(model) else "no transformers model"
        raise InputError(
            f"cannot accelerate a {type(model).__name__}",
            why=f"it is {what}, and the compiled programs take the place of a causal LM's forward",
            todo="pass a transformers causal LM, such as AutoModelForCausalLM gives; trilithon.compile takes other modules",
        )
    if isinstance(model.__dict__.get("forward"), _Replaced):
        raise InputError(f"{type(model).__name__} is accelerated already", todo="call restore() of the first accelerate")
    compiled = compile_model(model, max_tokens=max_tokens, backend=backend, options=options)
    return Accelerated(model, compiled.memory, compiled.report)


class Accelerated:
    """A model whose `generate` runs on compiled programs, until `restore` or the end of a `with` block.

    Attributes:
        model: the model.
        report: what was proved and chosen.
    """

    def __init__(self, model: Any, memory: Memory, report: Report | None = None) -> None:
        self.model, self.report = model, report
        self._memory, self._unchanged = memory, Unchanged(model)
        self._warned: set[str] = set()
        self._before = {name: model.__dict__.get(name) for name in ("forward", "_prepare_cache_for_generation")}
        self._forward, self._prepare = model.forward, model._prepare_cache_for_generation
        self._names = tuple(inspect.signature(self._forward).parameters)  # of what is passed without a name
        model.forward = _Replaced(self, "forward", self._forward, self._serve)
        model._prepare_cache_for_generation = _Replaced(
            self, "_prepare_cache_for_generation", self._prepare, self._prepare_cache
        )

    def restore(self) -> None:
        """Give the model its own forward back."""
        for name, value in self._before.items():
            if isinstance(self.model.__dict__.get(name), _Replaced):
                delattr(self.model, name)
                if value is not None:
                    setattr(self.model, name, value)

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        decoder = self._memory.decoder
        return f"<Accelerated {type(self.model).__name__}: {decoder.max_batch} rows of {decoder.cache_tokens} tokens>"

    # ---------------------------------------------------------------- generate asks for a cache

    def _prepare_cache(
        self, generation_config: Any, model_kwargs: Any, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """In place of transformers' own: a `CompiledCache`, or what it would give anyway and a warning that says why."""
        given = model_kwargs.get("past_key_values")
        if isinstance(given, CompiledCache):
            self._check_continues(given, max_cache_length)
        elif given is None and generation_config.use_cache is not False:
            why = self._why_not(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
            if why is None:
                model_kwargs["past_key_values"] = CompiledCache(self._memory)
                return
            self._warn(why)
        elif given is not None:
            self._warn(f"past_key_values is a {type(given).__name__}, which only the model itself can read")
        self._prepare(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)

    def _why_not(self, config: Any, given: dict[str, Any], mode: GenerationMode, batch_size: int, columns: int) -> str | None:
        if not self.model._supports_default_dynamic_cache():
            return "the model brings a cache of its own kind"
        return why_not_now(self.model, self._unchanged) or why_not_generate(
            config, given, mode, batch_size, columns, self._memory
        )

    def _check_continues(self, cache: CompiledCache, columns: int) -> None:
        if cache.memory is not self._memory:
            raise _cannot_serve("past_key_values was made by another accelerated model")
        if columns > self._memory.decoder.cache_tokens:
            raise _cannot_serve(f"{columns} tokens do not fit a cache of {self._memory.decoder.cache_tokens}")

    def _warn(self, why: str) -> None:
        if why not in self._warned:
            self._warned.add(why)
            text = f"generate of {type(self.model).__name__} runs without the compiled programs: {why}"
            warnings.warn(text, stacklevel=6)

    # ---------------------------------------------------------------- generate calls forward

    def _serve(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the model's forward, which takes all that has nothing to do with a `CompiledCache`."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        cache = given.get("past_key_values")
        if not isinstance(cache, CompiledCache):
            return self._forward(*args, **kwargs)
        logits = self._logits(cache, given)
        if given.get("return_dict") is False:
            return logits, cache
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _logits(self, cache: CompiledCache, given: dict[str, Any]) -> Tensor:
        ids, held = given.get("input_ids"), cache.get_seq_length()
        why = self._why_not_serve(cache, given)
        if why is not None:
            raise _cannot_serve(why)
        assert isinstance(ids, Tensor)
        mask, fresh_pad = given.get("attention_mask"), None
        if not held and mask is not None:
            fresh_pad, why = left_padding(mask)
        elif cache.is_padded and mask is None:
            why = "attention_mask is missing, and what past_key_values holds is padded"
        if why is None:
            pad = cache.pad if held else fresh_pad
            pad = torch.zeros(len(ids), dtype=torch.int64, device=ids.device) if pad is None else pad
            why = why_not_places(mask, given.get("position_ids"), pad, held, ids)
        if why is not None:
            raise _cannot_serve(why)
        keep = given.get("logits_to_keep") or ids.shape[1]
        return cache.take_in(ids.long(), fresh_pad, min(keep, ids.shape[1]))

    def _why_not_serve(self, cache: CompiledCache, given: dict[str, Any]) -> str | None:
        if cache.memory is not self._memory:
            return "past_key_values was made by another accelerated model"
        unknown = next((n for n, v in given.items() if n not in KNOWN and v is not None and v is not False), None)
        if unknown is not None:
            return f"the compiled programs take no {unknown}"
        if given.get("use_cache") is False:
            return "use_cache=False was given together with past_key_values"
        ids, keep = given.get("input_ids"), given.get("logits_to_keep")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            return "input_ids must be [b s]"
        if not same_device(ids.device, self._memory.decoder.device):
            return f"input_ids is on {ids.device}, and the programs are on {self._memory.decoder.device}"
        if keep is not None and not isinstance(keep, int):
            return "logits_to_keep is no number"
        if cache.get_seq_length() and len(ids) != cache.batch_size:
            return f"input_ids has {len(ids)} rows, and past_key_values {cache.batch_size}"
        if ids.shape[1] > 1 or self._unchanged.written():
            return why_not_now(self.model, self._unchanged)
        return "the model is in training mode" if self.model.training else None


def _cannot_serve(why: str) -> InputError:
    return InputError(
        "the accelerated model cannot go on from past_key_values",
        why=why,
        todo="pass past_key_values=None, or call restore() of accelerate and start anew",
    )


class _Replaced:
    """Stands in for a method of a model. A copy of the model, and a pickled one, has its own method again."""

    def __init__(self, owner: Accelerated, name: str, own: Callable[..., Any], call: Callable[..., Any]) -> None:
        functools.update_wrapper(self, own)  # transformers reads the signature
        self._owner, self._name, self._call = owner, name, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # whatever the model's own method takes
        return self._call(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _own_method, (self._owner.model, self._name, self._owner._before[self._name])


def _own_method(model: Any, name: str, before: Any) -> Any:
    return types.MethodType(getattr(type(model), name), model) if before is None else before
