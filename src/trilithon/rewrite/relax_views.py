"""Let views be copies where strides ask for it: another kernel may lay its result out differently."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule

from trilithon.passes import Outcome

aten = torch.ops.aten
VIEWS = {aten.view.default, aten._unsafe_view.default}


@dataclass(frozen=True)
class RelaxViews:
    """Replace `view`, which fails on strides that export did not see, by `reshape`, which gives the same values.

        %flat = view(%attended, [%b, %s, 2048])   =>   %flat = reshape(%attended, [%b, %s, 2048])

    Equal because the program is functional: nothing writes through a view.
    """

    name: ClassVar[str] = "relax-views"

    def __call__(self, gm: GraphModule) -> Outcome:
        views = [n for n in gm.graph.nodes if n.target in VIEWS]
        for node in views:
            node.target = aten.reshape.default
        return Outcome(len(views))
