"""Lowering passes of Torch-TensorRT: attention in the forms that its own converters of 2.11 and 2.12 get right.

With a scale that is given, causal attention in float16 behind a rotary embedding was wrong (TensorRT-RTX 1.4 on an H200:
relative error 0.16; 2e-3 with the default scale). A mask is cast as a tensor of the network, which a constant is not
(`add_cast(): incompatible function arguments`); with fixed sizes the mask of a sliding window is one.
"""

from __future__ import annotations

import logging
import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from trilithon.capture.sites import FUSED
from trilithon.passes import bound_arguments

aten = torch.ops.aten
log = logging.getLogger(__name__)


def use_default_scales(gm: GraphModule, settings: Any = None) -> GraphModule:
    """No attention is given a scale: queries are multiplied by what it is of the default, `1/sqrt(d)`."""
    for node in [n for n in gm.graph.nodes if n.target in FUSED]:
        q, scale = node.args[0], node.kwargs.get("scale")
        width = q.meta["val"].shape[-1]
        if not isinstance(scale, (int, float)) or not isinstance(width, int):
            continue
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "scale"}
        if not math.isclose(factor := scale * math.sqrt(width), 1.0, rel_tol=1e-9):
            with gm.graph.inserting_before(node):
                scaled = gm.graph.call_function(aten.mul.Tensor, (q, factor))
            scaled.meta["val"] = torch.empty_like(q.meta["val"])
            node.update_arg(0, scaled)
    gm.graph.lint()
    gm.recompile()
    return gm


def write_out_constant_masks(gm: GraphModule, settings: Any = None) -> GraphModule:
    """Products, softmax in float32, products, for each attention with a mask that depends on no input; the rest stays."""
    constant, written = set[Node](), list[str]()
    for node in list(gm.graph.nodes):
        if node.op == "get_attr" or (node.op == "call_function" and constant.issuperset(node.all_input_nodes)):
            constant.add(node)
        if node.target in FUSED and (firsts := _firsts(node)) is not None:
            args = bound_arguments(node)
            mask = args.get("attn_mask", args.get("attn_bias"))
            if mask in constant and _is_plain(args, mask):
                written.append(node.name)
                _write_out(gm, node, firsts, args, mask)
    if written:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
        log.info("written out, since their masks are constants: %s", ", ".join(written))
    return gm


def _is_plain(args: dict[str, Any], mask: Node) -> bool:
    """Are the operands of four axes, of sizes that are numbers, and is there nothing beside them, a scale and an added mask?"""
    held = [args[name].meta.get("val") for name in ("query", "key", "value")]
    fixed = all(isinstance(x, Tensor) and x.dim() == 4 and all(isinstance(n, int) for n in x.shape) for x in held)
    added = isinstance(x := mask.meta.get("val"), Tensor) and x.is_floating_point()
    scaled = isinstance(args.get("scale"), (int, float, type(None)))
    return fixed and added and scaled and not args["is_causal"] and not args.get("dropout_p")


def _firsts(node: Node) -> list[Node] | None:
    """The nodes that are its output; None where others of its results are read."""
    if isinstance(node.meta["val"], Tensor):
        return [node]
    read = [user for user in node.users if user.users]
    return read if all(user.target is operator.getitem and user.args[1] == 0 for user in read) else None


def _write_out(gm: GraphModule, node: Node, firsts: list[Node], args: dict[str, Any], mask: Node) -> None:
    q, k, v = args["query"], args["key"], args["value"]
    val: Tensor = q.meta["val"]
    scale = 1.0 / math.sqrt(val.shape[-1]) if args.get("scale") is None else args["scale"]
    with gm.graph.inserting_before(node):

        def call(target: Any, *arguments: Any, **more: Any) -> Node:
            made: Node = gm.graph.call_function(target, arguments, more)
            held = torch.fx.node.map_arg((arguments, more), lambda n: n.meta["val"])
            with val.fake_mode:  # type: ignore[attr-defined]
                made.meta["val"] = target(*held[0], **held[1])
            return made

        k, v = (_repeated(call, x, val.shape[1]) for x in (k, v))
        scores = call(aten.matmul.default, call(aten.mul.Tensor, q, scale), call(aten.permute.default, k, [0, 1, 3, 2]))
        scores = call(aten._to_copy.default, scores, dtype=torch.float32)
        added = call(aten._to_copy.default, mask, dtype=torch.float32)
        weights = call(aten._softmax.default, call(aten.add.Tensor, scores, added), -1, False)
        nothing = call(aten.eq.Scalar, call(aten.amax.default, added, [-1], True), -math.inf)  # a row without a key gives 0
        zero = call(aten.full.default, [1], 0.0, dtype=torch.float32, device=val.device)
        weights = call(aten._to_copy.default, call(aten.where.self, nothing, zero, weights), dtype=val.dtype)
        made = call(aten.matmul.default, weights, v)
    for first in firsts:
        first.replace_all_uses_with(made)
    for user in [*node.users, node]:  # one with dropout counts as impure, and no pass erases it
        gm.graph.erase_node(user)


def _repeated(call: Any, x: Node, heads: int) -> Node:
    """Keys or values `[b g t d]` for each of so many query heads."""
    b, g, t, d = x.meta["val"].shape
    if g == heads:
        return x
    wide = call(aten.expand.default, call(aten.unsqueeze.default, x, 2), [b, g, heads // g, t, d])
    made: Node = call(aten.reshape.default, wide, [b, heads, t, d])
    return made
