"""When the compiled programs may stand in for a model's own forward: every reason against it is here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.generation.configuration_utils import GenerationMode

from trilithon.runtime.memory import Memory

# What forward may be given; anything else must be None or False.
KNOWN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict"}
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


class Unchanged:
    """Whether a model is still what was compiled: the same weights, never written to, and no hooks that were not there.

    A write through `weight.data` is not seen: neither torch nor Python notes it. Native programs share the weights and so
    follow it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tensors = _tensors(model)
        self._stamps = [_stamp(t) for t in self._tensors]
        self._versioned = [t for t in self._tensors if not t.is_inference()]
        self._versions = [t._version for t in self._versioned]
        self._hooks = _hooks(model)

    def written(self) -> bool:
        """Whether a weight was written to. Takes microseconds: asked before every step."""
        return [t._version for t in self._versioned] != self._versions

    def why_not(self) -> str | None:
        """What has changed, or None."""
        now = _tensors(self._model)
        same = len(now) == len(self._tensors) and all(a is b for a, b in zip(now, self._tensors, strict=True))
        if not same or self.written() or [_stamp(t) for t in now] != self._stamps:
            return "its weights have changed since it was compiled"
        if _hooks(self._model) - self._hooks:
            return "hooks were registered in its modules since it was compiled, and compiled programs call none"
        return None


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _stamp(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.device


def _hooks(model: nn.Module) -> set[tuple[int, int]]:
    """The forward hooks below the model itself, and replaced forwards; hooks of transformers gather outputs and change none."""
    below = [module for module in model.modules() if module is not model]
    registered = {
        (id(module), key)
        for module in below
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for key, hook in hooks.items()
        if not str(getattr(hook, "__module__", "")).startswith("transformers.")
    }
    return registered | {(id(module), id(vars(module)["forward"])) for module in below if "forward" in vars(module)}


def why_not_now(model: nn.Module, unchanged: Unchanged) -> str | None:
    """What in the state of the model or of torch stands against the compiled programs, whatever the call."""
    if model.training:
        return "the model is in training mode"
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        return f"autocast is on for {device}, and the programs were compiled without"
    if any(getattr(torch_module, name) for name in GLOBAL_HOOKS):
        return "a global forward hook is registered, and compiled programs call none"
    return unchanged.why_not()


def why_not_generate(
    config: Any, given: Mapping[str, Any], mode: GenerationMode, batch_size: int, columns: int, memory: Memory
) -> str | None:
    """What in a call of `generate` stands against the compiled programs.

    Args:
        config: the call's `GenerationConfig`.
        given: the arguments that `generate` will give to forward.
        batch_size: prompts.
        columns: tokens of a row that its cache would have to hold, padding included.
    """
    if config.cache_implementation not in (None, "dynamic"):
        return f"cache_implementation={config.cache_implementation!r} asks for another cache"
    if getattr(config, "is_assistant", False):
        return "it drafts for another model"
    for name in ("output_attentions", "output_hidden_states", "use_mtp"):
        if getattr(config, name, None):
            return f"{name} needs what happens inside the model"
    unknown = next((name for name, value in given.items() if name not in KNOWN and _says_something(value)), None)
    if unknown is not None:
        return f"the compiled programs take no {unknown}"
    if isinstance(given.get("logits_to_keep"), Tensor):
        return "logits_to_keep is a tensor"
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    copies = max(config.num_beams or 1, config.num_return_sequences or 1)
    rows = max([batch_size * copies, *(len(x) for x in (mask, positions) if isinstance(x, Tensor))])
    if rows > memory.decoder.max_batch:
        return f"{rows} rows do not fit a cache of {memory.decoder.max_batch}; accelerate with Options(max_batch={rows})"
    columns += mode == GenerationMode.ASSISTED_GENERATION  # its last window holds a draft more
    if columns > memory.decoder.cache_tokens:
        return f"{columns} tokens do not fit a cache of {memory.decoder.cache_tokens}; accelerate with max_tokens={columns}"
    pad, why = (None, None) if mask is None else left_padding(mask)
    if why is not None:
        return why
    if pad is not None and config.prefill_chunk_size is not None:
        return "prefill_chunk_size could make a chunk of padding only"
    if not isinstance(positions, Tensor):
        return None if positions is None else "position_ids is no tensor"
    pad = torch.zeros(len(positions), dtype=torch.int64, device=positions.device) if pad is None else pad
    return why_not_places(None, positions, pad, 0, positions)  # as many as the tokens: looked at again in forward


def _says_something(value: Any) -> bool:
    return value is not None and value is not False


def left_padding(mask: Any) -> tuple[Tensor | None, str | None]:
    """The left padding `[b]` of a mask, None where there is none; or why the mask is no left padding."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None, "attention_mask is not [b s]"
    pad = (mask == 0).sum(1)
    place = torch.arange(mask.shape[1], device=mask.device)
    good = ((mask != 0) == (place >= pad[:, None])).all() & ((mask == 0) | (mask == 1)).all() & (pad < mask.shape[1]).all()
    state = torch.stack([good, pad.any()]).tolist()
    if not state[0]:
        return None, "attention_mask is not left padding of zeros and ones"
    return (pad if state[1] else None), None


def why_not_places(mask: Any, positions: Any, pad: Tensor, start: int, ids: Tensor) -> str | None:
    """Why tokens do not stand where the programs take them to stand; None where they do. Reads the device once.

    Args:
        mask: `[b n]` of all columns up to these tokens, or None: it is not looked at.
        positions: `[b s]`, or `[1 s]` for all rows; what stands in the padding does not matter. None = as they should be.
        pad: `[b]`, left padding.
        start: columns before these tokens.
        ids: `[b s]`, these tokens.
    """
    rows, columns = len(ids), start + ids.shape[1]
    checks: list[tuple[str, Tensor]] = []
    place = torch.arange(columns, device=pad.device)
    if mask is not None:
        if not isinstance(mask, Tensor) or tuple(mask.shape) != (rows, columns):
            return f"attention_mask is {_shape(mask)}, and there are {columns} tokens in {rows} rows"
        checks.append(("attention_mask has another padding than what is held", (mask == (place >= pad[:, None])).all()))
    if positions is not None:
        if not isinstance(positions, Tensor) or tuple(positions.shape) not in ((1, columns - start), (rows, columns - start)):
            return f"position_ids is {_shape(positions)}, and input_ids {_shape(ids)}"
        wanted = place[start:] - pad[:, None]
        good = ((positions == wanted) | (wanted < 0)).all()
        checks.append(("position_ids are not the places of the tokens in their rows", good))
    good_ones = torch.stack([good for _, good in checks]).tolist() if checks else []
    return next((why for (why, _), good in zip(checks, good_ones, strict=True) if not good), None)


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
