"""The table of op variants at the edges: other axes, literal indices, scalars, and numbers where a dtype ends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lift.harness import Function, Inputs

aten = torch.ops.aten
INF, NAN, MIN = float("inf"), float("nan"), torch.finfo(torch.float32).min
BIG = (1 << 60) + 1

AXES: dict[str, Function] = {
    "squeeze_column": lambda i: i.col.squeeze(-1),
    "squeeze_of_column": lambda i: i.col[None].squeeze((0, 2)),
    "transpose_inner": lambda i: i.cube.transpose(1, 2),
    "transpose_outer": lambda i: i.cube.transpose(0, 1),
    "transpose_scalar": lambda i: aten.transpose.int(i.one, 0, -1),
    "t_vector": lambda i: i.row.t(),
    "select_middle": lambda i: i.cube[:, -1],
    "select_first": lambda i: i.cube[-2],
    "roll_one_axis": lambda i: i.cube.roll(2, 1),
    "roll_first": lambda i: i.a.roll(1, 0),
    "repeat_more_axes": lambda i: i.a.repeat(3, 2, 1),
    "tile_two": lambda i: i.cube.tile(2, 1),
    "repeat_interleave_middle": lambda i: i.cube.repeat_interleave(2, 1),
    "repeat_interleave_vector": lambda i: i.row.repeat_interleave(2),
    "flip_middle": lambda i: i.cube.flip(1),
    "permute_all": lambda i: i.cube.permute(2, 0, 1),
    "cat_middle": lambda i: torch.cat([i.cube, i.cube[:, :1], i.cube[:, 1:]], 1),
    "cat_first": lambda i: torch.cat([i.a, i.c[:1], i.pos, i.c[1:]]),
    "cat_selected": lambda i: torch.cat([i.a[:, :2], i.pos, i.c], 1)[:, 1],
    "cat_selected_later": lambda i: torch.cat([i.a[:, :2], i.pos[:, :1], i.c], 1)[:, 3],
    "cat_sliced_later": lambda i: torch.cat([i.a[:, :2], i.pos[:, :1], i.c], 1)[:, 2:],
    "cat_selected_elsewhere": lambda i: torch.cat([i.a[:, :2], i.pos], 1)[3],
    "cat_selected_behind": lambda i: torch.cat([i.a, i.c])[:, 5],
    "cat_of_single_rows": lambda i: torch.cat([i.row[None], i.c[:1]], 1),
    "cat_of_single_columns": lambda i: torch.cat([i.col, i.col * 2]),
    "cat_empty_behind": lambda i: torch.cat([i.g, torch.empty(0)], 1),
    "cat_of_one_each": lambda i: torch.cat([i.a[:, :1], i.c[:, :1], i.pos[:, :1]], 1),
    "stack_first": lambda i: torch.stack([i.a, i.c]),
    "stack_mixed": lambda i: torch.stack([i.m, i.a, i.g], 1),
    "stack_last_mixed": lambda i: torch.stack([i.g, i.m], -1),
    "stack_middle": lambda i: torch.stack([i.a, i.c, i.pos, i.a * 2], 1),
    "pad_all_sides": lambda i: F.pad(i.cube, (1, 2, 0, 3, 2, 1), value=4),
    "pad_only_crops": lambda i: F.pad(i.a, (-1, -2)),
    "pad_and_crop": lambda i: F.pad(i.cube, (0, -1, -1, 2), value=1),
    "slice_from_start": lambda i: aten.slice.Tensor(i.a, 1, None, 3),
    "slice_first_axis": lambda i: i.cube[:, 1:2],
    "index_last": lambda i: i.cube[..., i.up],
    "index_select_middle": lambda i: i.cube.index_select(1, i.up % 3),
    "index_select_last": lambda i: i.cube.index_select(-1, i.up),
    "gather_middle": lambda i: i.cube.gather(1, i.cube.abs() % 3),
    "tril_planes": lambda i: i.cube.tril(-1),
    "triu_planes": lambda i: i.cubem.triu(1),
    "eye_tall": lambda i: torch.eye(5, 2),
    "diff_middle": lambda i: i.cube.diff(dim=1),
    "cumsum_middle": lambda i: i.cube.cumsum(1),
    "cumsum_first": lambda i: i.cubem.cumsum(-3),
    "sum_first_kept": lambda i: i.cube.sum(0, keepdim=True),
    "any_middle": lambda i: i.cubem.any(1),
    "all_kept": lambda i: i.cubem.all(-1, keepdim=True),
    "view_column": lambda i: i.col.view(-1),
    "view_flat": lambda i: i.cube.view(-1),
    "view_from_flat": lambda i: i.cube.view(-1).view(4, 3, 2),
    "view_two_groups": lambda i: i.cube.repeat(1, 2, 1).view(2, 3, 2, 2, 2),
}


def _set_middle(i: Inputs) -> Tensor:
    x = i.cube.clone()
    x[:, 1] = i.cube[:, 0] + 1
    return x


def _set_middle_slice(i: Inputs) -> Tensor:
    x = i.cube.clone()
    x[:, -2:] = i.cube[:, :2]
    return x


def _set_inside(i: Inputs) -> Tensor:
    x = i.a.clone()
    x[:, -3:-1] = i.c[:, :2]
    return x


def _set_first_rows(i: Inputs) -> Tensor:
    x = i.a.clone()
    x[1:3] = i.c[:2]
    return x


WRITES: dict[str, Function] = {
    "select_scatter_middle": _set_middle,
    "slice_scatter_middle": _set_middle_slice,
    "slice_scatter_inside": _set_inside,
    "slice_scatter_rows": _set_first_rows,
    "select_scatter_from_end": lambda i: aten.select_scatter(i.cube, i.cube[:, 0] * 2, 1, -1),
    "select_scatter_converts": lambda i: aten.select_scatter(i.g, i.a[0], 0, 1),
    "slice_scatter_converts": lambda i: aten.slice_scatter(i.g, i.a[:, :2], 1, 1, 3),
    "slice_scatter_from_0": lambda i: aten.slice_scatter(i.a, i.c[:, :2], 1, 0, 2),
    "slice_scatter_square": lambda i: aten.slice_scatter(i.a[:, :4], i.c[:, :2], 1, 1, 3),
    "slice_scatter_square_rows": lambda i: aten.slice_scatter(i.a[:, :4], i.c[:2, :4], 0, 1, 3),
    "slice_scatter_tall": lambda i: aten.slice_scatter(i.a.t(), i.c.t()[:4], 0, 1, 5),
    "slice_scatter_all": lambda i: aten.slice_scatter(i.a, i.c, 0),
    "select_scatter_first": lambda i: aten.select_scatter(i.a, i.c[0], 0, 1),
}

NUMBERS: dict[str, Function] = {
    "new_ones_int": lambda i: i.a.new_ones((3, 2)),
    "ones_int": lambda i: torch.ones(3, dtype=torch.int32),
    "add_big": lambda i: i.a + BIG,
    "uint8_edges": lambda i: (i.u8 <= 255) & (i.u8 >= 0),
    "floor_divide_by_1": lambda i: i.a // 1,
    "remainder_by_1": lambda i: i.a % 1,
    "le_specials": lambda i: i.f <= i.f.flip(0),
    "lt_specials": lambda i: i.f < i.f.flip(0),
    "eq_specials": lambda i: i.f == i.f.flip(0),
    "le_infinities": lambda i: torch.where(i.m, -INF, 0.0) <= torch.where(i.w, -INF, INF),
    "eq_infinities": lambda i: torch.where(i.m, -INF, 0.0) == torch.where(i.w, -INF, INF),
    "zero_dim_rounds": lambda i: i.g.float() <= i.third,
    "zero_dim_equal": lambda i: torch.where(i.m, 1.0, 1 / 3) == i.third,
    "mul_bf16_bool": lambda i: i.h * i.m,
    "mul_bf16_chosen": lambda i: i.h * torch.where(i.one > 0, 0.5, 2.0),
    "mul_bf16_nan": lambda i: i.h * NAN,
    "add_bf16_literals": lambda i: torch.where(i.m, 0.0, -INF).bfloat16() + torch.where(i.w, 1.0, 0.5).bfloat16(),
    "add_bf16_nan": lambda i: torch.where(i.m, 1.0, 2.0).bfloat16() + NAN,
    "add_bf16_fraction": lambda i: i.h + 0.1,
    "mul_bf16_literal_bool": lambda i: torch.where(i.m, 1.0, 2.0).bfloat16() * i.w,
    "mul_bf16_literal_chosen": lambda i: torch.where(i.m, 1.0, 3.0).bfloat16() * torch.where(i.one > 0, 0.5, 2.0),
    **{
        f"{op}_{dtype}": (
            lambda i, compare=compare, kind=kind, edge=edge: compare((i.a + edge).to(kind), (i.c + edge).to(kind))
        )
        for op, compare in {"le": torch.le, "lt": torch.lt, "eq": torch.eq}.items()
        for dtype, (kind, edge) in {
            "bf16_edge": (torch.bfloat16, 256),
            "half_edge": (torch.float16, -2048),
            "float_small": (torch.float32, 0),
            "float_edge": (torch.float32, 1 << 24),
        }.items()
    },
    "le_float_literal": lambda i: i.a.float() <= 3.0,
    "lt_literal_float": lambda i: torch.lt(torch.full((), 2.0), i.a.float()),
    "eq_float_fraction": lambda i: i.a.float() == 2.5,
    "le_float_infinity": lambda i: i.a.float() <= torch.full((), INF),
    "le_two_floats": lambda i: i.a.half() <= i.c.float(),
    "choice_to_float": lambda i: torch.where(i.m, i.a, 7).float(),
    "choice_compared": lambda i: torch.where(i.m, 0.5, 2.0) < torch.where(i.w, 1.0, 3.0),
    "choice_to_int": lambda i: torch.where(i.m, 3.75, -3.75).long(),
    "big_float_to_int": lambda i: torch.where(i.m, 2.0**53, 9.0e15 + 2.0).double().long(),
    "float_bool": lambda i: torch.where(i.m, 0.0, NAN).bool(),
    "minus_zero": lambda i: torch.where(i.m, -0.0, 0.0),
}

SYMBOLIC: dict[str, Function] = {
    "size_as_float": lambda i: torch.full((3,), i.a.shape[1], dtype=torch.float32),
    "mul_bf16_size": lambda i: i.h * i.a.shape[1],
    "select_symbolic": lambda i: i.pick[:, i.a.shape[1] - 3],
    "view_by_sizes": lambda i: i.a[:, :, None].expand(-1, -1, i.a.shape[0]).reshape(i.a.shape[0], -1),
    "unview_by_sizes": lambda i: i.a.t().reshape(-1).view(i.a.shape[1], i.a.shape[0]),
}
EDGES = AXES | WRITES | NUMBERS
