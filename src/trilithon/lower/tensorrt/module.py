"""A built program as something to call: its engine on the GPU; on a machine without one, its network, interpreted."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from mmap import mmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from trilithon.errors import CannotLower, InputError
from trilithon.lower.tensorrt.capability import Form
from trilithon.lower.tensorrt.engine import Engine
from trilithon.lower.tensorrt.execute import Executor
from trilithon.lower.tensorrt.interpret import interpret
from trilithon.lower.tensorrt.network import Network

FORMS: dict[Form, str] = {
    "fused": "IAttention",
    "decomposed": "matmul-softmax-matmul",
    "summed": "products added up in float32",
}


class TensorRTModule:
    """One program.

    Attributes:
        engine: what was built.
        network: what it was built from; None where the engine was read from a file.
        weights: what the engine reads beside its inputs, by name; where there is a network, the network's.
        plan: the engine's file, mapped when it was checked; None = it is opened when the engine is loaded.
    """

    def __init__(
        self,
        engine: Engine,
        network: Network | None = None,
        weights: Mapping[str, Tensor] | None = None,
        plan: mmap | None = None,
    ) -> None:
        self.engine, self.network, self.plan = engine, network, plan
        self.weights = (weights or {}) if network is None else network.weights

    def __call__(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """One output, or several; an input that the program writes to (a cache) is changed.

        Args:
            tensors: one for each input, in order.

        Raises:
            InputError: a size is outside the engine's range.
            CannotLower: the engine cannot run here.
        """
        if len(tensors) != len(self.engine.inputs):
            raise InputError(f"{self.engine.plan.stem} takes {len(self.engine.inputs)} tensors, got {len(tensors)}")
        outputs = self._executor(*tensors) if tensors[0].is_cuda else self._interpret(tensors)
        return outputs[0] if len(outputs) == 1 else outputs

    @cached_property
    def _executor(self) -> Executor:
        return Executor(self.engine, self.weights, self.plan)

    @torch.no_grad()
    def _interpret(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        engine = self.engine
        if self.network is None:
            raise CannotLower(
                f"the engine {engine.plan.stem} cannot run on the CPU",
                why=f"it was built for {engine.target} and read from a file",
                todo="move the inputs to the GPU",
            )
        named = dict(zip((spec.name for spec in engine.inputs), tensors, strict=True))
        definition = self.network.definition
        used = {definition.get_input(i).name for i in range(definition.num_inputs)}
        outputs = interpret(self.network, {name: x for name, x in named.items() if name in used})
        for name, updated in engine.aliases.items():
            named[name].copy_(outputs[updated])
        return tuple(outputs[name] for name in engine.outputs if name not in engine.aliases.values())


def site_forms(modules: Mapping[str, Any]) -> dict[str, str]:
    """Name of a site -> what it became in each of the programs, in words.

    Args:
        modules: name of a program -> as lowered; those that are no engine are left out.
    """
    found: dict[str, list[str]] = {}
    for program, module in modules.items():
        if not isinstance(module, TensorRTModule):
            continue
        fused = {path for layer in module.engine.layers if layer.is_attention for path in layer.modules}
        for site in module.engine.sites:
            kernels = "one kernel" if site.name in fused and site.form != "summed" else "several kernels"
            found.setdefault(site.name, []).append(f"{program}: {FORMS[site.form]} ({site.reason}), {kernels}")
    return {name: "; ".join(texts) for name, texts in found.items()}


class Part(nn.Module):
    """An engine as a submodule."""

    def __init__(self, engine: TensorRTModule) -> None:
        super().__init__()
        self.engine = engine

    def forward(self, *tensors: Tensor) -> Any:
        return self.engine(*tensors)


class Split(nn.Module):
    """A program of several engines with PyTorch in between.

    Attributes:
        kept: name of a node that stays in PyTorch because TensorRT cannot take it -> why.
    """

    def __init__(self, whole: GraphModule, kept: Mapping[str, str]) -> None:
        super().__init__()
        self.whole, self.kept = whole, dict(kept)

    def forward(self, *tensors: Tensor) -> Any:
        return self.whole(*tensors)

    @property
    def engines(self) -> list[TensorRTModule]:
        return [part.engine for part in self.whole.children() if isinstance(part, Part)]
