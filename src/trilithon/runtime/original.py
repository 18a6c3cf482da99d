"""The model that was compiled, as it was: the logits that a decoder's are held to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves

from trilithon.errors import VerificationFailed
from trilithon.prove.locality import TokenInputs

WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}


@dataclass(frozen=True)
class Original:
    """A model without a cache.

    Attributes:
        module: a user's model, or a captured program.
        call: the module and its token inputs, by name, to what it gives.
        inputs: names.
        given: what else it takes, of as many rows as there are tokens; empty but for a model with a context.
        held: fake tensors of its inputs, as captured.
    """

    module: nn.Module
    call: Callable[[nn.Module, Mapping[str, Tensor]], Any]
    inputs: TokenInputs
    given: Mapping[str, Tensor]
    held: Mapping[str, Tensor]

    def logits(self, ids: Tensor, tokens: list[slice], vocabulary: int) -> Tensor:
        """`[b n v]`, the logits at `tokens` (as many in each row) of rows `ids [b s]`."""
        full = self._run(ids, vocabulary)
        if full.dim() == 3 and full.shape[1] == ids.shape[1]:
            return torch.stack([row[part] for row, part in zip(full, tokens, strict=True)])
        ends = range(min(part.start for part in tokens), max(part.stop for part in tokens))
        last = {end: self._run(ids[:, : end + 1], vocabulary).view(len(ids), vocabulary) for end in ends}
        rows = [torch.stack([last[end][row] for end in range(part.start, part.stop)]) for row, part in enumerate(tokens)]
        return torch.stack(rows)

    def _run(self, ids: Tensor, vocabulary: int) -> Tensor:
        """Logits `[b s v]` of all tokens, or `[b v]` or `[b 1 v]` of the last."""
        values = {**self.given, self.inputs.tokens: ids}
        if self.inputs.positions is not None:
            values[self.inputs.positions] = _positions(self.held[self.inputs.positions], ids)
        for leaf in tree_leaves(self.call(self.module, values)):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape[-1] == vocabulary:
                return leaf
        raise VerificationFailed(f"the model gives no logits of {vocabulary} tokens", todo="please report this")

    def widened(self) -> Original:
        """The same in a wider type: float64 for float32, float32 for halves."""
        module = self.module
        copied = widened(module) if isinstance(module, GraphModule) else _module_widened(module)
        return Original(copied, self.call, self.inputs, {name: wide(x) for name, x in self.given.items()}, self.held)


def original_model(
    model: nn.Module,
    constants: Mapping[str, Any],
    held: Mapping[str, Tensor],
    inputs: TokenInputs,
    given: Mapping[str, Tensor],
) -> Original:
    """A user's own model, called with keywords.

    Args:
        constants: arguments that were fixed when it was captured.
        held, inputs, given: as `Original` has them.
    """
    return Original(model, lambda module, values: module(**constants, **values), inputs, given, held)


def original_program(
    program: GraphModule, held: Mapping[str, Tensor], inputs: TokenInputs, given: Mapping[str, Tensor]
) -> Original:
    """A captured program, which takes the inputs `held` in order."""
    return Original(program, lambda module, values: module(*(values[name] for name in held)), inputs, given, held)


def _positions(held: Tensor, ids: Tensor) -> Tensor:
    """Of tokens `[b s]` the positions, of the shape and type that they were captured with: `[s]`, `[1 s]` or `[b s]`."""
    found = torch.arange(ids.shape[1], device=ids.device, dtype=held.dtype)
    if held.dim() == 1:
        return found
    return found[None] if isinstance(held.shape[0], int) and held.shape[0] == 1 else found.expand(ids.shape)


def wide(x: Any) -> Any:
    """A tensor or a type, made wider where it is floating."""
    if isinstance(x, Tensor):
        return x.to(WIDER.get(x.dtype, x.dtype))
    return WIDER.get(x, x) if isinstance(x, torch.dtype) else x


def widened(gm: GraphModule) -> GraphModule:
    """The program in a wider type: its weights, and each type that a node names."""
    copied = copy.deepcopy(gm)
    for part in copied.modules():
        part._buffers = {name: wide(x) for name, x in part._buffers.items()}
        part._parameters = {name: nn.Parameter(wide(x), requires_grad=False) for name, x in part._parameters.items()}
    for node in copied.graph.nodes:
        node.args, node.kwargs = map_aggregate(node.args, wide), map_aggregate(node.kwargs, wide)
    copied.recompile()
    return copied


def _module_widened(model: nn.Module) -> nn.Module:
    dtype = next((x.dtype for x in model.parameters()), torch.float32)
    return copy.deepcopy(model).to(WIDER.get(dtype, dtype))
