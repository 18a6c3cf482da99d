"""What an attention becomes in ONNX, and why: decided in one place, for the program and for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from trilithon.passes import bound_arguments
from trilithon.rewrite.fuse_attention import SITE
from trilithon.rewrite.op import ATTENTION
from trilithon.spec.bias_text import parse_bias
from trilithon.spec.float_term import fits
from trilithon.spec.mask import Mask, parts
from trilithon.spec.masks import Causal, Padding, parse

Kind = Literal["causal", "full", "mask", "decomposed"]


@dataclass(frozen=True)
class Form:
    """What one site becomes.

    Attributes:
        kind: `Attention` with is_causal=1, without a mask, with one, or none: matmul, softmax, matmul.
        why: of a mask what it holds, of a decomposed site what `Attention` cannot say.
        has_empty_rows: a query may be left without any key.
    """

    kind: Kind
    why: str = ""
    has_empty_rows: bool = False

    def __str__(self) -> str:
        words = {"causal": "ONNX Attention, is_causal=1", "full": "ONNX Attention, no mask"}
        if self.kind in words:
            return words[self.kind]
        return f"ONNX Attention, {self.why}" if self.kind == "mask" else f"matmul-softmax-matmul: {self.why}"


def form_of(arguments: dict[str, Any]) -> Form:
    """The form of a call of `trilithon::attention`, whose arguments are tensors, real or fake, by name."""
    a, q, k = arguments, arguments["q"], arguments["k"]
    mask, placed = parse(a["mask"]), a["q_start"] is not None or a["k_positions"] is not None
    square = same_size(q.shape[2], k.shape[2]) and not placed
    empty = _has_empty_rows(mask, square, placed)
    why = _why_decomposed(a)
    if why is not None:
        return Form("decomposed", why, empty)
    if not a["bias"] and not placed and not parts(mask):
        return Form("full")
    if not a["bias"] and square and a["mask"] == "causal":
        return Form("causal")
    return Form("mask", _words(a, square), empty)


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Are they equal, whatever the sizes of the inputs?"""
    return statically_known_true(a == b)


def _why_decomposed(a: dict[str, Any]) -> str | None:
    q: Tensor = a["q"]
    if a["softcap"]:
        return "versions of Attention differ in whether its softcap comes before the mask"
    if a["sinks"] is not None:
        return "Attention has no sinks"
    if not _fits(a["bias"], a["tables"] or (), q.dtype):
        return f"its bias loses digits in {q.dtype}"
    return None


def _fits(bias: str, tables: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Attention adds what has its operands' type."""
    return not bias or fits(parse_bias(bias, len(tables)), {str(i): x.dtype for i, x in enumerate(tables)}, dtype)


def _words(a: dict[str, Any], square: bool) -> str:
    shown = [f"mask {a['mask']}"] if a["mask"] != "full" else []
    shown += ["bias by position"] if a["bias"] else []
    more = "" if square or a["mask"] != "causal" else " (queries and keys may differ in number)"
    return " and ".join(shown) + more


def _has_empty_rows(mask: Mask, square: bool, placed: bool) -> bool:
    """May some query see no key? As many keys as queries: each sees its own; and a causal one sees the first."""
    if placed or any(isinstance(part, Padding) for part in parts(mask)):
        return True
    return not square and not all(isinstance(part, Causal) for part in parts(mask))


def forms(gm: torch.fx.GraphModule) -> dict[str, Form]:
    """The form of each canonical site of a graph, by its name."""
    found = {}
    for node in gm.graph.nodes:
        if node.target is ATTENTION:
            given = {name: _value(x) for name, x in bound_arguments(node).items()}
            found[node.meta.get(SITE, node.name)] = form_of(given)
    return found


def _value(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return [_value(x) for x in argument]
    return argument.meta["val"] if isinstance(argument, torch.fx.Node) else argument
