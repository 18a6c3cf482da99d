"""Gate and up of a prompt's MLP as one product with its activation, which writes half as many numbers as products alone."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from trilithon.lower.native.fused.operations import COLUMNS, source_column
from trilithon.lower.native.hopper import LEAST_TOKENS, is_for, works

aten = torch.ops.aten
BLOCK_M, BLOCK_N, BLOCK_K, GROUP = 128, 128, 64, 8  # fastest of 68 shapes and forms on an H100, see docs/performance.md
SETTINGS = {"num_warps": 8, "num_stages": 3}
TRIED = (BLOCK_M + 72, BLOCK_N + 8, 2 * BLOCK_K + 8)  # m, n, k with which the kernel is compared before it is used


def gated_product(x: Tensor, weight: Tensor, act: str) -> Tensor:
    """`act(x @ gate.T) * (x @ up.T)`, each of the three rounded to the type of x.

    On a Hopper GPU, with many tokens of 16 bits, one kernel; else PyTorch's product and what follows.

    Args:
        x: `[.. k]`.
        weight: `[2n k]`, gate above up.
        act: "silu", "gelu" or "gelu_tanh".

    Returns:
        `[.. n]`.
    """
    if _suits(x, weight) and _works(x.device, x.dtype, act):
        return gated_by_kernel(x, weight, act)
    return _plain(x, weight, act)


_as_op = torch.library.custom_op("trilithon::gated_product", gated_product, mutates_args=())  # which Inductor takes as it is
GATED = torch.ops.trilithon.gated_product.default


@_as_op.register_fake
def _(x: Tensor, weight: Tensor, act: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


def _plain(x: Tensor, weight: Tensor, act: str) -> Tensor:
    gate, up = F.linear(x, weight).chunk(2, -1)
    made = F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none")
    return made * up


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Are there tiles for the whole GPU, and rows that its copy engine takes: multiples of 16 bytes?"""
    (wide, k), tokens = weight.shape, x.numel() // x.shape[-1]
    return (
        is_for(x.device, x.dtype)
        and tokens >= LEAST_TOKENS
        and k % 8 == 0
        and wide % 16 == 0
        and weight.is_contiguous()
        and weight.data_ptr() % 16 == 0
    )


def gated_by_kernel(x: Tensor, weight: Tensor, act: str) -> Tensor:
    """`gated_product` by the kernel."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from trilithon.lower.native.gated_kernels import gated

    rows, n = x.reshape(-1, x.shape[-1]).contiguous(), weight.shape[0] // 2
    result = x.new_empty((len(rows), n))
    tiles = -(-len(rows) // BLOCK_M) * -(-n // BLOCK_N)
    programs = min(tiles, torch.cuda.get_device_properties(x.device).multi_processor_count) if x.is_cuda else tiles
    shapes = ((rows, (BLOCK_M, BLOCK_K)), (weight, (BLOCK_N, BLOCK_K)), (result, (BLOCK_M, BLOCK_N)))
    found = (TensorDescriptor.from_tensor(held, list(shape)) for held, shape in shapes)
    gated[(programs,)](*found, *result.shape, rows.shape[1], act, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, **SETTINGS)
    return result.view(*x.shape[:-1], n)


@cache
def _works(device: torch.device, dtype: torch.dtype, act: str) -> bool:
    """See `works`; on random numbers."""
    (m, n, k), generator = TRIED, torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator, device=device).to(dtype) for shape in ((m, k), (2 * n, k)))
    weight = weight / k**0.5
    return works(
        "gate and up are multiplied by PyTorch", partial(gated_by_kernel, x, weight, act), partial(_plain, x, weight, act)
    )


def gate_products(gm: GraphModule) -> GraphModule:
    """Make products with gate above up, whose halves meet behind the gate's activation, `gated_product`s, in place.

    %all = linear(%x, %w)                                                 =>   %made = gated_product(%x, %w, "silu")
    %made = mul(silu(%all[.., :n]), %all[.., n:])

    Those of a single token stay: they are no work for the matrix unit.
    """
    for node in list(gm.graph.nodes):
        found = _gated(node) if node.target is aten.mul.Tensor else None
        if found is None:
            continue
        product, act = found
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(GATED, (*product.args[:2], act))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _gated(node: Node) -> tuple[Node, str] | None:
    """The product that a meeting of two halves is made of, and the activation of its first half."""
    for gate, up in (node.args[:2], node.args[1::-1]):
        act = _activation(gate)
        if act is None or not isinstance(up, Node):
            continue
        halves = _half(gate.args[0], 0), _half(up, 1)  # type: ignore[union-attr]
        product = halves[0]
        if product is not None and product is halves[1] and _is_gate_and_up(product):
            return product, act
    return None


def _activation(node: Any) -> str | None:
    if not isinstance(node, Node) or len(node.users) != 1:
        return None
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
    return "silu" if node.target is aten.silu.default else None


def _half(node: Any, which: int) -> Node | None:
    """The product that a value is the first or second half of, of which nothing else is read."""
    if not isinstance(node, Node) or len(node.users) != 1 or node.target not in COLUMNS:
        return None
    source, place = source_column(node)
    whole, own = source.meta["val"].shape[-1], node.meta["val"].shape[-1]
    is_half = whole == 2 * own and place == "{0}" + f" + {own}" * which
    readers = source.users if node.target is aten.slice.Tensor else node.args[0].users  # type: ignore[union-attr]
    return source if is_half and len(readers) == 2 and (readers is source.users or len(source.users) == 1) else None


def _is_gate_and_up(product: Node) -> bool:
    if product.target is not aten.linear.default or len(product.args) > 2:
        return False
    weight, made = product.args[1], product.meta["val"]
    return isinstance(weight, Node) and weight.op == "get_attr" and made.dim() > 1 and not _is_one(made.shape[-2])


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
