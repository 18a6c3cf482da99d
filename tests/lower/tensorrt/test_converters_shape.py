"""Converters that move data, look it up, convolve, scan and sort: each against PyTorch, at several sizes, and built.

The rows of a table are the outputs of one program: it is exported, converted and built once, then interpreted on random
data and compared with eager.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Graph, GraphModule
from torch.nn import functional

from trilithon.errors import CannotLower
from trilithon.lower.inputs import Axis, Input
from trilithon.lower.tensorrt.convert import convert
from trilithon.lower.tensorrt.engine import build
from trilithon.lower.tensorrt.interpret import interpret
from trilithon.lower.tensorrt.library import library
from trilithon.lower.tensorrt.network import Network
from trilithon.rewrite.unlift import unlift

aten = torch.ops.aten
Rows = dict[str, Callable[..., Any]]
B, S = Dim("b", min=3, max=8), Dim("s", min=6, max=16)
RANGES = {B: Axis(3, 5, 8), S: Axis(6, 11, 16)}
FREE = Axis(2, 64, 8192)
SIZES = ((3, 6), (4, 9), (8, 16))
LAST = torch.iinfo(torch.int64).max


def floats(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape).to(dtype)


def ints(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape)


def data(b: int, s: int) -> tuple[Tensor, ...]:
    """Halves, integers and truth values of one shape `[b s 12]`, and a smaller one of halves, `[b 1 12]`."""
    return floats(b, s, 12), ints(-99, 99, b, s, 12), ints(0, 2, b, s, 12).bool(), floats(b, 1, 12)


DATA_AXES: tuple[dict[int, Any], ...] = ({0: B, 1: S}, {0: B, 1: S}, {0: B, 1: S}, {0: B})

VIEW: Rows = {
    "heads": lambda x, i, m, one: x.view(x.shape[0], -1, 3, 4).transpose(1, 2),
    "heads of unknown number": lambda x, i, m, one: x.view(x.shape[0], x.shape[1], -1, 4),
    "heads behind a merged axis": lambda x, i, m, one: x.flatten(1).view(x.shape[0], x.shape[1], -1, 4).transpose(1, 2),
    "merge the last": lambda x, i, m, one: i.view(i.shape[0], -1),
    "merge the first": lambda x, i, m, one: i.view(i.shape[0] * i.shape[1], 12),
    "all in one": lambda x, i, m, one: m.view(-1),
    "split and merge": lambda x, i, m, one: x.view(x.shape[0], x.shape[1] * 3, 4),
    "reshape behind transpose": lambda x, i, m, one: x.transpose(0, 1).reshape(x.shape[1], -1),
    "reshape two dynamic": lambda x, i, m, one: i.transpose(0, 1).reshape(i.shape[1], 2 * i.shape[0], 6),
    "flatten": lambda x, i, m, one: x.flatten(0, 1).unflatten(1, (3, -1)),
    "movedim": lambda x, i, m, one: i.movedim(0, -1),
    "permute": lambda x, i, m, one: m.permute(-1, 0, 1),
    "transpose negative": lambda x, i, m, one: i.transpose(-1, -3),
    "t": lambda x, i, m, one: x[0].t(),
    "t of one axis": lambda x, i, m, one: x[0, 0].t() * 1,
    "unsqueeze": lambda x, i, m, one: (x.unsqueeze(0), i.unsqueeze(-1), m.unsqueeze(-3)),
    "squeeze": lambda x, i, m, one: (one.squeeze(1), one.squeeze(), one.squeeze((0, 1)), i.unsqueeze(-1).squeeze()),
    "squeeze nothing": lambda x, i, m, one: x.squeeze(1) * 1,
}

REPEAT: Rows = {
    "expand": lambda x, i, m, one: one.expand(-1, x.shape[1], -1),
    "expand new axes": lambda x, i, m, one: one.unsqueeze(0).expand(2, -1, x.shape[1], 12),
    "expand static": lambda x, i, m, one: one.expand(one.shape[0], 5, 12),
    "expand kept": lambda x, i, m, one: i.expand(x.shape[0], -1, 12) * 1,
    "expand_as": lambda x, i, m, one: one.expand_as(x),
    "broadcast_to": lambda x, i, m, one: torch.broadcast_to(i[0], i.shape),
    "group heads": lambda x, i, m, one: x[:, :, None].expand(-1, -1, 2, -1).reshape(x.shape[0], x.shape[1] * 2, 12),
    "repeat": lambda x, i, m, one: (x.repeat(1, 2, 3), i.repeat(2, 1, 1), m.repeat(2, 1, 1, 1)),
    "repeat a size": lambda x, i, m, one: i.repeat(x.shape[0], 1, 2),
    "repeat of one": lambda x, i, m, one: one.repeat(1, x.shape[1], 1),
    "repeat nothing": lambda x, i, m, one: i.repeat(1, 1, 1) * 1,
    "tile": lambda x, i, m, one: (x.tile(2), i.tile(2, 1)),
    "repeat_interleave": lambda x, i, m, one: (x.repeat_interleave(3, 1), i.repeat_interleave(2, -1)),
    "repeat_interleave all": lambda x, i, m, one: i.repeat_interleave(2),
}

SLICE: Rows = {
    "slice": lambda x, i, m, one: (x[:, 1:3], i[:, :4], m[..., 3:], x[:, 2:]),
    "negative": lambda x, i, m, one: (x[:, -3:], i[:, :-2], m[:, -5:-2], x[..., -4:-1]),
    "out of range": lambda x, i, m, one: (x[:, :99], i[..., 3:99], m[:, -99:4], x[..., -99:LAST]),
    "nothing left": lambda x, i, m, one: (x[..., 5:3], i[..., 12:], x[..., :-12], i[..., 99:]),
    "by sizes": lambda x, i, m, one: (
        x[:, : x.shape[0]],
        i[:, x.shape[1] - 3 :],
        m[:, x.shape[0] - 2 : x.shape[1] - 1],
        x[:, : x.shape[1]] * 1,
    ),
    "by negative sizes": lambda x, i, m, one: (x[..., -x.shape[0] :], i[..., -x.shape[0] : 11], m[..., : -x.shape[0]]),
    "step": lambda x, i, m, one: (x[:, ::2], i[:, 1::3], m[..., ::5], x[..., 2:9:4], i[:, : x.shape[0] + 1 : 2]),
    "narrow": lambda x, i, m, one: x.narrow(1, 2, 3),
    "select": lambda x, i, m, one: (x[:, 0], i[:, -1], m.select(-1, 5), x[-1], i.select(1, x.shape[0] - 2)),
    "split": lambda x, i, m, one: (x.split(5, -1), i.split(4, 2), x.split(12, 2)),
    "split_with_sizes": lambda x, i, m, one: (x.split([2, 3, 7], -1), i.split([x.shape[1] - 1, 1], 1)),
    "chunk": lambda x, i, m, one: x.chunk(3, -1),
    "unbind": lambda x, i, m, one: i.view(i.shape[0], i.shape[1], 3, 4).unbind(2),
    "flip": lambda x, i, m, one: (x.flip(1), i.flip(-1, 0)),
    "slice_scatter": lambda x, i, m, one: (
        torch.slice_scatter(x, x[:, 1:3], 1, 2, 4),
        torch.slice_scatter(i, i[:, :2], 1, -2),
        torch.slice_scatter(x, i, -1),
        torch.slice_scatter(m, m[:, :-1], 1, 1, LAST),
    ),
    "select_scatter": lambda x, i, m, one: (torch.select_scatter(x, x[:, 0], 1, -1), torch.select_scatter(i, i[1], 0, 0)),
}

JOIN: Rows = {
    "cat": lambda x, i, m, one: (torch.cat([x, one], 1), torch.cat([i, i[:, :2], i], -2), torch.cat([m, m], -1)),
    "cat of two types": lambda x, i, m, one: (torch.cat([i, x], -1), torch.cat([m, i], 0)),
    "cat of one": lambda x, i, m, one: torch.cat([x], 0) * 1,
    "rotate half": lambda x, i, m, one: torch.cat((x[..., 6:], x[..., :6]), dim=-1),
    "stack": lambda x, i, m, one: (torch.stack([x, x * 2], 0), torch.stack([i, i], -1), torch.stack([m, m], 2)),
    "pad": lambda x, i, m, one: (
        functional.pad(x, (1, 2)),
        functional.pad(i, (0, 0, 3, 1), value=7),
        functional.pad(m, (0, 1, 2, 0), value=True),
        functional.pad(x, (-2, 3, 1, -1), value=-0.5),
        functional.pad(x, (0, 0)) * 1,
    ),
    "constant_pad_nd": lambda x, i, m, one: torch.constant_pad_nd(x, (0, 0, -1, -2, 1, 0), 3.0),
    "roll": lambda x, i, m, one: (x.roll(1, 1), i.roll(-3, -1), m.roll((2, 20), (0, 1)), x.roll(-1, 1)),
    "diff": lambda x, i, m, one: (i.diff(), i.diff(dim=1), m.diff(dim=1), i.diff(n=2, dim=-1)),
    "diff with more": lambda x, i, m, one: (
        torch.diff(i, dim=1, prepend=i[:, :1] - 1),
        torch.diff(i, dim=-1, append=i[..., :2]),
        torch.diff(m, dim=1, prepend=m[:, -1:], append=m[:, :1]),
    ),
}


def places(b: int, s: int) -> tuple[Tensor, ...]:
    """A table `[b s 6]` of halves, one of integers, and indices: negative ones too, and shapes that broadcast."""
    shapes = ints(-b, b, s), ints(-s, s, b, 1), ints(-6, 6, 1, s), ints(0, b, 3, 1, 1), ints(0, s, b, 4, 6)
    return floats(b, s, 6), ints(-99, 99, b, s, 6), *shapes, ints(-b, b, 2, s).int()


PLACES_AXES: tuple[dict[int, Any], ...] = ({0: B, 1: S}, {0: B, 1: S}, {0: S}, {0: B}, {1: S}, {}, {0: B}, {1: S})

INDEX: Rows = {
    "first": lambda x, i, p, q, r, h, e, n: (x[p], i[h], i[n]),
    "middle": lambda x, i, p, q, r, h, e, n: (x[:, q], i[:, q[0]]),
    "last": lambda x, i, p, q, r, h, e, n: (x[..., r], i[:, :, r]),
    "without axes": lambda x, i, p, q, r, h, e, n: (
        aten.index(x, [p[0]]),
        aten.index(i, [None, q[1, 0]]),
        aten.index(x, [p[0], None, r[0, 1]]),
    ),
    "two that broadcast": lambda x, i, p, q, r, h, e, n: (x[p, r], i[h, q], i[:, q, r]),
    "three": lambda x, i, p, q, r, h, e, n: (x[h, q, r], i[h, q, n[0] % 6], i[p, p, r]),
    "apart": lambda x, i, p, q, r, h, e, n: (x[p, :, r], i[h, :, r], x[None][:, p, :, r], i[:, None][:, :, q, r]),
    "new axes before": lambda x, i, p, q, r, h, e, n: (x[None, :, q], i[None, p, r]),
    "padding of a mask": lambda x, i, p, q, r, h, e, n: (i[..., 0] > 0)[h[..., None], q[0]],
    "index_select": lambda x, i, p, q, r, h, e, n: (
        x.index_select(0, h[:, 0, 0]),
        i.index_select(-1, r[0].abs() % 6),
        i.index_select(1, e[0, 0]),
        i.index_select(0, h[0, 0, 0]),
    ),
    "gather": lambda x, i, p, q, r, h, e, n: (x.gather(1, e), i.gather(1, e), i.gather(1, e[:2, :, :3]), x.gather(-1, e % 6)),
    "gather other rows": lambda x, i, p, q, r, h, e, n: i.gather(0, h.expand(3, x.shape[1], 6) % 2),
    "embedding": lambda x, i, p, q, r, h, e, n: (
        functional.embedding(q.abs() % 2, x[0]),
        functional.embedding(h, i[:, 0], padding_idx=0),
        functional.embedding(n.abs() % 3, x[1]),
    ),
}

SCATTER: Rows = {
    "scatter": lambda x, i, p, q, r, h, e, n: (
        x.scatter(1, torch.argsort(x, 1)[:, :4], x[:, 1:] + 1),
        i.scatter(-1, torch.argsort(i, -1)[:1, :, :3], 7),
    ),
    "index_put": lambda x, i, p, q, r, h, e, n: (
        x.index_put((torch.argsort(x[:, 0, 0])[:2],), x[:2] + 1),
        i.index_put((torch.argsort(i[:, 0, 0]) - 3,), i[0, 0]),
    ),
}


def distinct(b: int, s: int) -> tuple[Tensor, ...]:
    """No two values of a tensor are equal, so that an order is the only one."""
    count = b * s * 12
    return (torch.randperm(count).view(b, s, 12) - 7).to(torch.float32), torch.randperm(count).view(b, s, 12) - 7, floats(b, s)


SCAN: Rows = {
    "cumsum": lambda x, i, h: (i.cumsum(1), i.cumsum(-1), (i > 9).cumsum(0), x.cumsum(1)),
    "cumsum in a type": lambda x, i, h: ((i > 9).cumsum(1, dtype=torch.int32), i.cumsum(0, dtype=torch.float32)),
    "cumsum of halves": lambda x, i, h: (h.cumsum(1), (h * 3).cumsum(0), h.cumsum(-1, dtype=torch.float32)),
    "topk": lambda x, i, h: (x.topk(2), i.topk(3, 1, largest=False), x[0, 0].topk(2)),
    "topk in any order": lambda x, i, h: x.topk(4, -1, sorted=False)[0].sort()[0],
    "topk of a size": lambda x, i, h: x.topk(x.shape[0], 2),
    "sort": lambda x, i, h: (x.sort(), i.sort(1, descending=True), i[:, 0, 0].sort(), x.sort(0)),
    "argsort": lambda x, i, h: (i.argsort(), x.argsort(1, descending=True)),
}

TABLES: dict[str, tuple[Rows, Callable[[int, int], tuple[Tensor, ...]], tuple[dict[int, Any], ...]]] = {
    "view": (VIEW, data, DATA_AXES),
    "repeat": (REPEAT, data, DATA_AXES),
    "slice": (SLICE, data, DATA_AXES),
    "join": (JOIN, data, DATA_AXES),
    "index": (INDEX, places, PLACES_AXES),
    "scatter": (SCATTER, places, PLACES_AXES),
    "scan": (SCAN, distinct, ({0: B, 1: S}, {0: B, 1: S}, {0: B, 1: S})),
}


class Table(nn.Module):
    """All rows of a table on the same inputs."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(value for _, value in results(self.rows, inputs))


