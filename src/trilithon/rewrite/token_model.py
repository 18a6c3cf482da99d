"""A causal token model: the program, its inputs, and the proof that a cache of its keys and values is sound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from trilithon.capture.sites import find_sites
from trilithon.errors import CannotCache
from trilithon.passes import bound_arguments
from trilithon.prove.axes import ROWS, TOKENS, Found, Label, Sizes, Source, refuse
from trilithon.prove.locality import TokenInputs, token_labels
from trilithon.rewrite.op import ATTENTION
from trilithon.rewrite.split_context import DECODER_TOKENS, take_context
from trilithon.rewrite.unlift import fake_inputs, unlift
from trilithon.spec.masks import Causal, Chunked, LocalWindow, Mask, Padding, SlidingWindow, parse, parts

aten = torch.ops.aten
POSITIONS = "position_ids"
SHORTEST = 2  # tokens: export takes no length for shorter ones than this, but a program for longer ones only is another
SAME = {aten.clone.default, aten.alias.default, aten.lift_fresh_copy.default, aten._to_copy.default, aten.detach.default}


@dataclass(frozen=True)
class TokenModel:
    """A program whose values belong to one token each, outside attention that is proved causal.

    Attributes:
        gm: unlifted; it may be edited.
        inputs: names.
        labels: of its nodes.
        sizes: the symbols of rows and tokens.
        sites: the nodes of attention over tokens, in order; that over the context has no cache.
        logits: the output.
    """

    gm: GraphModule
    inputs: TokenInputs
    labels: Mapping[Node, Found]
    sizes: Sizes
    sites: list[Node]
    logits: Node


def token_model(program: ExportedProgram, tokens: str | None = None) -> TokenModel:
    """Show that a cache is sound.

    Sound means: outside attention every value at token i of a row depends on that token and its position alone, and at
    each attention the proved mask lets a query see no key after it. Then tokens that are in the cache never change.

    Args:
        program: its proved attention canonical.
        tokens: name of the token input. What does not depend on it is cut out (`split_context`), and inputs in its place.
            None: the only input beside positions, or `decoder_input_ids`.

    Raises:
        CannotCache: the program's inputs, a node or a site stands in the way.
    """
    gm = unlift(program)
    gm.graph.eliminate_dead_code()  # a mask that nobody reads needs no proof
    for node in gm.graph.find_nodes(op="call_function", target=ATTENTION):
        if node.kwargs:
            node.args, node.kwargs = tuple(bound_arguments(node).values()), {}
    inputs = token_inputs(gm, tokens)
    sizes = _sizes(gm, inputs, program)
    unproved = find_sites(gm.graph)
    if unproved:
        raise refuse(unproved[0].output, "the mask of this attention is not proved causal")
    labels = token_labels(gm.graph, inputs, sizes, ATTENTION, lambda node: _value_of(gm, node))
    found = [n for n in gm.graph.nodes if n.target is ATTENTION]
    sites = [n for n in found if TOKENS in labels[n.args[1]].factors]  # type: ignore[union-attr]
    if not sites:
        raise refuse(gm.graph.output_node(), "it has no attention over tokens")
    for site in found:
        if site in sites:
            mask_window(site)
        else:
            _check_over_context(site, labels)
    return TokenModel(gm, inputs, labels, sizes, sites, _logits(gm, labels, sizes))


def _check_over_context(node: Node, labels: Mapping[Node, Found]) -> None:
    """Cross attention stays as it is: its mask may say which keys of the context there are, not where a query stands."""
    if any(not isinstance(p, Padding) for p in parts(parse(str(node.args[3])))):
        raise refuse(node, f"its mask over the context is {node.args[3]}, which depends on positions")
    if len(node.args) > 8 and node.args[8]:
        raise refuse(node, "it adds a bias over the context, which may depend on positions")
    for x in node.all_input_nodes:
        label = labels.get(x)
        if x is not node.args[0] and not (isinstance(label, Label) and label.source is Source.CONSTANT and not label.role):
            raise refuse(node, f"it reads {x.name}, which depends on tokens")


def token_inputs(gm: GraphModule, given: str | None = None) -> TokenInputs:
    """Which inputs of a program are its tokens, their positions, and the results of its context.

    Args:
        gm: made by `unlift`; its context is cut out.
        given: the token input, as given to `token_model`.

    Raises:
        CannotCache: the inputs are not those of a token model, or its context cannot be cut out.
    """
    held = {n.name: n for n in gm.graph.nodes if n.op == "placeholder"}
    tokens = [name for name, n in held.items() if name != POSITIONS and _is_tokens(n.meta["val"])]
    if given is None and DECODER_TOKENS in tokens and len(held) > 1:
        given = DECODER_TOKENS
    if given is not None:
        context = take_context(gm, given, POSITIONS)
        return TokenInputs(given, POSITIONS if POSITIONS in held else None, () if context is None else context.names)
    other = [name for name in held if name not in (POSITIONS, *tokens[:1])]
    if len(tokens) == 1 and not other:
        return TokenInputs(tokens[0], POSITIONS if POSITIONS in held else None)
    masks = [name for name in other if "mask" in name]
    raise CannotCache(
        "cannot insert a KV cache",
        why=f"the program takes {', '.join(held)}; a cache needs one integer input of tokens [b s], and perhaps {POSITIONS}",
        todo=f"export it without {masks[0]}: rows in a cache need no padding mask"
        if masks
        else "export the model with its token input alone",
    )


def _is_tokens(value: Tensor) -> bool:
    return value.dim() == 2 and value.dtype in (torch.int64, torch.int32)


def _sizes(gm: GraphModule, inputs: TokenInputs, program: ExportedProgram) -> Sizes:
    """Prefill and decode run the program at other lengths than the example's."""
    node = next(n for n in gm.graph.nodes if n.name == inputs.tokens)
    rows, tokens = node.meta["val"].shape
    if isinstance(tokens, int):
        raise refuse(node, "the number of tokens is fixed: export it with a dynamic token axis")
    if isinstance(rows, int) and rows != 1:
        raise refuse(node, f"the number of rows is fixed at {rows}: export it with a dynamic batch axis, or with one row")
    for size in (rows, tokens):
        if isinstance(size, torch.SymInt) and not size.node.expr.is_Symbol:
            raise refuse(node, f"its size {size} is not free")
    for symbol, limits in program.range_constraints.items():
        if str(symbol) == str(tokens) and int(limits.lower) > SHORTEST:
            raise refuse(node, f"the program is for {limits.lower} tokens or more: shorter prompts may mean something else")
    return Sizes(None if isinstance(rows, int) else str(rows), str(tokens))


