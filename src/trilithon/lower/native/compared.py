"""Generated kernels are compared with what they are made of once on a machine, not whenever a program is lowered again."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule

from trilithon.lower.inputs import Input
from trilithon.lower.native.fused.remembered import Remembered
from trilithon.rewrite.unlift import device_of

Compare = Callable[[GraphModule, GraphModule, tuple[Input, ...]], None]


def compare_once(compare: Compare, plain: GraphModule, fused: GraphModule, inputs: tuple[Input, ...]) -> None:
    """Run `compare(plain, fused, inputs)`, which raises where they disagree, unless it has passed on this machine."""
    passed = Remembered("same", device_of(plain), inputs, plain, fused)
    if passed.read() is None:
        compare(plain, fused, inputs)
        passed.keep(True)
