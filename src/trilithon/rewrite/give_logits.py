"""Of which tokens a cached program gives logits: of each row's last real one, or of all; and which token they name best."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_map

from trilithon.capture.collectives import ALL_GATHER, WAIT
from trilithon.passes import bound_arguments
from trilithon.prove.axes import TOKENS, Axis, Label, is_free, refuse
from trilithon.prove.local_values import BROADCAST, targets
from trilithon.rewrite.cache_ops import last_tokens
from trilithon.rewrite.token_model import TokenModel

aten = torch.ops.aten
HEADS = (aten.linear.default, aten.matmul.default)
REDUCTIONS = {aten.mean.dim, aten.layer_norm.default, *targets("rms_norm")}
SPLITS = {aten.split.Tensor, aten.split_with_sizes.default}
BY_TOKEN = {*BROADCAST, *REDUCTIONS, aten.linear.default, aten.type_as.default}
ANY_RANK = {*BROADCAST, *targets("linear layer_norm rms_norm dropout")}


def give_logits(model: TokenModel, counts: Node, *, all_logits: bool, one_token: bool) -> None:
    """Make the output `[b s v]`, or `[b 1 v]` of the last real token of each row (index `counts - 1`).

    %logits = linear(%x, %w)   =>   %last = last_tokens(%x, %counts)
                                    %logits = linear(%last, %w)

    The tokens are taken as early as can be: of what the last layer does behind its attention only theirs is needed.

    Args:
        one_token: there is one token a row, so that its logits are all logits.

    Raises:
        CannotCache: all logits are asked of a program that selects the last token.
    """
    label: Any = model.labels[model.logits]
    selections = [n for n, found in model.labels.items() if _is_selection(model, n, found)]
    if one_token or (label.last and not all_logits):
        for node in [] if one_token else selections:
            _select(model, node, counts)
        _with_axis(model, model.logits, len(label.axes))
    elif label.last:
        for node in selections:
            _keep_all(model, node)
    elif not all_logits:
        _cut(model, counts)


def give_best(model: TokenModel) -> None:
    """Give beside the logits `[b 1 v]` the token `[b]` int64 of the highest; of several the first.

    return %logits   =>   %best = argmax(%logits[:, 0], -1)
                          return (%logits, %best)
    """
    graph = model.gm.graph
    output = graph.output_node()
    (logits,) = output.args
    with graph.inserting_before(output):
        last = graph.call_function(aten.select.int, (logits, 1, 0))
        best = graph.call_function(aten.argmax.default, (last, -1))
    output.args = ((logits, best),)


def _is_selection(model: TokenModel, node: Node, found: Any) -> bool:
    """Does this node take the last token of its operand?"""
    if not (isinstance(found, Label) and found.last) or not node.all_input_nodes:
        return False
    source: Any = model.labels.get(node.all_input_nodes[0])
    return isinstance(source, Label) and not source.last and TOKENS in source.factors


def _select(model: TokenModel, node: Node, counts: Node) -> None:
    x: Any = node.args[0]
    label: Any = model.labels[x]
    if len(label.axes) != 3 or label.axes[1] != (TOKENS,):
        raise refuse(node, "the last token is taken of a tensor that is not [b s c]")
    with model.gm.graph.inserting_before(node):
        made = model.gm.graph.call_function(last_tokens, (x, counts))
        if node.target is aten.select.int:
            made = model.gm.graph.call_function(aten.select.int, (made, 1, 0))
    node.replace_all_uses_with(made)


def _with_axis(model: TokenModel, logits: Node, rank: int) -> None:
    if rank == 2:
        output = model.gm.graph.output_node()
        with model.gm.graph.inserting_before(output):
            output.args = (model.gm.graph.call_function(aten.unsqueeze.default, (output.args[0], 1)),)


def _keep_all(model: TokenModel, node: Node) -> None:
    """Nothing is selected; what follows must not mind another axis."""
    behind = [n for n, found in model.labels.items() if isinstance(found, Label) and found.last and n is not node]
    for other in behind:
        fixed = [x for x in other.all_input_nodes if isinstance(f := model.labels.get(x), Label) and f.is_fixed]
        is_wide = any(len(model.labels[x].axes) > 1 for x in fixed) and other.target in BROADCAST  # type: ignore[union-attr]
        if other.target not in ANY_RANK or is_wide:
            raise refuse(other, "the program gives logits of the last token only")
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]


def _cut(model: TokenModel, counts: Node) -> None:
    """Take the last tokens before the product that makes logits, or else of the logits."""
    graph = model.gm.graph
    head: Node = model.logits
    while len(head.users) == 1 and (operand := _made_of(model, head)) is not None:
        head = operand
    x = head.args[0] if head.target in HEADS and len(head.users) == 1 else None
    if isinstance(x, Node) and _is_weight(model, head) and len(_label(model, x).axes) == 3:
        with graph.inserting_before(head):
            head.args = (_LastTokens(model, counts, head).of(x), *head.args[1:])
        return
    output = graph.output_node()
    with graph.inserting_before(output):
        output.args = (graph.call_function(last_tokens, (model.logits, counts)),)


def _made_of(model: TokenModel, node: Node) -> Node | None:
    """What the logits are made of, where that may have fewer tokens: they are changed one by one, or joined of all ranks'."""
    if node.target in BROADCAST:
        return _only_operand(model, node)
    x = node.args[0] if node.args else None
    if not isinstance(x, Node) or x not in model.labels:
        return None
    if node.target is aten.slice.Tensor:
        return x if is_free(_label(model, x).axes[node.args[1] if len(node.args) > 1 else 0]) else None  # type: ignore[index]
    return x if node.target in (aten.permute.default, aten.clone.default) or str(node.target) in (ALL_GATHER, WAIT) else None


