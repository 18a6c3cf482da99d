"""The closed table of operations that token locality knows, each with the rule for the label of its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from trilithon.prove import collectives, experts, local_lookups, local_products, local_shapes, local_values
from trilithon.prove.axes import Found, Scope

Rule = Callable[[Node, Scope], Found]

RULES: dict[Any, Rule] = {
    **local_values.RULES,
    **local_shapes.RULES,
    **local_products.RULES,
    **local_lookups.RULES,
    **experts.RULES,
}
NAMED: dict[str, Rule] = {**experts.NAMED, **collectives.NAMED}
SIZED: set[Any] = local_shapes.SIZED  # their rules say what sizes may enter
