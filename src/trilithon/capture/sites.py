"""Find the attention calls of an exported program: fused ones by their op, decomposed ones by their softmax."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, Node

from trilithon.capture.program import known_size
from trilithon.errors import Where
from trilithon.passes import bound_arguments, module_path, where_of

aten = torch.ops.aten

FUSED = {
    aten.scaled_dot_product_attention.default: "sdpa",
    aten._scaled_dot_product_efficient_attention.default: "efficient",
    aten._scaled_dot_product_flash_attention.default: "flash",
    aten._scaled_dot_product_flash_attention_for_cpu.default: "flash_for_cpu",
    aten._scaled_dot_product_cudnn_attention.default: "cudnn",
}
SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
MATMUL = {aten.matmul.default, aten.bmm.default}
SCORES = MATMUL | {aten.baddbmm.default}
RESHAPE = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
# Between the scores and the softmax, and between the softmax and the second product.
SCORE_OPS = RESHAPE | {
    aten.tanh.default,
    aten.maximum.default,
    aten.max.other,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    *(aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    *(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther),
    aten._to_copy.default,
    aten.to.dtype,
    aten.clone.default,
}
WEIGHT_OPS = RESHAPE | {aten._to_copy.default, aten.to.dtype, aten.clone.default, aten.dropout.default, aten.alias.default}


@dataclass(frozen=True)
class Site:
    """One attention call.

    Attributes:
        name: path of the module that makes it, e.g. `model.layers.0.self_attn`.
        kind: a value of `FUSED`, or "decomposed".
        output: the node whose value is the attention's result.
        q, k, v: operands as the call receives them, `[b h s d]`, `[b h t d]`, `[b h t e]`. In a decomposed
            call `k` is the transposed operand, `[b h d t]`.
        mask: bool or additive mask, or None. In a decomposed call: the softmax's input.
        score: decomposed only: the product of q and k.
        softmax: decomposed only.
        sinks: decomposed only: scores of one more column, whose weight is thrown away.
        flat_heads: decomposed only: batch and heads share the first axis of the scores, with so many heads; 1 where that is
            not known, and then each head counts as a row of the batch.
        is_causal: torch's flag (upper left).
        scale: factor on the scores, a number or a node; None = `1/sqrt(d)`.
        problem: why this call cannot be rewritten whatever its mask, or "".
    """

    name: str
    kind: str
    output: Node
    q: Node
    k: Node
    v: Node
    mask: Node | None
    score: Node | None
    is_causal: bool
    scale: Any
    problem: str
    where: Where
    softmax: Node | None = None
    sinks: Node | None = None
    flat_heads: int | None = None

    @property
    def dims(self) -> tuple[Any, Any, Any, Any]:
        """Sizes `b h s t`, ints or SymInts."""
        q, k = self.q.meta["val"].shape, self.k.meta["val"].shape
        if self.flat_heads is not None:
            return q[0] // self.flat_heads, self.flat_heads, q[1], k[2]
        return q[0], q[1], q[2], k[3] if self.kind == "decomposed" else k[2]

    @property
    def softmax_scale(self) -> float | None:
        """None where it is no number of the program."""
        if self.scale is None:
            width = known_size(self.q.meta["val"].shape[-1])
            return None if width is None else 1.0 / math.sqrt(width)
        return self.scale if isinstance(self.scale, (int, float)) else None


def find_sites(graph: Graph) -> list[Site]:
    """Every attention call, in graph order."""
    return list(_numbered(_sites(graph)))


def _sites(graph: Graph) -> Iterator[Site]:
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in FUSED:
            yield _fused(node)
        elif node.target in SOFTMAX and (site := _decomposed(node)) is not None:
            yield site


def _numbered(sites: Iterator[Site]) -> Iterator[Site]:
    """Give two calls of one module different names: `attn`, `attn#2`."""
    seen: dict[str, int] = {}
    for site in sites:
        seen[site.name] = seen.get(site.name, 0) + 1
        name = site.name if seen[site.name] == 1 else f"{site.name}#{seen[site.name]}"
        yield Site(**{**site.__dict__, "name": name})


def _fused(node: Node) -> Site:
    args = bound_arguments(node)
    output, problem = node, ""
    if isinstance(node.meta["val"], (tuple, list)):
        outputs = [u for u in node.users if u.target is getitem]
        first = [u for u in outputs if u.args[1] == 0]
        output = first[0] if first else node
        if len(first) != 1 or any(u.args[1] != 0 and u.users for u in outputs):
            problem = "its log-sum-exp or debug outputs are used"
    if args.get("dropout_p"):
        problem = f"dropout_p={args['dropout_p']}: call model.eval() before exporting"
    q, k, v = args["query"], args["key"], args["value"]
    if (rank := q.meta["val"].dim()) != 4:
        problem = f"its query has rank {rank}, not 4 [b h s d]"
    problem = problem or _broadcasts(q.meta["val"].shape, k.meta["val"].shape, v.meta["val"].shape)
    return Site(
        name=module_path(node) or node.name,
        kind=FUSED[node.target],  # type: ignore[index]
        output=output,
        q=q,
        k=k,
        v=v,
        mask=args.get("attn_mask") if "attn_mask" in args else args.get("attn_bias"),
        score=None,
        is_causal=bool(args["is_causal"]),
        scale=args.get("scale"),
        problem=problem,
        where=where_of(node),
    )


def _broadcasts(q: Sequence[Any], k: Sequence[Any], v: Sequence[Any]) -> str:
    """Why q `[b h s d]`, k `[b g t d]` and v `[b g t e]` fit only by broadcasting, or ""."""
    if not len(q) == len(k) == len(v) == 4:
        return "" if len(q) != 4 else "its keys or values have another rank than its query"
    apart = isinstance(q[1], int) and isinstance(k[1], int) and q[1] % k[1]
    if apart or str(k[0]) != str(q[0]) or list(map(str, v[:2])) != list(map(str, k[:2])):
        return f"its operands fit only by broadcasting: q {list(q)}, k {list(k)}, v {list(v)}"
    return ""


def _decomposed(softmax: Node) -> Site | None:
    """matmul -> scale, mask -> softmax -> matmul, as eager attention exports; None if it is another softmax."""
    logits, sinks = _without_sinks(_without_row_maximum(softmax.args[0]))
    rank = logits.meta["val"].dim()
    if softmax.args[1] not in (-1, rank - 1) or rank not in (3, 4):
        return None
    product = _consumer(softmax, dropped=0 if sinks is None else 1)
    scores = [node for node in _path(logits) if node.target in SCORES]
    if product is None or len(scores) != 1:
        return None
    score = scores[0]
    q, k = (_operand(score, i) for i in (0, 1))
    v: Any = product.args[1]
    heads = _flat_heads(q) if score.meta["val"].dim() == 3 else None
    return Site(
        name=module_path(softmax) or softmax.name,
        kind="decomposed",
        output=product,
        q=q,
        k=k,
        v=v,
        mask=logits,
        score=score,
        is_causal=False,
        scale=None,
        problem=_mismatch(logits, score, q, k, v),
        where=where_of(softmax),
        softmax=softmax,
        sinks=sinks,
        flat_heads=heads,
    )


def _operand(score: Node, i: int) -> Node:
    """Queries (0) or keys (1) of a product; baddbmm has what it adds in front."""
    operand: Any = score.args[i + 1 if score.target is aten.baddbmm.default else i]
    return operand  # type: ignore[no-any-return]


def _mismatch(logits: Node, score: Node, q: Node, k: Node, v: Node) -> str:
    """Why the operands are not those of an attention, or ""."""
    shapes = [x.meta["val"].shape for x in (q, k, v)]
    own, full = (list(map(str, x.meta["val"].shape)) for x in (score, logits))
    if len(own) == len(full) and own != full:
        return f"its scores [{', '.join(own)}] are broadcast to [{', '.join(full)}]"
    if len(own) == 3:
        return ""
    if logits.meta["val"].dim() != 4:
        return f"its scores have rank {logits.meta['val'].dim()}, not 4 [b h s t]"
    return _broadcasts(shapes[0], (*shapes[1][:2], shapes[1][3], shapes[1][2]) if len(shapes[1]) == 4 else shapes[1], shapes[2])


def _flat_heads(q: Node) -> int:
    """The heads of queries `[b * h, s, d]` that were `[b h s d]` before, or 1."""
    node: Any = q
    while isinstance(node, Node) and node.target in SCORE_OPS | {aten.expand.default} and node.args:
        value = node.meta["val"]
        if value.dim() == 4:
            break
        node = next((a for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)), None)
    value = node.meta.get("val") if isinstance(node, Node) else None
    heads = value.shape[1] if isinstance(value, torch.Tensor) and value.dim() == 4 else 1
    return heads if isinstance(heads, int) else 1


def _without_row_maximum(logits: Any) -> Any:
    """`x` of `x - x.max(-1, keepdim=True)`, which a softmax cannot tell from it."""
    if logits.target is aten.sub.Tensor and len(logits.args) == 2:
        x, top = logits.args
        while isinstance(top, Node) and top.target in (getitem, aten.detach.default, aten.clone.default):
            top = top.args[0]
        if isinstance(top, Node) and top.args and top.args[0] is x:
            axes: Any = top.args[1] if len(top.args) > 1 else None
            if top.target in (aten.amax.default, aten.max.dim) and axes in (-1, [-1]) and top.args[2:] == (True,):
                return x
    return logits


def _without_sinks(logits: Any) -> tuple[Any, Node | None]:
    """The scores in front of one learned column that is joined to them, and that column."""
    if logits.target is aten.cat.default and len(logits.args) == 2 and logits.args[1] in (-1, 3) and len(logits.args[0]) == 2:
        scores, column = logits.args[0]
        if column.meta["val"].shape[-1] == 1:
            return scores, column
    return logits, None


def _consumer(softmax: Node, dropped: int = 0) -> Node | None:
    """The product of the attention weights with V; `dropped` columns at the end must be cut off before."""
    node = softmax
    while True:
        if len(node.users) != 1:
            return None
        (user,) = node.users
        if user.target in MATMUL:
            return user if user.args[0] is node and not dropped else None
        if user.target is aten.slice.Tensor and dropped and user.args[1:] in ((3, 0, -1), (-1, 0, -1)):
            dropped = 0
        elif user.target not in WEIGHT_OPS or (user.target is aten.dropout.default and user.args[2]):
            return None
        node = user


def score_path(site: Site) -> list[Node]:
    """The nodes between the scores (or nothing) and the softmax, or the op, through scaling and masking."""
    return [] if site.mask is None else _path(site.mask)


def _path(logits: Node) -> list[Node]:
    """What reaches the softmax through scaling and masking, down to the products."""
    rank = logits.meta["val"].dim()
    found: list[Node] = []
    seen, stack = set(), [logits]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in SCORES and (
            node.meta["val"].dim() == rank or node.target in (aten.bmm.default, aten.baddbmm.default)
        ):
            found.append(node)
        elif node.target in SCORE_OPS:
            found.append(node)
            stack.extend(a for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor))
    return found
