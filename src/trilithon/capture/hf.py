"""The one door to Hugging Face transformers: loading its models, and how to export them."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils.hub import cached_file

from trilithon.capture.examples import make_example
from trilithon.capture.presets import PRESETS as PRESETS
from trilithon.capture.source import loaded
from trilithon.capture.source import source_of as source_of
from trilithon.errors import InputError

LENGTHS = ("max_position_embeddings", "max_target_positions", "max_seq_len")  # what configurations call their most tokens
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)  # a model with none of them has no tokenizer


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    layers: int | None = None,
    attention: str = "sdpa",
    seed: int = 0,
) -> nn.Module:
    """Load a preset, a local folder or a hub id, in eval mode.

    Args:
        name: a key of `PRESETS`, a path to a folder in Hugging Face format, or a hub id.
        dtype: of the weights.
        device: "meta" gives the architecture without weights.
        layers: keep only the first layers (without weights or with random ones only); None = all.
        attention: transformers' `attn_implementation`, "sdpa" or "eager".
        seed: of random weights.

    Raises:
        InputError: no preset of that name, no such folder, and no such hub id; or `layers` with real weights, or with an
            architecture whose layers cannot be cut.
    """
    preset = PRESETS.get(name.lower())
    if preset is not None and preset.config is not None:
        config = preset.config()
        if layers is not None:
            config = _truncated(config, layers, name)
        made = from_config(config, dtype=dtype, device=device, attention=attention, seed=seed)
        return loaded(made, "preset", name.lower(), f"random weights, seed {seed}")
    source = preset.folder() if preset is not None and preset.folder is not None else _source(name)
    config = _from_pretrained(transformers.AutoConfig, source)
    if str(device) == "meta":
        config = config if layers is None else _truncated(config, layers, name)
        return from_config(config, dtype=dtype, device=device, attention=attention, seed=seed)
    if layers is not None:
        raise InputError(
            f"layers={layers} with the weights of {name}",
            why="a trained model cannot be cut",
            todo='leave it out, or load with device="meta", without weights',
        )
    model = _from_pretrained(_auto_class(config), source, dtype=dtype, attn_implementation=attention)
    model = model.to(device).eval()
    if preset is not None:
        return loaded(model, "preset", name.lower())
    if isinstance(source, Path):
        return loaded(model, "folder", source.resolve().name)
    return loaded(model, "hub", name, getattr(model.config, "_commit_hash", None))


def _truncated(config: Any, layers: int, name: str) -> Any:
    """The config with its first layers only, and so every list of it that has an entry a layer."""
    total = getattr(config, "num_hidden_layers", None)
    if not isinstance(total, int) or config.is_encoder_decoder:
        raise InputError(
            f"layers={layers} with {name}",
            why=f"{type(config).__name__} does not describe one stack of num_hidden_layers layers",
            todo="leave it out",
        )
    if not 1 <= layers <= total:
        raise InputError(f"layers={layers} is not between 1 and {total}, the layers of {name}")
    config.num_hidden_layers = layers
    for field, value in list(vars(config).items()):
        if "layer" in field and isinstance(value, list) and len(value) == total:
            setattr(config, field, value[:layers])
    return config


def from_config(
    config: Any,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: str = "sdpa",
    seed: int = 0,
) -> nn.Module:
    """A model with random weights; on device "meta", without weights."""
    config._attn_implementation = attention
    torch.manual_seed(seed)
    with torch.device(device):
        model = _auto_class(config).from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval()  # type: ignore[no-any-return]


def _auto_class(config: Any) -> Any:
    if config.is_encoder_decoder and type(config) in transformers.AutoModelForSeq2SeqLM._model_mapping:
        return transformers.AutoModelForSeq2SeqLM
    causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
    wants = any("CausalLM" in a or "LMHead" in a for a in (config.architectures or []))
    encoder = config.model_type in ("bert", "roberta", "distilbert", "electra", "albert", "mpnet")
    return transformers.AutoModelForCausalLM if causal and (wants or not encoder) else transformers.AutoModel


def _source(name: str) -> str | Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if os.sep in name and not path.exists() and name.count("/") != 1:
        raise _unknown(name, f"the folder {name} does not exist")
    if "/" not in name:
        raise _unknown(name, "it is no preset and no folder")
    return name


def _unknown(name: str, why: str) -> InputError:
    import difflib

    close = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return InputError(
        f"unknown model {name!r}", why=why, todo=f"{hint}presets: {', '.join(PRESETS)}; or a folder, or a hub id like org/model"
    )


def _from_pretrained(kind: Any, source: str | Path, **options: Any) -> Any:
    try:
        return kind.from_pretrained(source, local_files_only=isinstance(source, Path), **options)
    except (OSError, ValueError) as error:
        raise _cannot_load(source, error) from error


def _cannot_load(source: str | Path, error: Exception) -> InputError:
    why = str(error).splitlines()[0]
    if isinstance(source, Path):
        return InputError(f"cannot load {source}", why=why, todo="pass a folder as save_pretrained writes it")
    return _unknown(source, why)


def load_tokenizer(name: str) -> Any | None:
    """The tokenizer of a preset, folder or hub id, or None where there is none.

    Raises:
        InputError: no such model, or its tokenizer cannot be loaded.
    """
    preset = PRESETS.get(name.lower())
    if preset is not None and preset.folder is None:
        return None
    source = preset.folder() if preset is not None and preset.folder is not None else _source(name)
    return _from_pretrained(transformers.AutoTokenizer, source) if _has_tokenizer(source) else None


def _has_tokenizer(source: str | Path) -> bool:
    if isinstance(source, Path):
        return any((source / file).is_file() for file in TOKENIZER_FILES)
    try:
        return any(cached_file(source, file, _raise_exceptions_for_missing_entries=False) for file in TOKENIZER_FILES)
    except OSError as error:
        raise _cannot_load(source, error) from error


def register_operations() -> None:
    """Let PyTorch know the operations that transformers' exported programs may call."""
    with suppress(ImportError):
        importlib.import_module("transformers.integrations.moe")