def results(rows: Rows, inputs: tuple[Tensor, ...]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor that a row gives, with the row's name."""
    for name, row in rows.items():
        for place, value in enumerate(flat(row(*inputs))):
            yield f"{name} {place}", value


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [x for part in value for x in flat(part)]


def export(model: nn.Module, inputs: tuple[Tensor, ...], axes: tuple[dict[int, Any], ...]) -> tuple[GraphModule, list[Input]]:
    """The program as the converters get it, and what it takes."""
    program = torch.export.export(model.eval(), inputs, dynamic_shapes=(axes,), strict=False).run_decompositions({})
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"][-len(inputs) :]
    spec = [
        Input(name, x.dtype, tuple(RANGES.get(dims[i], FREE) if i in dims else Axis(n, n, n) for i, n in enumerate(x.shape)))
        for name, x, dims in zip(names, inputs, axes, strict=True)
    ]
    return unlift(program), spec


def run(net: Network, spec: list[Input], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The outputs of the network on the CPU."""
    taken = {net.definition.get_input(i).name for i in range(net.definition.num_inputs)}
    found = interpret(net, {x.name: value for x, value in zip(spec, inputs, strict=True) if x.name in taken})
    return [found[f"output_{i}"] for i in range(len(found))]


@cache
def exported(table: str) -> tuple[GraphModule, list[Input]]:
    rows, make, axes = TABLES[table]
    return export(Table(rows), make(5, 11), axes)


@cache
def converted(table: str) -> tuple[Network, list[Input]]:
    gm, spec = exported(table)
    return convert(gm, spec), spec


def check(table: str, net: Network, spec: list[Input]) -> None:
    """The network gives what eager gives, row by row."""
    rows, make, _ = TABLES[table]
    for b, s in SIZES:
        torch.manual_seed(b)
        inputs = make(b, s)
        wanted = list(results(rows, inputs))
        for (name, value), found in zip(wanted, run(net, spec, inputs), strict=True):
            assert found.dtype == value.dtype, name
            assert torch.equal(found, value), f"{name}, b={b} s={s}"


@pytest.mark.parametrize("table", TABLES)
def test_each_row_gives_what_eager_gives(table: str) -> None:
    check(table, *converted(table))


@pytest.mark.parametrize("table", ["repeat", "join", "index"])
def test_each_row_needs_nothing_that_the_export_knows(table: str) -> None:
    gm, spec = exported(table)
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.nodes:
        node.meta = {}
    check(table, convert(GraphModule(gm, graph), spec), spec)


@pytest.mark.parametrize("table", TABLES)
def test_a_size_that_the_export_knows_is_known_to_tensorrt(table: str) -> None:
    (gm, _), (net, _) = exported(table), converted(table)
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and node.name in net.values:
            for size, known in zip(net.values[node.name].shape, value.shape, strict=True):
                assert size == (known if isinstance(known, int) else -1), node.format_node()


@pytest.mark.parametrize("table", TABLES)
def test_the_builder_takes_each_table(table: str, tmp_path: Path) -> None:
    net, spec = converted(table)
    assert build(net, spec, "sm80", tmp_path / "plan").plan_bytes > 0


def test_halves_are_summed_in_float32() -> None:
    net, _ = converted("scan")
    layers = [net.definition.get_layer(i) for i in range(net.definition.num_layers)]
    scans = [layer for layer in layers if layer.type == library().LayerType.CUMULATIVE]
    assert scans
    assert all(layer.get_input(0).dtype != library().float16 for layer in scans)


def on_sizes(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Slices whose bounds may be on either side of 0, or behind the end: x is `[3 s]`, y `[n]`."""
    n = aten.sym_size.int(y, 0)
    return (
        aten.slice.Tensor(x, 1, n - 4, LAST),
        aten.slice.Tensor(x, 1, 0, n - 6),
        aten.slice.Tensor(x, -1, n - 4, n + 2),
        aten.slice.Tensor(x, 1, 5, n),
        aten.slice.Tensor(x, 1, n, 5),
        aten.slice.Tensor(x, 1, n - 4, LAST, 3),
        aten.slice.Tensor(x, 1, 0, n, 2),
        aten.slice.Tensor(x, 1, -10, 10),
        aten.slice.Tensor(x, 1, 2, 9),
        aten.slice.Tensor(x, 1, -7, -2),
        aten.slice.Tensor(x, 1, 8, 2),
        aten.select.int(x, 1, n - 4),
        aten.slice_scatter.default(x, aten.slice.Tensor(aten.flip.default(x, [1]), 1, n - 3, n - 1), 1, n - 3, n - 1),
        aten.roll.default(x, [7], [1]),
        aten.roll.default(x, [-20], [1]),
        aten.repeat.default(x, [n, 1]),
        aten.view.default(aten.repeat.default(x, [1, n]), [3, n, -1]),
        aten.expand.default(aten.slice.Tensor(x, 0, 0, n - 1), [-1, -1]),
        aten.slice.Tensor(x, 1, torch.sym_min(n, 4), torch.sym_max(n, 4)),
        aten.repeat.default(x, [torch.sym_max(n - 3, 1), torch.sym_min(2, 3)]),
    )


def test_bounds_of_which_nothing_is_known() -> None:
    gm = torch.fx.symbolic_trace(on_sizes)
    spec = [Input("x", torch.int64, (Axis(3, 3, 3), FREE)), Input("y", torch.int64, (FREE,))]
    net = convert(gm, spec)
    for s, n in ((6, 2), (9, 4), (16, 12), (5, 5)):
        inputs = ints(-99, 99, 3, s), ints(0, 9, n)
        wanted = on_sizes(*inputs)
        for i, (value, found) in enumerate(zip(wanted, run(net, spec, inputs), strict=True)):
            assert torch.equal(found, value), f"output {i}, s={s} n={n}"


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "line": lambda: nn.Conv1d(6, 8, 3),
    "line, padded": lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1, bias=False),
    "line, dilated, a kernel for each channel": lambda: nn.Conv1d(6, 6, 3, padding=2, dilation=2, groups=6),
    "line, same": lambda: nn.Conv1d(6, 4, 4, padding="same"),
    "line, valid": lambda: nn.Conv1d(6, 4, 2, padding="valid", dilation=3),
    "patches": lambda: nn.Conv2d(6, 16, 3, stride=3),
    "plane": lambda: nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2, bias=False),
    "plane, same": lambda: nn.Conv2d(6, 4, (2, 3), padding="same", dilation=(3, 1)),
    "one image": lambda: nn.Sequential(First(), nn.Conv2d(6, 4, 3)),
    "one line": lambda: nn.Sequential(First(), nn.Conv1d(6, 4, 3)),
    "general": lambda: General(),
    "computed": lambda: Computed(),
}


