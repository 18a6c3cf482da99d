"""The place of the largest of many numbers, found by many blocks of a GPU: Inductor gives a whole row to one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

aten = torch.ops.aten
PIECE = 1024  # numbers that one block looks at


def spread_argmax(gm: GraphModule) -> None:
    """Let many blocks share each argmax along a last axis.

    %best = argmax(%x, -1)   =>   %best = argmax_in_pieces(%x)
    """
    for node in gm.graph.find_nodes(op="call_function", target=aten.argmax.default):
        if node.args[1:] == (-1,) and not node.kwargs:
            node.target, node.args = argmax_in_pieces, node.args[:1]
    gm.recompile()


def argmax_in_pieces(x: Tensor) -> Tensor:
    """`x.argmax(-1)`: the largest of each piece, and then the largest of these; of equal ones the first."""
    size = x.shape[-1]
    if not x.is_floating_point() or size <= PIECE:
        return x.argmax(-1)
    pieces = -(-size // PIECE)
    padded = torch.nn.functional.pad(x, (0, pieces * PIECE - size), value=-torch.inf)
    highest, place = padded.unflatten(-1, (pieces, PIECE)).max(-1)
    piece = highest.argmax(-1, keepdim=True)
    found: Tensor = piece * PIECE + place.gather(-1, piece)
    return found.squeeze(-1)
