"""A row times a large matrix, written as products and their sums, without the matrix in float32 that stands between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from trilithon.lower.tensorrt.interpret.arithmetic import BLOCK, product
from trilithon.lower.tensorrt.interpret.read import HALF, Layer, evaluates
from trilithon.lower.tensorrt.library import torch_dtypes

COLUMNS = "a cast, PROD and SUM"


def together(layers: Sequence[Layer]) -> list[Layer]:
    """The layers, with each such three as one; nothing else may read what is between them.

    %wide = cast(%w)             =>   %y = columns(%x, %w)
    %all = PROD(%x, %wide)
    %y = SUM(%all, axis 1)
    """
    readers = Counter(name for layer in layers for name in layer.sources)
    maker = {tensor.name: layer for layer in layers for tensor in layer.results}
    made: dict[str, Layer] = {}
    gone: set[str] = set()
    for layer in layers:
        products = maker.get(str(layer.sources[0])) if _is_sum(layer) else None
        cast = maker.get(str(products.sources[1])) if products is not None and _is_product(products) else None
        if products is None or cast is None or not _is_large_cast(cast):
            continue
        if readers[products.results[0].name] == readers[cast.results[0].name] == 1:
            made[layer.name] = replace(layer, kind=COLUMNS, sources=(products.sources[0], cast.sources[0]))
            gone |= {products.name, cast.name}
    return [made.get(layer.name, layer) for layer in layers if layer.name not in gone]


def _is_sum(layer: Layer) -> bool:
    return layer.kind == "REDUCE" and layer.own.op.name == "SUM" and layer.own.axes == 2 and not layer.own.keep_dims


def _is_product(layer: Layer) -> bool:
    return layer.kind == "ELEMENTWISE" and layer.own.op.name == "PROD" and len(layer.results[0].shape) == 2


def _is_large_cast(layer: Layer) -> bool:
    if layer.kind != "CAST":
        return False
    matrix = layer.own.get_input(0)
    sizes = list(matrix.shape)
    return len(sizes) == 2 and min(sizes) > 0 and sizes[0] * sizes[1] >= BLOCK and torch_dtypes()[matrix.dtype] in HALF


@evaluates(COLUMNS, "IReduceLayer")
def columns(layer: Layer) -> Tensor:
    return product(layer.wide(0), layer.x(1).transpose(0, 1))[0]