class First(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[0]


class General(nn.Module):
    """The general form of the operation, which other frontends write."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3, 3)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return aten.convolution(x, self.weight, self.bias, [2], [1], [1], False, [0], 2)


class Computed(General):
    """A kernel that is no constant."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv1d(x, x[:2, :, :3] * self.weight.view(2, 6, 3), padding=1)


class Convolutions(nn.Module):
    """All convolutions, on lines `[b 6 s]` or images `[b 6 s 12]`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.made = nn.ModuleList(make() for make in CONVOLUTIONS.values())

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        planes = [any(isinstance(m, nn.Conv2d) for m in layer.modules()) for layer in self.made]
        return tuple(layer(inputs[plane]) for layer, plane in zip(self.made, planes, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_convolutions_are_as_exact_as_eager_ones(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Convolutions().to(dtype)
    axes: tuple[dict[int, Any], ...] = ({0: B, 2: S}, {0: B, 2: S})
    gm, spec = export(model, (floats(5, 6, 11, dtype=dtype), floats(5, 6, 11, 12, dtype=dtype)), axes)
    net, exact = convert(gm, spec), Convolutions().to(dtype).double()
    for b, s in SIZES:
        inputs = floats(b, 6, s, dtype=dtype), floats(b, 6, s, 12, dtype=dtype)
        found, eager, truth = run(net, spec, inputs), model(*inputs), exact(*(x.double() for x in inputs))
        for name, ours, theirs, true in zip(CONVOLUTIONS, found, eager, truth, strict=True):
            assert ours.dtype == dtype and ours.shape == theirs.shape, name
            allowed = 2 * (theirs - true).abs().max() + torch.finfo(dtype).eps * 1e-2
            assert (ours - true).abs().max() <= allowed, f"{name}, b={b} s={s}"
    assert build(net, spec, "sm80", tmp_path / "plan").plan_bytes > 0


KERNEL = torch.ones(6, 2, 3)
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "boolean index": (lambda x, i: x[x > 0], "indexed by a tensor of torch.bool"),
    "write through several": (lambda x, i: x.index_put((i, i), x[0, 0]), "other places than whole rows"),
    "write that adds": (lambda x, i: x.index_put((i,), x[0], accumulate=True), "adds to what is there"),
    "write with a step": (lambda x, i: torch.slice_scatter(x, x[:, :3], 1, 0, 6, 2), "a slice with a step"),
    "empty part": (lambda x, i: torch.cat([EMPTY, x]), "an empty tensor of one axis"),
    "mirror": (lambda x, i: functional.pad(x, (1, 1), mode="reflect"), "mode='reflect'"),
    "roll of all": (lambda x, i: x.roll(1), "without dims"),
    "sort of any number": (lambda x, i: i.sort(), "more than 3840"),
    "topk of many": (lambda x, i: WIDE.topk(4000), "Invalid TopK"),
    "stable sort": (lambda x, i: x.sort(stable=True), "no converter"),
    "cumprod": (lambda x, i: x.cumprod(0), "no converter"),
    "transposed": (lambda x, i: aten.convolution(x, KERNEL, None, [1], [0], [1], True, [0], 1), "it is a transposed"),
    "volume": (lambda x, i: aten.convolution(x[None, None], VOLUME, None, [1], [0], [1], False, [0], 1), "along 3 axes"),
    "upsample": (lambda x, i: functional.interpolate(x, scale_factor=2.0), "no converter"),
}
EMPTY, WIDE, VOLUME = torch.empty(0), torch.randn(2, 5000), torch.randn(2, 1, 3, 3, 3)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_modelled_is_refused(name: str) -> None:
    row, why = REFUSED[name]
    gm, spec = export(Table({name: row}), (torch.randn(5, 6, 7), ints(0, 5, 9)), ({}, {0: Dim("n", min=2)}))
    with pytest.raises(CannotLower, match=why):
        convert(gm, spec)
