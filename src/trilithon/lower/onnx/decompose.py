"""Attention in terms of `trilithon::onnx_attention`, ATen operations, and masks made of proved terms.

Decompositions, as `ExportedProgram.run_decompositions` takes them: it traces them in the program's own sizes. Equal masks
of several layers become one when the ONNX graph is cleaned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from trilithon.capture.program import known_size
from trilithon.errors import CannotLower
from trilithon.lower.native.attention import attend_scores
from trilithon.lower.native.emit import blocked, emit_bias, emit_cells, emit_mask
from trilithon.lower.onnx.forms import form_of, same_size
from trilithon.lower.onnx.op import onnx_attention
from trilithon.rewrite.op import ATTENTION
from trilithon.spec.bias_text import parse_bias
from trilithon.spec.masks import parse

PLACES = ("q_start", "key_mask", "k_positions")
SDPA = torch.ops.aten.scaled_dot_product_attention.default


def canonical(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: str,
    scale: float,
    q_start: Tensor | None = None,
    key_mask: Tensor | None = None,
    k_positions: Tensor | None = None,
    bias: str = "",
    tables: Sequence[Tensor] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """`trilithon::attention`, as `forms.form_of` decides."""
    arguments = dict(locals())
    form = form_of(arguments)
    if form.kind in ("causal", "full"):
        return _attend(q, k, v, None, scale, form.kind == "causal")
    allowed, added = _mask_and_bias(arguments)
    if form.kind == "decomposed":
        return attend_scores(q, k, v, scale, allowed, added, softcap, sinks)
    seen = None
    if form.has_empty_rows and allowed is not None:
        allowed, seen = _fill_empty_rows(allowed)
    given = allowed if added is None else blocked(added, allowed, q.dtype)
    assert given is not None, "a form with a mask has one"
    return _zero_unless(_attend(q, k, v, _whole(given, q, k), scale, False), seen)


def as_exported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """SDPA that was not rewritten: with its own mask, whatever that is.

    Raises:
        CannotLower: it drops weights at random.
    """
    q, k, v = query, key, value
    if dropout_p:
        raise CannotLower("cannot export attention with dropout", todo="call model.eval(), and pass dropout_p=0.0")
    if scale is None:
        width = known_size(q.shape[-1])
        if width is None:
            todo = "give the last axis of its queries a fixed size in dynamic_shapes"
            raise CannotLower("cannot export attention", why="its scale follows from a width that is not fixed", todo=todo)
        scale = 1.0 / math.sqrt(width)
    if is_causal and not (_is_plain(q, k, v, None) and same_size(q.shape[2], k.shape[2])):
        is_causal = False
        attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if not _is_plain(q, k, v, attn_mask):
        return _written_out(q, k, v, attn_mask, scale, enable_gqa)
    if attn_mask is None:
        return _attend(q, k, v, None, scale, is_causal)
    mask, seen = _fill_empty_rows(_finite_lowest(attn_mask))
    mask = mask.reshape([1] * (4 - mask.dim()) + list(mask.shape))
    return _zero_unless(_attend(q, k, v, _whole(mask, q, k), scale, False), seen)


DECOMPOSITIONS: dict[Any, Any] = {ATTENTION: canonical, SDPA: as_exported}


@cache
def _maker(mask: str, bias: str, tables: int, given: tuple[bool, ...]) -> GraphModule:
    """What makes the mask and the bias, each None where there is none, of q, k, the places that are given, and the tables."""
    graph = Graph()
    q, k = graph.placeholder("q"), graph.placeholder("k")
    start, key_mask, positions = (graph.placeholder(n) if g else None for n, g in zip(PLACES, given, strict=True))
    read = [graph.placeholder(f"table_{i}") for i in range(tables)]
    cells = emit_cells(graph, q, k, start, positions)
    allowed = emit_mask(graph, parse(mask), cells, key_mask, positions is not None)
    added = emit_bias(graph, parse_bias(bias, tables), cells, read) if bias else None
    graph.output((allowed, added))
    graph.eliminate_dead_code()
    return GraphModule(torch.nn.Module(), graph)


def prepare(arguments: dict[str, Any]) -> GraphModule:
    """What makes the mask and the bias of a call. It is made before a program is traced: torch computes numbers of terms."""
    a = arguments
    return _maker(a["mask"], a["bias"], len(a["tables"] or ()), tuple(a[name] is not None for name in PLACES))


def _mask_and_bias(arguments: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    a = arguments
    places = (a[name] for name in PLACES if a[name] is not None)
    allowed, added = prepare(a)(a["q"], a["k"], *places, *(a["tables"] or ()))
    return allowed, added


def _whole(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """With an entry for each query and each key: ONNX Runtime does not broadcast these two axes."""
    return mask.expand(mask.shape[0], mask.shape[1], q.shape[2], k.shape[2])


def _fill_empty_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mask with rows that have no key opened, and which rows have one."""
    if mask.dtype == torch.bool:
        seen = mask.any(-1, keepdim=True)
        return mask | ~seen, seen
    seen = (mask > -torch.inf).any(-1, keepdim=True)
    return mask.masked_fill(~seen, 0.0), seen


def _finite_lowest(mask: Tensor) -> Tensor:
    """The mask with the lowest number, which ONNX Runtime takes to be -inf, raised to the next: a row of it is a mean of V."""
    if mask.dtype == torch.bool:
        return mask
    lowest = torch.finfo(mask.dtype).min
    return mask.masked_fill(mask == lowest, lowest * (1.0 - torch.finfo(mask.dtype).eps))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    out: Tensor = onnx_attention(q, k, v, mask, scale, is_causal)
    return out


def _zero_unless(out: Tensor, seen: Tensor | None) -> Tensor:
    return out if seen is None else out.masked_fill(~seen, 0.0)


def _is_plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Does `Attention` take these as they are?"""
    if not q.dim() == k.dim() == v.dim() == 4 or not q.dtype == k.dtype == v.dtype:
        return False
    if not same_size(q.shape[0], k.shape[0]) or not all(map(same_size, k.shape[:3], v.shape[:3])):
        return False
    if not same_size(q.shape[1] % k.shape[1], 0):
        return False
    if mask is None or mask.dtype == torch.bool:
        return True
    return mask.dtype == q.dtype != torch.float64  # whose lowest number torch.onnx cannot write


def _written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, grouped: bool) -> Tensor:
    """SDPA of any shapes: softmax in float32 or wider; a row without a key is 0."""
    wide = torch.promote_types(q.dtype, torch.float32)
    if grouped:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).to(wide) * scale
    if mask is None:
        return torch.softmax(scores, -1).to(v.dtype) @ v
    mask, seen = _fill_empty_rows(mask)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(wide)
    return _zero_unless(torch.softmax(scores, -1).to(v.dtype) @ v, seen)
