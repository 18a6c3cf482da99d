"""A proved mask as FlexAttention's `mask_mod`: any of them, named or a formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from trilithon.errors import CannotLower
from trilithon.lower.native.emit import MaskEmitter
from trilithon.spec import term as t
from trilithon.spec.evaluate import evaluate
from trilithon.spec.mask import Mask, check_inputs
from trilithon.spec.term import Term
from trilithon.spec.traverse import free_vars, scan_depth, substitute, tables, walk

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def mask_mod(mask: Mask, batch: int, queries: int, keys: int, inputs: Mapping[str, Tensor] | None = None) -> MaskMod:
    """`mask` as a function `(b, h, q, k) -> bool` for `torch.nn.attention.flex_attention.create_block_mask`.

    Args:
        batch, queries, keys: sizes b, s and t.
        inputs: the tables that the mask reads, by name; the function keeps hold of them.

    Raises:
        InputError: a table is missing.
        CannotLower: the mask does float arithmetic.

    Source: FlexAttention (torch.nn.attention.flex_attention).
    """
    given = dict(check_inputs(mask, inputs))
    term = _at_sizes(mask.term(), queries, keys)
    term = _with_sums_as_tables(term, batch, max(queries, keys), given)
    graph = Graph()
    env = {name: graph.placeholder(name) for name in ("b", "h", "q", "k")}
    root = torch.nn.Module()
    read = {}
    for i, name in enumerate(sorted(tables(term))):
        root.register_buffer(f"table_{i}", given[name])
        read[name] = graph.get_attr(f"table_{i}")
    graph.output(_as_tensor(MaskEmitter(graph, env, read), term))
    module = GraphModule(root, graph)

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:  # FlexAttention counts the arguments
        result: Tensor = module(b, h, q, k)
        return result

    return allowed


def _at_sizes(term: Term, s: int, total: int) -> Term:
    return substitute(term, {t.var("s"): t.integer(s), t.var("t"): t.integer(total)})


def _as_tensor(emitter: MaskEmitter, term: Term) -> Node:
    """The mask's node; of a mask that does not depend on the cell, one that does."""
    if term.op == "bool":
        return emitter.graph.call_function(torch.full_like, (emitter.env["q"], term.value), {"dtype": torch.bool})
    node: Node = emitter.emit(term)
    return node


def _with_sums_as_tables(term: Term, b: int, length: int, given: dict[str, Tensor]) -> Term:
    """Running sums depend on one token only, so they are computed once, as tables `[b, token]` added to `given`."""
    while scan_depth(term):
        outer = {x for x in walk([term]) if x.op == "prefix_sum"}
        inner = {y for x in outer for y in walk(x.args) if y.op == "prefix_sum"}
        scan = min(outer - inner, key=lambda x: x.serial)
        tokens = sorted(free_vars(scan) & {"q", "k"})
        if len(tokens) > 1 or "h" in free_vars(scan):
            raise CannotLower(
                f"cannot make {scan} a table", why="it depends on more than one token", todo="materialize the mask"
            )
        token = tokens[0] if tokens else "q"
        device = next((x.device for x in given.values()), torch.device("cpu"))
        rows, columns = torch.arange(b, device=device)[:, None], torch.arange(length, device=device)[None, :]
        name = f"sum:{len(given)}"
        given[name] = evaluate(scan, {"b": rows, token: columns}, given).expand(b, length).contiguous()
        term = substitute(term, {scan: t.read(name, (t.var("b"), t.var(token)), "int")})
    return term
