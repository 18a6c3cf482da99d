"""The table of op variants: name -> a small function of the inputs that `test_handlers.tables` makes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lift.harness import Function, Inputs
from lift.rows_edges import EDGES, SYMBOLIC
from lift.rows_pointwise import ARITHMETIC, COMPARE, FLOATS, LOGIC

aten = torch.ops.aten
INF, MIN = float("inf"), torch.finfo(torch.float32).min

IDENTITY: dict[str, Function] = {
    "clone": lambda i: i.a.clone(),
    "alias": lambda i: aten.alias(i.a),
    "detach": lambda i: i.g.detach(),
    "lift_fresh_copy": lambda i: torch.tensor([3, 1, 2]) + i.a[:, :3],
    "contiguous": lambda i: i.a.t().contiguous(),
    "bool_to_int": lambda i: i.m.long(),
    "int_to_bool": lambda i: i.a.bool(),
    "float_to_bool": lambda i: i.f.bool(),
    "int_to_float": lambda i: i.a.float(),
    "bool_to_bf16": lambda i: i.m.to(torch.bfloat16),
    "float_to_bf16": lambda i: i.f.to(torch.bfloat16),
    "float_to_half": lambda i: torch.where(i.m, 0.0, MIN).half(),
    "int_to_int8": lambda i: i.a.to(torch.int8),
    "to_other": lambda i: i.a.to(i.n32),
    "type_as": lambda i: i.a.type_as(i.g),
    "copy": lambda i: torch.zeros_like(i.g).copy_(i.row),
}

CREATE: dict[str, Function] = {
    "arange_end": lambda i: torch.arange(i.a.shape[1]),
    "arange_start": lambda i: torch.arange(2, i.a.shape[1] + 3),
    "arange_step": lambda i: torch.arange(1, 2 * i.a.shape[1], 3),
    "arange_down": lambda i: torch.arange(i.a.shape[1], 0, -1),
    "arange_float": lambda i: torch.arange(i.a.shape[1], dtype=torch.float32),
    "arange_int32": lambda i: torch.arange(i.a.shape[1], dtype=torch.int32),
    "full_minus_inf": lambda i: torch.full((i.a.shape[0], 2), -INF),
    "full_int": lambda i: torch.full((3,), 5),
    "full_size": lambda i: torch.full((3,), i.a.shape[1]),
    "full_bool": lambda i: torch.full((3,), True),
    "full_float_as_int": lambda i: torch.full((3,), 2.0, dtype=torch.int32),
    "full_like": lambda i: torch.full_like(i.a, 1.5, dtype=torch.float64),
    "new_full": lambda i: i.g.new_full((2, i.a.shape[1]), MIN),
    "ones": lambda i: torch.ones(i.a.shape[0], 2),
    "zeros": lambda i: torch.zeros(i.a.shape[0], 2, dtype=torch.bool),
    "ones_like": lambda i: torch.ones_like(i.a),
    "zeros_like": lambda i: torch.zeros_like(i.m),
    "new_ones": lambda i: i.m.new_ones((3, 2)),
    "new_zeros": lambda i: i.a.new_zeros((3, i.a.shape[1])),
    "scalar_tensor": lambda i: torch.where(i.m, torch.scalar_tensor(-1e9), torch.scalar_tensor(0.1)),
    "fill_scalar": lambda i: torch.empty(4, 4).fill_(MIN).triu_(1),
    "fill_tensor": lambda i: torch.empty_like(i.a).fill_(i.one),
    "new_empty_fill": lambda i: i.a.new_empty((2, 3)).fill_(7),
    "eye": lambda i: torch.eye(3, dtype=torch.bool),
    "eye_wide": lambda i: torch.eye(3, i.a.shape[1]),
}

SHAPE: dict[str, Function] = {
    "unsqueeze": lambda i: i.a.unsqueeze(1),
    "unsqueeze_last": lambda i: i.a.unsqueeze(-1),
    "squeeze": lambda i: i.a[None, :, None].squeeze(),
    "squeeze_dim": lambda i: i.a[None, None].squeeze(1),
    "squeeze_dim_kept": lambda i: i.a.squeeze(0),
    "squeeze_dims": lambda i: i.a[None, :, None].squeeze((0, 2)),
    "expand": lambda i: i.col.expand(2, -1, 5),
    "permute": lambda i: i.cube.permute(2, 0, -2),
    "transpose": lambda i: i.cube.transpose(-1, 0),
    "t": lambda i: i.a.t(),
    "slice": lambda i: i.a[:, 1:3],
    "slice_step": lambda i: i.a[:, 1::2],
    "slice_from_end": lambda i: i.a[:, -2:],
    "slice_to_end": lambda i: i.a[:, :-1],
    "slice_both": lambda i: i.a[:, -3:-1],
    "slice_first": lambda i: i.a[-3:],
    "slice_negative_step": lambda i: i.a[:, -3::2],
    "slice_mixed": lambda i: i.cube[:, -2:3],
    "slice_symbolic": lambda i: i.pick[:, i.a.shape[1] - 2 :],
    "slice_far": lambda i: i.cube[:, -99:2, 1:99],
    "select": lambda i: i.a[1],
    "select_last": lambda i: i.a[:, -1],
    "flip": lambda i: i.cube.flip(0, -1),
    "roll": lambda i: i.a.roll((1, -2), (0, 1)),
    "repeat": lambda i: i.a.repeat(2, 1, 3),
    "tile": lambda i: i.a.tile(2),
    "repeat_interleave": lambda i: i.a.repeat_interleave(3, 1),
    "cat": lambda i: torch.cat([i.a, i.pos, i.a[:, :1]], 1),
    "cat_mixed": lambda i: torch.cat([i.m, i.a, i.g], -1),
    "cat_empty": lambda i: torch.cat([torch.empty(0), i.g]),
    "stack": lambda i: torch.stack([i.a, i.c, i.pos], -1),
    "pad": lambda i: F.pad(i.a, (1, 2), value=3),
    "pad_two_axes": lambda i: F.pad(i.g, (0, 2, 1, 0), value=-INF),
    "pad_crops": lambda i: F.pad(i.a, (-1, 2)),
    "constant_pad_nd": lambda i: aten.constant_pad_nd(i.m, [2, -1, 1, 0], 1),
    "view_merge": lambda i: i.a.view(-1),
    "view_unmerge": lambda i: i.a.view(-1).view(i.a.shape[0], i.a.shape[1]),
    "view_ones": lambda i: i.a.view(1, i.a.shape[0], 1, -1),
    "view_split": lambda i: i.cube.view(2, 3, 2, 2),
    "view_mixed": lambda i: i.cube.view(4, 6),
    "view_uneven": lambda i: i.cube.reshape(8, 3),
    "view_heads": lambda i: i.a[:, :, None].expand(-1, -1, 6).reshape(i.a.shape[0], i.a.shape[1], 2, 3),
    "view_rows": lambda i: i.a[:, None].expand(-1, 3, -1).reshape(3 * i.a.shape[0], i.a.shape[1]),
    "reshape_transposed": lambda i: i.a.t().reshape(-1),
    "unsafe_view": lambda i: aten._unsafe_view(i.cube, [6, 4]),
}

INDEX: dict[str, Function] = {
    "index": lambda i: i.a[i.up],
    "index_wraps": lambda i: i.a[i.wrap],
    "index_second": lambda i: i.cube[:, :, i.wrap],
    "index_pair": lambda i: i.cube[:, i.up[:2] % 3, i.up[:2]],
    "index_apart": lambda i: i.cube[i.up[:3] % 2, :, i.up[:3]],
    "index_apart_inside": lambda i: i.cube[None][:, i.up[:3] % 2, :, i.up[:3]],
    "index_broadcasts": lambda i: i.a[i.up[:, None], torch.tensor([2, 0])],
    "index_zero_dim": lambda i: aten.index.Tensor(i.a, [i.up[0]]),
    "index_bool_mask": lambda i: i.m[torch.arange(4)[:, None], torch.arange(i.m.shape[1])],
    "gather": lambda i: i.a.gather(0, i.pick),
    "gather_last": lambda i: i.a.gather(-1, i.pick % 3),
    "index_select": lambda i: i.a.index_select(0, i.up),
    "embedding": lambda i: F.embedding(i.wrap.abs() % 4, i.g),
}


def _assign_slice(i: Inputs) -> Tensor:
    x = i.a.clone()
    x[:, 1:3] = i.c[:, :2]
    return x


def _assign_tail(i: Inputs) -> Tensor:
    x = torch.ones(i.a.shape, dtype=torch.bool)
    x[1:, -2:] = False
    return x


def _assign_row(i: Inputs) -> Tensor:
    x = i.a.clone()
    x[:, -1] = 0
    return x


def _assign_masked(i: Inputs) -> Tensor:
    x = i.g.clone()
    x[i.m] = -INF
    return x


INDEX |= {
    "slice_scatter": _assign_slice,
    "slice_scatter_tail": _assign_tail,
    "select_scatter": _assign_row,
    "index_put_masked": _assign_masked,
}

SCAN: dict[str, Function] = {
    "diff": lambda i: i.a.diff(),
    "diff_dim": lambda i: i.a.diff(dim=0),
    "diff_prepend": lambda i: i.a.diff(dim=-1, prepend=i.a[:, :1] - 1),
    "diff_prepend_two": lambda i: torch.diff(i.a, prepend=i.c[:, :2]),
    "diff_bool": lambda i: i.m.diff(),
    "cumsum": lambda i: i.a.cumsum(-1),
    "cumsum_bool": lambda i: i.m.cumsum(0),
    "cumsum_dtype": lambda i: i.a.cumsum(1, dtype=torch.int32),
    "cumsum_packed": lambda i: (torch.diff(i.pos, prepend=i.pos[:, :1] - 1, dim=-1) != 1).cumsum(-1),
    "cumsum_twice": lambda i: (i.m.cumsum(-1) + i.a).cumsum(0),
    "cumsum_three_times": lambda i: (i.m.cumsum(-1).cumsum(0) - i.a.sum(0)).cumsum(-1),
    "sum": lambda i: i.a.sum(-1),
    "sum_keepdim": lambda i: i.m.sum(0, keepdim=True),
    "sum_middle": lambda i: i.cube.sum(1),
    "sum_cumsum_zero": lambda i: (i.m.cumsum(-1) == 0).sum(-1),
    "any": lambda i: i.m.any(-1),
    "any_keepdim": lambda i: i.a.any(0, keepdim=True),
    "all": lambda i: i.m.all(1),
    "all_middle": lambda i: i.cubem.all(1),
}

# Exporting at dynamic sizes is slow, so of the pointwise ops only those stand here that use a size or broadcast.
POINTWISE = {
    "eq_ints",
    "lt_int_size",
    "where_broadcasts",
    "tril",
    "tril_symbolic",
    "triu",
    "add",
    "add_size",
    "sub",
    "floor_divide_size",
}
FIXED = {
    *("lift_fresh_copy", "index_select", "index_bool_mask", "embedding", "gather", "slice_far", "view_uneven", "view_mixed"),
    *("copy", "roll"),
    *EDGES,
    *(name for name in LOGIC | COMPARE | ARITHMETIC | FLOATS if name not in POINTWISE),
}
ALL = IDENTITY | CREATE | SHAPE | LOGIC | COMPARE | ARITHMETIC | FLOATS | INDEX | SCAN | EDGES | SYMBOLIC
STATIC = {name: f for name, f in ALL.items() if name in FIXED}
DYNAMIC = {name: f for name, f in ALL.items() if name not in FIXED}
