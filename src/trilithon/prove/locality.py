"""Token locality: outside attention, is the value at token i of a row computed from that token alone?

Each tensor gets a label (`trilithon.prove.axes`): which axes run over batch rows and over tokens, and what its values
are made of. A label means that the element at row r and token i reads constants, the position of token i, and inputs
at row r and token i, and nothing else; above all neither another row nor the number of tokens. The table of operations
is closed: what it does not list is refused, with the node and the user's line. Attention is the one place where tokens
meet; there the masks' own proofs speak.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from trilithon.prove.axes import ROWS, TOKENS, Axis, Found, Label, Scope, Sizes, Source, is_free, merged, refuse
from trilithon.prove.local_rules import NAMED, RULES, SIZED

aten = torch.ops.aten
SIZES = {aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int}
ASSERTS = {aten._assert_scalar.default, aten.sym_constrain_range_for_size.default, aten.sym_constrain_range.default}


@dataclass(frozen=True)
class TokenInputs:
    """The inputs of a causal token model.

    Attributes:
        tokens: name of the integer input `[b s]`.
        positions: name of the input that holds each token's position, `[b s]`, `[1 s]` or `[s]`, or None.
        context: names of inputs that do not depend on tokens; rows are on axis 0, or they have none.
    """

    tokens: str
    positions: str | None
    context: tuple[str, ...] = ()


def token_labels(
    graph: Graph, inputs: TokenInputs, sizes: Sizes, attention: Any, value_of: Callable[[Node], Tensor | None]
) -> dict[Node, Found]:
    """The label of every tensor in an unlifted program; of an operation with several results a tuple of labels.

    Args:
        graph: functional, its attention canonical, its weights attributes.
        inputs: the placeholders.
        sizes: the symbols of rows and tokens.
        attention: the canonical attention op; its operands are `[b h s d]`.
        value_of: the tensor that an attribute holds.

    Raises:
        CannotCache: a node mixes tokens or rows, depends on how many there are, or is not modelled.
    """
    labels: dict[Node, Found] = {}
    scope = Scope(labels, sizes, value_of)
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            labels[node] = _input(node, inputs, sizes)
        elif node.op == "get_attr":
            labels |= {node: _fixed(node, value, sizes)} if _has_tensors(value) else {}
        elif node.op == "output" or not _has_tensors(value):
            _refuse_numbers(node, labels)
        elif node.target is attention:
            labels[node] = _attention(node, scope)
        else:
            labels[node] = _result(node, scope)
    for node in graph.nodes:
        if node.target in ASSERTS:
            _refuse_assertion(node, sizes)
    return labels


def _refuse_numbers(node: Node, labels: Mapping[Node, Found]) -> None:
    """A number that is made of values, not of sizes, would carry them past the labels."""
    made = [labels[x] for x in node.all_input_nodes if x in labels and node.op != "output"]
    is_size = node.target in SIZES or node.meta.get("val") is None
    if not is_size and not all(isinstance(label, Label) and label.is_fixed for label in made):
        raise refuse(node, f"{node.target} makes a number of values that belong to tokens")


def _has_tensors(value: Any) -> bool:
    return isinstance(value, (Tensor, list, tuple))


def _input(node: Node, inputs: TokenInputs, sizes: Sizes) -> Label:
    axes = tuple(sizes.axis(size) for size in node.meta["val"].shape)
    own = (ROWS,) if sizes.rows is not None else ()
    if node.name == inputs.tokens and axes == (own, (TOKENS,)):
        return Label((own, (TOKENS,)), Source.TOKENS)
    if node.name == inputs.positions and axes in ((own, (TOKENS,)), ((), (TOKENS,)), ((TOKENS,),)):
        return Label(axes, Source.POSITIONS)
    found = tuple(axis for axis in axes if axis is not None)
    if node.name in inputs.context and len(found) == len(axes) and is_free(*found[1:]) and TOKENS not in (found or ((),))[0]:
        return Label(found, Source.CONSTANT)
    raise refuse(node, f"the input {node.name} of shape {list(node.meta['val'].shape)} does not run over rows and tokens")


def _fixed(node: Node, value: Any, sizes: Sizes) -> Found:
    """The label of what depends on nothing."""
    if isinstance(value, Tensor):
        axes = [sizes.axis(size) for size in value.shape]
        if any(axis is None or not is_free(axis) for axis in axes):
            raise refuse(node, "its shape depends on the number of tokens or rows")
        return Label(tuple(merged(axis or ()) for axis in axes), Source.CONSTANT)
    labels = [_fixed(node, part, sizes) for part in value]
    return tuple(label for label in labels if isinstance(label, Label))


def _refuse_assertion(node: Node, sizes: Sizes) -> None:
    """An assertion about the number of tokens holds for the lengths that were exported, and a step has one token."""
    for x in node.args:
        held = x.meta.get("val") if isinstance(x, Node) else x
        if TOKENS in sizes.depends(held):
            raise refuse(node, f"the program asserts {held} of the number of tokens, which a cached step need not meet")


def _result(node: Node, scope: Scope) -> Found:
    operands = [x for x in node.all_input_nodes if x in scope.labels]
    numbers: set[Any] = set()
    if node.target not in SIZED:
        for x in node.all_input_nodes:
            numbers |= scope.sizes.depends(x.meta.get("val")) if x not in scope.labels else set()
    if numbers:
        what = "tokens" if TOKENS in numbers else "rows"
        raise refuse(node, f"{node.target} makes values from the number of {what}, not from positions")
    if _is_constant(node, operands, scope):
        return _fixed(node, node.meta["val"], scope.sizes)
    rule = RULES.get(node.target) or NAMED.get(str(node.target))
    if rule is None:
        raise refuse(node, f"{node.target} is not known to keep tokens apart")
    return _checked(node, rule(node, scope))


def _is_constant(node: Node, operands: list[Node], scope: Scope) -> bool:
    """Does the node depend on nothing but weights and numbers? Then it may be any deterministic operation."""
    for x in operands:
        found = scope.labels[x]
        if not all(label.is_fixed for label in (found if isinstance(found, tuple) else (found,))):
            return False
    symbols = set[Any]()
    for x in node.all_input_nodes:
        if x not in scope.labels:
            symbols |= scope.sizes.depends(x.meta.get("val"))
    is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return not symbols and not is_random


def _checked(node: Node, found: Found) -> Found:
    """Every result may run once over rows and once over tokens."""
    for label in found if isinstance(found, tuple) else (found,):
        if label.factors.count(TOKENS) > 1:
            raise refuse(node, "it combines different tokens")
        if label.factors.count(ROWS) > 1:
            raise refuse(node, "it combines different rows of the batch")
        if label.last and TOKENS in label.factors:
            raise refuse(node, "it gives the last token's value to other tokens")
    return found


def _attention(node: Node, scope: Scope) -> Label:
    """Queries, keys and values are `[b h s d]`; what else the op takes must be constant."""
    own = (ROWS,) if scope.sizes.rows is not None else ()
    operands = [scope.label(x) for x in node.args[:3]]
    if all(label.source is Source.CONSTANT for label in operands[1:]):
        return _over_context(node, operands, own)
    for x, label in zip(("queries", "keys", "values"), operands, strict=True):
        is_split = len(label.axes) == 4 and (label.axes[0], label.axes[2]) == (own, (TOKENS,))
        if not is_split or not is_free(label.axes[1], label.axes[3]) or label.last or label.order or label.role:
            raise refuse(node, f"its {x} do not run over rows on axis 0 and tokens on axis 2")
    for other in node.all_input_nodes:
        if other not in node.args[:3] and not (other in scope.labels and scope.label(other).is_fixed):
            raise refuse(node, f"it reads {other.name}, which is not a constant")
    q, _, v = operands
    return Label((*q.axes[:3], v.axes[3]), Source.TOKENS)


def _over_context(node: Node, operands: list[Label], own: Axis) -> Label:
    """Cross attention: each token reads the context of its own row. What the mask and a bias may read, `token_model` says."""
    q, k, v = operands
    is_split = len(q.axes) == 4 and q.axes[0] == own and q.axes[2] == (TOKENS,) and is_free(q.axes[1], q.axes[3])
    if not is_split or q.last or q.order or q.role:
        raise refuse(node, "its queries do not run over rows on axis 0 and tokens on axis 2")
    for label in (k, v):
        if label.axes[0] != own or not is_free(*label.axes[1:]):
            raise refuse(node, "its keys and values do not run over rows on axis 0")
    return Label((*q.axes[:3], v.axes[3]), Source.TOKENS)
