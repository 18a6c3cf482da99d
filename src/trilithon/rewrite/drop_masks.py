"""Take masks away from attention calls that need none: causal by torch's own flag, or every key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from trilithon.capture.dynamo import ARGUMENTS
from trilithon.capture.sites import Site
from trilithon.lift.meaning import Meaning
from trilithon.passes import Outcome
from trilithon.prove.program import Examined
from trilithon.prove.verdict import Proof, Verdict
from trilithon.spec.masks import Causal, Full, Mask

MASKS = ("attn_mask", "attn_bias")


@dataclass(frozen=True)
class DropMasks:
    """Give a call of attention its flag in place of its mask. The call stays what it is in everything else.

        %o = scaled_dot_product_attention(%q, %k, %v, %mask)  =>  %o = scaled_dot_product_attention(%q, %k, %v, None,
                                                                                                   is_causal=True)

    `calls`: a node of the graph -> what was proved of its mask, `Causal()` or `Full()`.
    What only the mask needed is left to the compiler that takes the graph: it may not be functional.
    """

    calls: Mapping[Node, Mask]
    name: ClassVar[str] = "drop-masks"

    def __call__(self, gm: GraphModule) -> Outcome:
        for node, mask in self.calls.items():
            names = _names(node)
            _set(node, names, next(name for name in MASKS if name in names), None)
            _set(node, names, "is_causal", isinstance(mask, Causal))
        return Outcome(len(self.calls))


def _names(node: Node) -> tuple[str, ...]:
    schema = getattr(node.target, "_schema", None)
    return ARGUMENTS if schema is None else tuple(argument.name for argument in schema.arguments)


def _set(node: Node, names: tuple[str, ...], name: str, value: Any) -> None:
    """By position where the operation has a schema: readers of ATen graphs, Torch-TensorRT's for one, look nowhere else."""
    schema, place = getattr(node.target, "_schema", None), names.index(name)
    if schema is not None and not schema.arguments[place].kwarg_only:
        given = [node.kwargs.get(a.name, a.default_value) for a in schema.arguments[len(node.args) : place + 1]]
        node.args = (*node.args, *given)
        node.kwargs = {key: held for key, held in node.kwargs.items() if key not in names[: len(node.args)]}
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)


def droppable(examined: Examined) -> tuple[Proof, ...]:
    """The proofs, those that need no guard first, by which a call needs no mask; none where it has none or needs it."""
    finding, meaning = examined.finding, examined.meaning
    if finding is None or meaning is None or not examined.is_proved or why_not_droppable(examined.site, meaning):
        return ()
    proofs = [p for p in (finding.proof, *finding.alternatives) if p.verdict is Verdict.PROVED and p.mask in (Causal(), Full())]
    return tuple(sorted(proofs, key=lambda proof: len(guards(proof))))


def guards(proof: Proof) -> tuple[Any, ...]:
    """What must be looked at in each call for the proof to hold."""
    return tuple(a for a in proof.assumptions if a.source not in ("export range", "op contract"))


def why_not_droppable(site: Site, meaning: Meaning) -> str | None:
    """Why a call must be given its mask whatever it was proved to be, or None."""
    if site.kind == "decomposed" or site.mask is None:
        return "it is no call of attention that is given a mask"
    if meaning.bias is not None or meaning.softcap is not None or meaning.sinks:
        return "its mask holds a bias"
    shape = list(map(str, site.mask.meta["val"].shape))
    scores = list(map(str, site.dims))[4 - len(shape) :]
    if any(size not in ("1", own) for size, own in zip(shape, scores, strict=True)):
        return f"its mask [{', '.join(shape)}] is larger than its scores"
    return None
