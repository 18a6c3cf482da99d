"""A plug-in for Torch-TensorRT: it proves each attention mask, where Torch-TensorRT takes any to be causal by default.

`install()` adds a lowering pass, and where TensorRT has our form of attention, converters for it. The pass needs no GPU;
`import torch_tensorrt` does.
"""

from __future__ import annotations

import importlib
import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._sympy.value_ranges import ValueRanges

from trilithon.capture.program import GraphProgram
from trilithon.capture.sites import FUSED, find_sites
from trilithon.errors import CannotLower, InputError, TrilithonError
from trilithon.integrations.masks import drop_proved_masks
from trilithon.integrations.own_converters import use_default_scales, write_out_constant_masks
from trilithon.lower.tensorrt import converters as _  # noqa: F401 (fills the table)
from trilithon.lower.tensorrt.converters.registry import CONVERTERS
from trilithon.lower.tensorrt.library import library
from trilithon.lower.tensorrt.network import Network
from trilithon.options import Options
from trilithon.passes import bound_arguments, run_passes, where_of
from trilithon.prove.program import Examined
from trilithon.prove.verdict import Proof
from trilithon.report.report import Report
from trilithon.report.versions import versions
from trilithon.rewrite.erase_dead_masks import EraseDeadMasks
from trilithon.spec.masks import Causal

log = logging.getLogger(__name__)
VERSIONS = ("2.11", "2.12", "2.13", "2.14")
PASSES = "torch_tensorrt.dynamo.lowering.passes._aten_lowering_pass"
REGISTRY = "torch_tensorrt.dynamo.conversion._ConverterRegistry"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
NETWORK = "_trilithon_network"  # attribute of a conversion context

_reports: deque[Report] = deque(maxlen=64)


def install(*, converters: bool = True) -> None:
    """Have Torch-TensorRT prove masks in every compilation from now on; a second call changes nothing.

    Args:
        converters: also convert attention our way, from Torch-TensorRT 2.13 on: grouped heads, values of another width,
            biases of another type, causal by position at any lengths. Else attention is put in the forms that its own
            converters get right: with the default scale, and written out where the mask is a constant.

    Raises:
        InputError: torch_tensorrt cannot be imported, or is of a version that this plug-in was not written for.
    """
    passes = _module(PASSES)
    ours = converters and _has_our_attention()
    if prove_masks not in passes.ATEN_POST_LOWERING_PASSES.passes:
        passes._aten_lowering_pass(prove_masks, index=0)  # before masks are folded to constants, or dropped
        if not ours:
            passes._aten_lowering_pass(use_default_scales, index=1)
            passes._aten_lowering_pass(write_out_constant_masks, index=2)
    if ours:
        _register(_module(REGISTRY))


def uninstall() -> None:
    """Leave Torch-TensorRT as it was, with its own default for masks."""
    passes, registry = _module(PASSES), _module(REGISTRY)
    for own in (prove_masks, use_default_scales, write_out_constant_masks):
        while own in passes.ATEN_POST_LOWERING_PASSES.passes:
            passes._remove_lowering_pass(index=passes.ATEN_POST_LOWERING_PASSES.passes.index(own))
    for target in FUSED:
        known = registry.DYNAMO_ATEN_CONVERTERS.get(target, [])
        known[:] = [support for support in known if support.converter_implementation is not convert_attention]
        if not known:
            registry.DYNAMO_ATEN_CONVERTERS.pop(target, None)


def version() -> str:
    """The Torch-TensorRT that `install` would change.

    Raises:
        InputError: as `install`.
    """
    _module(PASSES)
    return str(importlib.import_module("torch_tensorrt").__version__)


def reports() -> tuple[Report, ...]:
    """What was found in each graph that was lowered, oldest first: the last 64."""
    return tuple(_reports)


def _module(name: str) -> Any:
    try:
        package = importlib.import_module("torch_tensorrt")
    except Exception as error:  # without a GPU it raises what CUDA raises
        missing = isinstance(error, ImportError)
        raise InputError(
            "cannot plug into Torch-TensorRT",
            why=f"import torch_tensorrt failed: {error}",
            todo="pip install torch-tensorrt-rtx, of the version of torch" if missing else "run this where a GPU is",
        ) from error
    version = ".".join(str(package.__version__).split(".")[:2])
    if version not in VERSIONS:
        raise InputError(
            f"cannot plug into Torch-TensorRT {package.__version__}",
            why=f"this plug-in was written for {', '.join(VERSIONS)}, whose passes and converters have no public names",
            todo="pip install one of these, or compile with attn_bias_is_causal=False",
        )
    return importlib.import_module(name)


# ------------------------------------------------------------ the lowering pass


def prove_masks(gm: GraphModule, settings: Any) -> GraphModule:
    """The lowering pass: masks that are proved causal or full become arguments of the same operation; the rest stay.

    Args:
        gm: ATen operations, after decomposition; its attributes become part of the engine.
        settings: its `attn_bias_is_causal`, which says without a proof that every bias is causal, is set to False.
    """
    settings.attn_bias_is_causal = False
    report = Report(model="a graph of Torch-TensorRT", inputs=(), route="torch_tensorrt", sites=[], versions=versions())
    try:
        report = _prove(gm, report)
    except Exception as error:  # the masks stay, and are right
        why = error.why if isinstance(error, TrilithonError) and error.why else f"{type(error).__name__}: {error}"
        log.warning("no mask was proved: %s", why)
        report = replace(report, notes=(f"unchanged: {why}",))
    _reports.append(report)
    log.info("%s", report)
    return gm


