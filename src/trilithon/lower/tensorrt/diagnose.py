"""Where an engine goes wrong: built once more with the result of each attention as an output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor
from torch.fx import GraphModule

from trilithon.lower.inputs import Input
from trilithon.lower.tensorrt.convert import convert
from trilithon.lower.tensorrt.engine import build, resolve_target
from trilithon.lower.tensorrt.interpret import Difference, first_difference
from trilithon.lower.tensorrt.module import TensorRTModule
from trilithon.options import Options


def first_diverging_site(
    gm: GraphModule, inputs: Sequence[Input], tensors: Sequence[Tensor], options: Options, limit: float, exact: int = 0
) -> Difference | None:
    """The first attention of which the engine gives something else than the graph run in PyTorch.

    Args:
        gm: a canonical module, as given to `lower_tensorrt`.
        inputs: what it takes.
        tensors: one for each input; they are not changed.
        limit: relative error that is allowed.
        exact: as in `lower_tensorrt`.

    Raises:
        CannotLower: the engine cannot be built or run.
    """
    net = convert(gm, inputs, attention=options.attention, exact=exact)
    named = {spec.name: x.clone() for spec, x in zip(inputs, tensors, strict=True)}
    sites = [net.values[node.name] for node in gm.graph.nodes if "attention" in str(node.target)]
    watched = [value for value in sites if not value.is_network_output]
    for value in watched:
        net.definition.mark_output(value)
    with TemporaryDirectory() as folder:
        engine = build(net, inputs, resolve_target(options.gpu), Path(folder) / "diagnosis.plan")
        outputs = TensorRTModule(engine, net)(*(x.clone() for x in named.values()))
    values = outputs if isinstance(outputs, tuple) else (outputs,)
    own = [name for name in engine.outputs if name not in engine.aliases.values()]
    observed = {name: x for name, x in zip(own, values, strict=True) if name in {w.name for w in watched}}
    used = {net.definition.get_input(i).name for i in range(net.definition.num_inputs)}
    feeds = {name: x for name, x in named.items() if name in used}
    return first_difference(net, gm, feeds, observed=observed, limit=limit)
