"""Exports that tests share: most of a test's time with a Hugging Face model is torch.export, of a model exported before.

A transformers model is known by its class, configuration, modules with their settings, and the kinds and names of its
tensors; what is exported depends on nothing else, because weights are inputs of a program. The next model of that
description takes the program with its own weights. A module that a test wrote, hooked or patched is exported each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from transformers import PreTrainedModel

from trilithon.capture import export
from trilithon.capture.export import Captured
from trilithon.rewrite.program import working_copy

MOST = 100  # programs that are kept, of some megabytes each
Capture = Callable[[nn.Module, Mapping[str, Any], Any], Captured]


def shared(capture: Capture) -> Capture:
    """`capture`, which exports what it has not seen yet."""
    kept: dict[str, Captured] = {}

    def once(model: nn.Module, example: Mapping[str, Any], shapes: Any) -> Captured:
        if not is_plain(model):
            return capture(model, example, shapes)
        key = description(model, example, shapes)
        if key not in kept:
            made = capture(model, example, shapes)
            kept[key] = replace(made, program=with_tensors(made.program, {}))
            if len(kept) > MOST:
                del kept[next(iter(kept))]
            return made
        found = kept[key] = kept.pop(key)  # the latest one comes last
        return replace(found, program=with_tensors(found.program, tensors_of(model)))

    return once


def is_plain(model: nn.Module) -> bool:
    """Whether transformers wrote all of it, and no test has changed it."""
    return isinstance(model, PreTrainedModel) and all(
        type(m).__module__.startswith(("transformers.", "torch.nn."))
        and "forward" not in vars(m)
        and not (m._forward_hooks or m._forward_pre_hooks)
        for m in model.modules()
    )


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict(keep_vars=True) | dict(model.named_buffers())


def description(model: nn.Module, example: Mapping[str, Any], shapes: Any) -> str:
    """All that a program depends on."""
    config: Any = model.config
    settings = {name: settings_of(module) for name, module in model.named_modules()}
    firsts = {id(x): name for name, x in reversed(tensors_of(model).items())}  # a program takes a tensor of several names once
    tensors = {name: (kind(x), x.requires_grad, firsts[id(x)]) for name, x in tensors_of(model).items()}
    given = {name: kind(x) for name, x in example.items()}
    parts = (type(model), config.to_json_string(use_diff=False), model, settings, tensors, given, shapes, export.ROUTES)
    return "\n".join(map(str, parts))


def settings_of(module: nn.Module) -> dict[str, Any]:
    """What a module's code may branch on: its own plain values, and which attention its configuration asks for."""
    plain = {name: x for name, x in vars(module).items() if x is None or isinstance(x, bool | int | float | str)}
    return plain | {"attention": getattr(getattr(module, "config", None), "_attn_implementation", None)}


def kind(value: Any) -> str:
    return f"{value.dtype} {value.device} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def with_tensors(program: ExportedProgram, tensors: dict[str, Tensor]) -> ExportedProgram:
    """A copy with these weights; those that are missing become meta tensors, so that no model is kept alive."""
    gm, _ = working_copy(program)
    return ExportedProgram(
        root=gm,
        graph=gm.graph,
        graph_signature=program.graph_signature,
        state_dict={name: tensors[name] if name in tensors else _on_meta(x) for name, x in program.state_dict.items()},
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants={name: tensors.get(name, x) for name, x in program.constants.items()},
        verifiers=[program.verifier],
    )


def _on_meta(value: Tensor) -> Tensor:
    meta = torch.empty_like(value, device="meta")
    return nn.Parameter(meta, requires_grad=False) if isinstance(value, nn.Parameter) else meta