def is_hf(model: object) -> bool:
    return isinstance(model, transformers.PreTrainedModel)


def is_causal_lm(model: Any) -> bool:
    """Does transformers generate with it, a token at a time behind tokens? Its masks and its cache are for proofs to find."""
    if not is_hf(model) or model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        return False
    return bool(model.can_generate()) and model.get_output_embeddings() is not None


def text_config(model: Any) -> Any | None:
    """The configuration of a Hugging Face model's text stack, or of one that a wrapper holds as `model`; else None."""
    inner: Any = model if is_hf(model) else getattr(model, "model", None)
    return inner.config.get_text_config() if is_hf(inner) else None


def usual_inputs(model: Any) -> tuple[str, ...]:
    """The tensors that a model is usually called with: ids and positions of a causal LM, ids and padding of an encoder."""
    return input_choices(model)[0]


def input_choices(model: Any) -> tuple[tuple[str, ...], ...]:
    """What to capture a model with, the usual inputs first, and what to try where these give no cache."""
    takes, first = inspect.signature(model.forward).parameters, model.main_input_name
    choices: tuple[tuple[str, ...], ...] = ((first, "attention_mask") if first == "input_ids" else (first,),)
    if "decoder_input_ids" in takes:
        choices = (*((*names, "decoder_input_ids") for names in choices), (first, "decoder_input_ids"))
    elif is_causal_lm(model):
        choices = ((first, "position_ids"), (first,))
    return tuple(dict.fromkeys(tuple(name for name in names if name in takes) for names in choices))


def max_positions(model: nn.Module) -> int:
    return int(getattr(model.config, "max_position_embeddings", None) or 1 << 20)


def example_for(model: nn.Module, inputs: tuple[str, ...], max_batch: int = 1 << 16) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments and dynamic shapes that export `model` with these inputs.

    Args:
        inputs: names among those of `trilithon.capture.examples.AXES`.
        max_batch: upper bound of the batch axis.

    Raises:
        InputError: a name is none of them, or the model does not take it.
    """
    takes = inspect.signature(model.forward).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values()):
        for name in inputs:
            if name not in takes:
                raise InputError(f"{type(model).__name__} takes no {name}", todo=f"it takes {', '.join(takes)}")
    parameter = next(model.parameters())
    longest = min(getattr(model.config, name, None) or 1 << 20 for name in LENGTHS)
    example, shapes = make_example(model.config, inputs, longest, max_batch, parameter.dtype, parameter.device)
    if "use_cache" in takes:
        example["use_cache"], shapes["use_cache"] = False, None
    return example, shapes


def sharing_weights(model: nn.Module, attention: str | None = None) -> nn.Module:
    """A copy of a Hugging Face model that holds the same tensors, and nothing that `generate` left in `model`.

    Args:
        attention: transformers' `attn_implementation` of the copy; None = that of `model`.

    Raises:
        InputError: the model cannot attend so.
    """
    tensors = [*model.parameters(), *model.buffers()]
    made: Any = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for left in ("_compiled_call", "_previous_max_cache_length"):  # the first runs `model`, whose method it is
        vars(made).pop(left, None)
    if attention is None:
        return made  # type: ignore[no-any-return]
    made.set_attn_implementation(attention)
    if made.config._attn_implementation != attention:  # transformers warns only
        raise InputError(
            f"cannot attend by {attention}", why=f"transformers has {type(model).__name__} with its own attention alone"
        )
    return made  # type: ignore[no-any-return]


def generation_defaults(model: object) -> dict[str, Any]:
    """The model's own `eos_token_id` and `pad_token_id`, for `generate`."""
    config = getattr(model, "generation_config", None) if is_hf(model) else None
    names = ("eos_token_id", "pad_token_id")
    return {name: value for name in names if (value := getattr(config, name, None)) is not None}