def longest(program: ExportedProgram, tokens: str) -> int | None:
    """The most tokens that the program is for, of a row in all; None = any number."""
    size = fake_inputs(program)[tokens].shape[-1]
    limits = [limits.upper for symbol, limits in program.range_constraints.items() if str(symbol) == str(size)]
    return next((int(most) for most in limits if most.is_Integer), None)


def _value_of(gm: GraphModule, node: Node) -> Tensor | None:
    while node.target in SAME:
        node = node.args[0]  # type: ignore[assignment]
    value: Any = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
    return value if isinstance(value, Tensor) else None


def _logits(gm: GraphModule, labels: Mapping[Node, Found], sizes: Sizes) -> Node:
    """The one output: `[b s v]` over tokens, or `[b v]` or `[b 1 v]` of the last token."""
    held: Any = gm.graph.output_node().args[0]
    outputs = [n for n in (held if isinstance(held, (tuple, list)) else [held]) if isinstance(n, Node)]
    own = (ROWS,) if sizes.rows is not None else ()
    label = labels.get(outputs[0]) if len(outputs) == 1 else None
    if isinstance(label, Label) and label.source is Source.TOKENS and not label.role and label.order is None:
        is_all = len(label.axes) == 3 and label.axes[:2] == (own, (TOKENS,))
        is_last = label.last and label.axes[:1] == (own,) and len(label.axes) + (len(label.axes) == 2) == 3
        if is_all or (is_last and (len(label.axes) == 2 or label.axes[1] == ())):
            gm.graph.output_node().args = (outputs[0],)  # what else it gives is None
            return outputs[0]
    raise refuse(outputs[0] if outputs else gm.graph.output_node(), "the program must give one output: logits [b s v]")


def mask_window(node: Node) -> int | None:
    """How many keys a query of this attention sees at most, its own included; None = all before it.

    Raises:
        CannotCache: its mask is not causal in positions.
    """
    kinds = parts(parse(str(node.args[3])))
    if any(isinstance(p, Padding) for p in kinds):
        raise refuse(node, f"its mask is {node.args[3]}: export the model without a padding mask")
    if not any(_is_causal(p) for p in kinds) or any(getattr(p, "align", "upper_left") != "upper_left" for p in kinds):
        raise refuse(node, f"its mask is {node.args[3]}, not causal: a query would see later tokens")
    if any(x is not None for x in node.args[5:8]):
        raise refuse(node, "it has positions or a key mask of its own")
    windows = [w for p in kinds if (w := _window(p)) is not None]
    return min(windows) if windows else None


def _is_causal(part: Mask) -> bool:
    return isinstance(part, (Causal, SlidingWindow)) or (isinstance(part, LocalWindow) and part.after == 0)


def _window(part: Mask) -> int | None:
    match part:
        case SlidingWindow():
            return part.window_keys
        case Chunked():
            return part.chunk_keys
        case LocalWindow():
            return part.before + 1
    return None
