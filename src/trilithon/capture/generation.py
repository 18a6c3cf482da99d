"""What the generation config of an encoder-decoder asks of `generate`: arguments, logits processors, or what it cannot do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from trilithon.errors import InputError

ARGUMENTS = (  # of `trilithon.runtime.generate.generate`, under the same names
    "eos_token_id",
    "pad_token_id",
    "max_length",
    "max_new_tokens",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "stop_strings",
)

REFUSED: dict[str, tuple[Any, ...]] = {  # and the values that ask for nothing
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "diversity_penalty": (0.0,),
    "guidance_scale": (1.0,),
    "penalty_alpha": (0.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "renormalize_logits": (False,),
    "top_h": (),
    "constraints": (),
    "force_words_ids": (),
    "dola_layers": (),
    "max_time": (),
    "watermarking_config": (),
}

INITIAL = ("lang_to_id", "no_timestamps_token_id", "forced_decoder_ids")  # Whisper's decoder does not start with one token


@dataclass(frozen=True)
class Lengths:
    """Of one call.

    Attributes:
        prompt: tokens of the decoder's prompts.
        most: tokens of its rows at the end.
        eos: tokens that finish a row.
        device: of the scores.
        begin: tokens before the first that the model chooses; a forced first token counts.
    """

    prompt: int
    most: int
    eos: torch.Tensor | None
    device: torch.device
    begin: int = 0


def _hf() -> Any:
    """Imported where a model asks for it: it takes longer than to load a compiled model of others."""
    import transformers

    return transformers


def _begin_suppress(tokens: Any, at: Lengths) -> Any:
    return _hf().SuppressTokensAtBeginLogitsProcessor(tokens, at.begin, device=str(at.device))


def _min_length(least: int, at: Lengths) -> Any:
    return None if at.eos is None or not least else _hf().MinLengthLogitsProcessor(least, at.eos, device=str(at.device))


def _decay(penalty: Any, at: Lengths) -> Any:
    return None if at.eos is None else _hf().ExponentialDecayLengthPenalty(penalty, at.eos, at.prompt)


Make = Callable[[Any, Lengths], Any]
PROCESSORS: dict[str, Make] = {  # in the order in which transformers applies them
    "sequence_bias": lambda bias, at: _hf().SequenceBiasLogitsProcessor(bias),
    "no_repeat_ngram_size": lambda n, at: _hf().NoRepeatNGramLogitsProcessor(n) if n else None,
    "bad_words_ids": lambda words, at: _hf().NoBadWordsLogitsProcessor(words, at.eos),
    "min_length": _min_length,
    "forced_bos_token_id": lambda token, at: _hf().ForcedBOSTokenLogitsProcessor(token),
    "forced_eos_token_id": lambda token, at: _hf().ForcedEOSTokenLogitsProcessor(at.most, token, device=str(at.device)),
    "remove_invalid_values": lambda on, at: _hf().InfNanRemoveLogitsProcessor() if on else None,
    "exponential_decay_length_penalty": _decay,
    "suppress_tokens": lambda tokens, at: _hf().SuppressTokensLogitsProcessor(tokens, device=str(at.device)),
    "begin_suppress_tokens": _begin_suppress,
}


@dataclass(frozen=True)
class GenerationSettings:
    """What a model's own configuration asks of `generate`.

    Attributes:
        arguments: defaults of its arguments.
        processors: names of `PROCESSORS` and their values.
        refused: what `generate` has not.
        start: the token that the decoder starts with; None where more than one token is needed, or none is known.
        prepends: put `start` before the decoder's tokens that a caller gives, as transformers does.
    """

    arguments: Mapping[str, Any]
    processors: Mapping[str, Any]
    refused: Mapping[str, Any]
    start: int | None
    prepends: bool

    def check(self) -> None:
        """Raises InputError where the configuration asks for what `generate` has not."""
        for name, value in self.refused.items():
            raise InputError(
                f"the model's generation config asks for {name}={value!r}",
                why="generate has no such setting, and without it the tokens would be others",
                todo=f"set model.generation_config.{name} = None before the model is compiled",
            )

    def make_processors(self, lengths: Lengths) -> tuple[Any, ...]:
        """Transformers' own logits processors for one call."""
        forced = lengths.prompt == 1 and "forced_bos_token_id" in self.processors
        lengths = replace(lengths, begin=lengths.prompt + forced)
        made = (make(self.processors[name], lengths) for name, make in PROCESSORS.items() if name in self.processors)
        return tuple(processor for processor in made if processor is not None)


def generation_settings(model: Any) -> GenerationSettings:
    """Read a model's configuration; of a module that is no transformers model nothing is asked."""
    config = getattr(model, "generation_config", None)
    held = {name: value for name in (*ARGUMENTS, *PROCESSORS, *REFUSED) if _is_set(value := getattr(config, name, None))}
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        start = getattr(config, "bos_token_id", None)
    if any(_is_set(getattr(config, name, None)) for name in INITIAL):
        start = None
    kind = f"{type(model).__name__} {getattr(getattr(model, 'config', None), 'model_type', '')}".lower()
    return GenerationSettings(
        arguments={name: held[name] for name in ARGUMENTS if name in held},
        processors={name: held[name] for name in PROCESSORS if name in held},
        refused={name: held[name] for name in REFUSED if name in held and held[name] not in REFUSED[name]},
        start=start,
        prepends="whisper" not in kind and "donut" not in kind,
    )


def _is_set(value: Any) -> bool:
    return value is not None and not (isinstance(value, (list, tuple, dict)) and not value)
