"""What the export knows of a node and TensorRT does not: sizes that are numbers, and how symbols compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import SymBool, Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from trilithon.lower.tensorrt.network import ITensor, Network, Size, is_tensor
from trilithon.passes import bound_arguments

INDEX = (torch.int32, torch.int64)


def fake(net: Network, argument: str = "") -> Any:
    """The export's value of an argument of the node, or without a name of its result: a fake tensor, a symbol, a number."""
    if net.node is None:
        return None
    value = bound_arguments(net.node)[argument] if argument else net.node
    return value.meta.get("val") if isinstance(value, Node) else value


def fake_shape(net: Network, argument: str = "") -> tuple[Any, ...] | None:
    """The sizes of a tensor as the export knows them; None where it recorded none."""
    value = fake(net, argument)
    return tuple(value.shape) if isinstance(value, Tensor) else None


def certain(condition: bool | SymBool) -> bool:
    """Does it hold for all sizes that the program takes?"""
    return statically_known_true(condition)


def same_size(net: Network, argument: str, axis: int, of: str = "", at: int | None = None) -> bool:
    """Is an axis of an argument surely as long as one (by default that axis) of another, or of the result?"""
    ours, theirs = fake_shape(net, argument), fake_shape(net, of)
    at = axis if at is None else at
    if ours is None or theirs is None or axis >= len(ours) or at >= len(theirs):
        return False
    return certain(ours[axis] == theirs[at])


def known_sizes(net: Network, sizes: Sequence[Size]) -> list[Size]:
    """The sizes of the node's result, with a number wherever the export has one."""
    known = fake_shape(net)
    if known is None or len(known) != len(sizes):
        return list(sizes)
    return [number if isinstance(number, int) else size for number, size in zip(known, sizes, strict=True)]


def axis_of(net: Network, x: ITensor, dim: int) -> int:
    """An axis counted from the front."""
    rank = len(x.shape)
    if not -max(rank, 1) <= dim < max(rank, 1):
        raise net.refuse(f"dim={dim} of a tensor of {rank} axes")
    return dim % max(rank, 1)


def is_number(size: Size) -> bool:
    """Is the size a number, known when the network is built?"""
    return not is_tensor(size)