def _prove(gm: GraphModule, report: Report) -> Report:
    writes = [n for n in gm.graph.nodes if n.op == "call_function" and _writes(n)]
    if writes:
        return replace(report, notes=(f"unchanged: {writes[0].target} writes to what masks may be made of",))
    program = GraphProgram.of(gm)
    program = replace(program, range_constraints={s: _from_one(r) for s, r in program.range_constraints.items()})
    ours = {new: old for old, new in program.nodes.items()}
    calls = {site.output: ours[_call(site.output)] for site in find_sites(program.graph) if _call(site.output).target in FUSED}
    report = drop_proved_masks(gm, program, calls, report, Options(), _objects)
    if report.passes:
        run_passes(gm, (EraseDeadMasks(),))
    return report


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _call(output: Node) -> Node:
    """The attention of which this is the first result."""
    before = output.args[0] if output.args else None
    return before if output.target not in FUSED and isinstance(before, Node) else output


def _from_one(allowed: ValueRanges[Any]) -> ValueRanges[Any]:
    """Export has no symbol for sizes below 2, and Torch-TensorRT takes 2 as 1."""
    return ValueRanges(min(allowed.lower, 1), allowed.upper) if allowed.lower == 2 else allowed


def _objects(examined: Examined, proof: Proof) -> str:
    """Versions differ in what causal means where there are more keys than queries."""
    assert examined.meaning is not None
    same = examined.meaning.dims[2] is examined.meaning.dims[3]
    return "" if same or proof.mask != Causal() else "causal from the first key on, with other lengths"


# ------------------------------------------------------------ the converters


def _has_our_attention() -> bool:
    """Has TensorRT the layer that our forms of attention are made with? Torch-TensorRT 2.11 comes with one that has not."""
    try:
        return hasattr(library().INetworkDefinition, "add_attention_v2") and _version_of_conversion() >= (2, 13)
    except CannotLower:
        return False


def _version_of_conversion() -> tuple[int, int]:
    major, minor = importlib.import_module("torch_tensorrt").__version__.split(".")[:2]
    return int(major), int(minor)


def _register(registry: Any) -> None:
    for target in FUSED:
        known = registry.DYNAMO_ATEN_CONVERTERS.get(target, [])
        if any(support.converter_implementation is convert_attention for support in known):
            continue
        registry.dynamo_tensorrt_converter(
            target,
            capability_validator=serves,
            priority=registry.ConverterPriority.HIGH,
            supports_dynamic_shapes=True,
        )(convert_attention)


def serves(node: Node, settings: Any = None) -> bool:
    """Can our converter take this call? Else Torch-TensorRT's own is asked."""
    args = bound_arguments(node)
    q, k, v = (_value(args[name]) for name in ("query", "key", "value"))
    if not all(isinstance(x, Tensor) and x.dim() == 4 and x.dtype in FLOATS for x in (q, k, v)):
        return False
    if len({x.dtype for x in (q, k, v)}) > 1 or args.get("dropout_p") or node.meta.get("_fp8_softmax_scale") is not None:
        return False
    heads = (q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    if not all(isinstance(n, int) for n in heads) or heads[0] % heads[1] or k.shape[3] != q.shape[3]:
        return False
    if str(q.shape[0]) != str(k.shape[0]) or list(map(str, v.shape[:3])) != list(map(str, k.shape[:3])):
        return False
    if not isinstance(args.get("scale"), (int, float, type(None))):
        return False
    return _can_mask(args.get("attn_mask", args.get("attn_bias"))) and _only_first_is_used(node)


def _value(argument: Any) -> Any:
    return argument.meta.get("val") if isinstance(argument, Node) else None


def _can_mask(mask: Any) -> bool:
    value = _value(mask)
    return mask is None or (isinstance(value, Tensor) and value.dim() <= 4 and value.dtype in (torch.bool, *FLOATS))


def _only_first_is_used(node: Node) -> bool:
    several = isinstance(node.meta.get("val"), (tuple, list))
    return not several or all(user.args[1:] == (0,) or not user.users for user in node.users)


def convert_attention(ctx: Any, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Any:
    """The converter, as Torch-TensorRT calls it; the layers are those of our own networks.

    Args:
        ctx: `ctx.net` is TensorRT's network, `ctx.current_node` the node with its metadata.
    """
    net = getattr(ctx, NETWORK, None)
    if net is None:
        net = Network(definition=ctx.net)
        setattr(ctx, NETWORK, net)  # it holds what constants of the network point to
    given = {a.name: a.default_value for a in target._schema.arguments}
    given |= dict(zip((a.name for a in target._schema.arguments), args, strict=False)) | dict(kwargs)
    net.node = ctx.current_node
    with net.at(replace(where_of(net.node), node=name)):
        tensors = {key: net.constant(x) if isinstance(x, Tensor) else x for key, x in given.items()}
        return CONVERTERS[target](net, **tensors)