class _LastTokens:
    """The last tokens of what leads to `head` alone: of what it is made of, where that is done to each token by itself."""

    def __init__(self, model: TokenModel, counts: Node, head: Node) -> None:
        self.model, self.counts = model, counts
        self.made: dict[Node, Node] = {}
        self.alone = {head}  # what nothing is made of but what is made of last tokens now
        rows = _label(model, head.args[0]).axes[0]  # type: ignore[arg-type]
        for node in reversed(model.gm.graph.nodes):
            if node.users and self.alone.issuperset(node.users) and _is_by_token(model, node, rows):
                self.alone.add(node)

    def of(self, x: Node) -> Node:
        """Of `x [b s c]`, `[b 1 c]`."""
        graph = self.model.gm.graph
        if x in self.made:
            return self.made[x]
        if x in self.alone:
            moved = {n: n if _is_fixed(self.model, n) else self.of(n) for n in x.all_input_nodes}
            self.made[x] = graph.node_copy(x, moved.__getitem__)
            if "val" in x.meta:
                self.made[x].meta["val"] = tree_map(lambda value: value.narrow(1, 0, 1), x.meta["val"])
        else:
            self.made[x] = graph.call_function(last_tokens, (x, self.counts))
        return self.made[x]


def _is_by_token(model: TokenModel, x: Node, rows: Axis) -> bool:
    """Is each token's value made of what other values `[b s c]` have at that token, and of what is the same for all?"""
    if x.target is operator.getitem or x.target in SPLITS:
        split: Any = x.args[0] if x.target is operator.getitem else x
        return split.target in SPLITS and bound_arguments(split)["dim"] in (-1, 2) and _has_tokens(model, split.args[0], rows)
    if x.target not in BY_TOKEN or not _has_tokens(model, x, rows) or (x.target in REDUCTIONS and not _is_along_last(x)):
        return False
    others = [n for n in x.all_input_nodes if not _has_tokens(model, n, rows)]
    return len(others) < len(x.all_input_nodes) and all(_is_same_for_all(model, n) for n in others)


def _has_tokens(model: TokenModel, x: Node, rows: Axis) -> bool:
    found = model.labels.get(x)
    plain = isinstance(found, Label) and not (found.last or found.role) and len(found.axes) == 3
    return plain and found.axes[:2] == (rows, (TOKENS,))  # type: ignore[union-attr]


def _is_same_for_all(model: TokenModel, x: Node) -> bool:
    found, held = model.labels.get(x), x.meta.get("val")
    if not isinstance(found, Label) or not isinstance(held, Tensor):
        return False
    return found.is_fixed and (held.dim() < 2 or held.shape[-2] == 1 or _is_matrix(x))


def _is_matrix(x: Node) -> bool:
    """Of products alone: it has no axis that the values' own tokens stand against."""
    return all(user.target is aten.linear.default and x in user.args[1:] for user in x.users)


def _is_fixed(model: TokenModel, x: Node) -> bool:
    found = model.labels.get(x)
    return isinstance(found, Label) and found.is_fixed


def _is_along_last(x: Node) -> bool:
    args = bound_arguments(x)
    if x.target is aten.mean.dim:
        return list(args["dim"]) in ([-1], [2]) and args["keepdim"] is True
    return len(args["normalized_shape"]) == 1


def _label(model: TokenModel, node: Node) -> Label:
    found = model.labels[node]
    assert isinstance(found, Label)
    return found


def _is_weight(model: TokenModel, head: Node) -> bool:
    args = bound_arguments(head)
    return _label(model, args["weight"] if "weight" in args else args["other"]).is_fixed


def _only_operand(model: TokenModel, node: Node) -> Node | None:
    """The one operand with tokens, where the others are constants that fit any number of tokens."""
    operands = [x for x in node.all_input_nodes if x in model.labels]
    moving = [x for x in operands if not _label(model, x).is_fixed]
    return moving[0] if len(moving) == 1 and len(_label(model, moving[0]).axes) == 3 else None
