"""Cut a program in two: its context, which does not depend on the decoder's tokens, and the decoder.

    %h = encoder(%input_ids)                      context: %input_ids -> (%k, %v)
    %k = linear(%h, ..)                      =>
    %v = linear(%h, ..)                           decoder: %decoder_input_ids, %context_0, %context_1 -> %logits
    %q = linear(%x, ..)
    %o = attention(%q, %k, %v, "full")            %o = attention(%q, %context_0, %context_1, "full")

The context is run once a prompt: the encoder, and the keys and values of cross attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from trilithon.errors import CannotCache
from trilithon.prove.axes import refuse
from trilithon.rewrite.unlift import unlift

aten = torch.ops.aten
CONTEXT = "context_"
DECODER_TOKENS = "decoder_input_ids"  # Hugging Face's name; others are given


@dataclass(frozen=True)
class Context:
    """What a decoder reads beside its tokens.

    Attributes:
        module: the inputs by position, as named by `inputs`, to a tuple of tensors.
        inputs: names of what it takes.
        names: of its results, as the cached decoder takes them: `context_0`, `context_1`, ...; rows are on axis 0.
    """

    module: GraphModule
    inputs: tuple[str, ...]
    names: tuple[str, ...]


def split_context(program: ExportedProgram, tokens: str = DECODER_TOKENS) -> Context:
    """The part of an encoder-decoder that does not depend on the decoder's tokens.

    Args:
        program: its proved attention canonical.
        tokens: name of the decoder's token input.

    Raises:
        CannotCache: there is no such input, or nothing but it.
    """
    gm = unlift(program)
    context = take_context(gm, tokens)
    if context is None:
        raise CannotCache(
            "cannot split the program", why=f"all of it depends on {tokens}", todo="it needs no context: use insert_cache alone"
        )
    return context


def take_context(gm: GraphModule, tokens: str, positions: str | None = None) -> Context | None:
    """Cut the context out of an unlifted program, which then takes its results as inputs; None where there is none.

    Raises:
        CannotCache: the program has no input of this name, or the context depends on how many rows it has in no input.
    """
    held = {n.name: n for n in gm.graph.nodes if n.op == "placeholder"}
    if tokens not in held:
        why = f"the program takes {', '.join(held)}, and no {tokens}"
        raise CannotCache("cannot insert a KV cache", why=why, todo="name its token input")
    others = [n for name, n in held.items() if name not in (tokens, positions)]
    if not others:
        return None
    rows = held[tokens].meta["val"].shape[0]
    behind = _behind(gm.graph, [held[name] for name in (tokens, positions) if name in held], str(rows))
    before = _behind(gm.graph, others, None) - behind
    kept = [n for n in before if any(user in behind and user.op != "output" for user in n.users)]
    cut = [n for n in gm.graph.nodes if n in kept and isinstance(n.meta.get("val"), Tensor)]
    sizes = [n for n in kept if n not in cut]
    module = _context(gm, cut, others, held[tokens])
    names = tuple(f"{CONTEXT}{i}" for i in range(len(cut)))
    _cut(gm, cut, sizes, names, behind)
    for node in others:
        if node.users:
            raise refuse(next(iter(node.users)), f"it reads the shape of {node.name}, which the decoder does not take")
        gm.graph.erase_node(node)
    return Context(module, tuple(n.name for n in others), names)


def _behind(graph: Graph, sources: list[Node], rows: str | None) -> set[Node]:
    """What depends on these inputs in another way than by the number of rows."""
    found = set(sources)
    for node in graph.nodes:
        if not any(x in found for x in node.all_input_nodes):
            continue
        if node.target is not aten.sym_size.int or str(node.meta["val"]) != rows:
            found.add(node)
    return found


def _context(gm: GraphModule, cut: list[Node], inputs: list[Node], tokens: Node) -> GraphModule:
    """The program of the context: what the cut nodes need, over its own inputs."""
    graph, mapping = Graph(), dict[Node, Node]()
    needed = set[Node]()
    stack = list(cut)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    for node in gm.graph.nodes:
        if node in inputs:
            mapping[node] = graph.node_copy(node)
        elif node in needed and node is not tokens:
            size = tokens in node.all_input_nodes
            mapping[node] = _rows_of(graph, node, inputs, mapping) if size else graph.node_copy(node, mapping.__getitem__)
    graph.output(tuple(mapping[n] for n in cut))
    graph.lint()
    return GraphModule(gm, graph)


def _rows_of(graph: Graph, node: Node, inputs: list[Node], mapping: dict[Node, Node]) -> Node:
    """A size of the decoder's tokens, read off an input of the context that has it too."""
    wanted = str(node.meta["val"])
    for x in inputs:
        for axis, size in enumerate(x.meta["val"].shape):
            if str(size) == wanted:
                made = graph.call_function(aten.sym_size.int, (mapping[x], axis))
                made.meta = dict(node.meta)
                return made
    raise refuse(node, "the context depends on the shape of the decoder's tokens")


def _cut(gm: GraphModule, cut: list[Node], sizes: list[Node], names: tuple[str, ...], behind: set[Node]) -> None:
    """The decoder takes the cut values as inputs, and gives only what depends on its tokens."""
    graph = gm.graph
    tail = [n for n in graph.nodes if n.op == "placeholder"][-1]
    made: list[Node] = []
    for node, name in zip(cut, names, strict=True):
        with graph.inserting_after(tail):
            tail = graph.placeholder(name)
        tail.meta = dict(node.meta)
        made.append(tail)
        node.replace_all_uses_with(tail, delete_user_cb=lambda user: user in behind)
    for size in sizes:
        _resize(gm, size, made, behind)
    output = graph.output_node()
    given: Any = output.args[0]
    outputs = tuple(n for n in (given if isinstance(given, (tuple, list)) else (given,)) if n in behind)
    output.args = (outputs,)
    graph.eliminate_dead_code()


def _resize(gm: GraphModule, size: Node, made: list[Node], behind: set[Node]) -> None:
    """A size of the context, read off one of its results."""
    for x in made:
        for axis, other in enumerate(x.meta["val"].shape):
            if str(other) == str(size.meta["val"]) and isinstance(other, torch.SymInt):
                first = next(n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr"))
                with gm.graph.inserting_before(first):
                    node = gm.graph.call_function(aten.sym_size.int, (x, axis))
                node.meta = dict(size.meta)
                size.replace_all_uses_with(node, delete_user_cb=lambda user: user in behind)
                return
    raise refuse(size, "the decoder reads a size of the context that none of what it takes has")
