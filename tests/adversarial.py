"""Near misses: genuine masks, broken on purpose in one place by a table of mutations. None may be taken for the genuine one.

A mutation turns the function of a genuine mask into another function; a row says which masks it is applied to. What no
mutation makes stands in `SINGLE`. Functions get `q [s 1]`, `k [1 t]` and the tables of `batch.TABLES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from batch import LONGEST, MaskFn
from trilithon.spec import term as t
from trilithon.spec.masks import B, Causal, Documents, Full, Mask, Padding, Q, SlidingWindow

X = dict[str, Tensor]
Outcome = Literal["refuted", "unknown", "refused"]
Mutation = Callable[[MaskFn], MaskFn]
LOWEST = torch.finfo(torch.float32).min
SAME_SEGMENT = Documents(t.read("segments", (B, Q), "int"))
PADDED = Padding("attention_mask")


@dataclass(frozen=True)
class Genuine:
    """A mask, and what it is."""

    make: MaskFn
    form: Mask
    square: bool = True


@dataclass(frozen=True)
class NearMiss:
    """A mask that is almost `of`, and must never be proved to be.

    Attributes:
        outcome: what the claim that it is `of` ends as; "refused" where it cannot even be lifted.
        form: what it is, where that has a name.
    """

    make: MaskFn
    of: Mask
    outcome: Outcome = "refuted"
    form: Mask | None = None
    square: bool = True


def row(x: X, name: str = "attention_mask") -> Tensor:
    """A table, along the keys."""
    return x[name][:, None, None, :]


def column(x: X, name: str) -> Tensor:
    """A table, along the queries."""
    return x[name][:, None, :, None]


def lower_right(q: Tensor, k: Tensor, x: X) -> Tensor:
    return k - k.shape[1] <= q - q.shape[0]


def counted(q: Tensor, k: Tensor, x: X) -> Tensor:
    return torch.where(k == k, 1, 0).cumsum(-1) <= torch.where(q == q, 1, 0).cumsum(0)


GENUINE = {
    "causal": Genuine(lambda q, k, x: k <= q, Causal()),
    "upper_left": Genuine(lambda q, k, x: k <= q, Causal(), square=False),
    "lower_right": Genuine(lower_right, Causal("lower_right"), square=False),
    "window": Genuine(lambda q, k, x: (k <= q) & (k > q - 4), SlidingWindow(4)),
    "counted": Genuine(counted, Causal()),
    "padding": Genuine(lambda q, k, x: (row(x) != 0) & (q == q), PADDED),
    "causal_padding": Genuine(lambda q, k, x: (k <= q) & (row(x) != 0), Causal() & PADDED),
    "documents": Genuine(lambda q, k, x: column(x, "segments") == row(x, "segments"), SAME_SEGMENT),
    "causal_documents": Genuine(
        lambda q, k, x: (k <= q) & (column(x, "segments") == row(x, "segments")), Causal() & SAME_SEGMENT
    ),
}


# ---------------------------------------------------------------- mutations of the indices, the tables and the result


def indices(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Mutation:
    return lambda make: lambda q, k, x: make(*change(q, k), x)


def tables(change: Callable[[Tensor], Tensor]) -> Mutation:
    return lambda make: lambda q, k, x: make(q, k, {name: change(table) for name, table in x.items()})


def result(change: Callable[[Tensor, Tensor, Tensor, X], Tensor]) -> Mutation:
    return lambda make: lambda q, k, x: change(make(q, k, x), q, k, x)


def swapped(make: MaskFn) -> MaskFn:
    return lambda q, k, x: make(k.t(), q.t(), x).transpose(-1, -2)


class _Instead(TorchFunctionMode):
    """Every call of the operator of one name is a call of another function."""

    def __init__(self, name: str, other: Callable[..., Tensor]) -> None:
        super().__init__()
        self.name, self.other = name, other

    def __torch_function__(self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        return (self.other if function.__name__ == self.name else function)(*args, **kwargs or {})


def calls(name: str, other: Callable[..., Tensor]) -> Mutation:
    def mutation(make: MaskFn) -> MaskFn:
        def mutated(q: Tensor, k: Tensor, x: X) -> Tensor:
            with _Instead(name, other):
                return make(q, k, x)

        return mutated

    return mutation


HEAD = torch.arange(2)[:, None, None]


def batch_row(x: X) -> Tensor:
    return torch.arange(x["segments"].shape[0])[:, None, None, None]


# name: (mutation, the genuine masks it is applied to)
REFUTED: dict[str, tuple[Mutation, tuple[str, ...]]] = {
    "query_later": (indices(lambda q, k: (q + 1, k)), ("causal", "lower_right", "window", "causal_padding")),
    "query_earlier": (indices(lambda q, k: (q - 1, k)), ("upper_left", "causal_documents")),
    "q_and_k_swapped": (swapped, ("causal", "upper_left", "window")),
    "keys_reversed": (indices(lambda q, k: (q, k.shape[1] - 1 - k)), ("causal",)),
    "bends_late": (indices(lambda q, k: (q + q // 100, k)), ("causal", "lower_right")),
    "modulo": (indices(lambda q, k: (q % 64, k)), ("upper_left",)),
    "modulo_of_both": (indices(lambda q, k: (q % 128, k % 128)), ("causal", "window")),
    "depends_on_head": (indices(lambda q, k: (q + HEAD, k)), ("causal", "lower_right")),
    "depends_on_length": (indices(lambda q, k: (q + q.shape[0] // 200, k)), ("causal",)),
    "strict": (calls("le", torch.lt), ("causal", "lower_right", "causal_padding")),
    "turned": (calls("le", torch.ge), ("upper_left", "causal_documents")),
    "equal_instead": (calls("__eq__", torch.le), ("documents", "causal_documents")),
    "different_instead": (calls("__eq__", torch.ne), ("documents",)),
    "padding_inverted": (calls("ne", torch.eq), ("padding", "causal_padding")),
    "or_instead_of_and": (calls("__and__", torch.bitwise_or), ("window", "causal_padding", "causal_documents")),
    "table_moved_by_one": (tables(lambda x: x.roll(1, -1)), ("causal_padding", "documents")),
    "table_of_another_row": (tables(lambda x: x.flip(0)), ("padding", "documents")),
    "first_row_for_all": (tables(lambda x: x[:1]), ("padding", "causal_documents")),
    "inverted": (result(lambda m, q, k, x: ~m), ("causal", "window", "padding", "documents")),
    "transposed": (result(lambda m, q, k, x: m.transpose(-1, -2)), ("window", "padding")),
    "keys_flipped": (result(lambda m, q, k, x: m.flip(-1)), ("window",)),
    "one_cell": (result(lambda m, q, k, x: m ^ ((q == 5) & (k == 2))), ("causal", "window", "padding", "causal_documents")),
    "one_far_cell": (result(lambda m, q, k, x: m ^ ((q == 77) & (k == 90))), ("causal", "padding", "counted")),
    "one_head_open": (result(lambda m, q, k, x: m | (HEAD == 1)), ("causal", "padding", "documents", "counted")),
    "one_head_closed": (result(lambda m, q, k, x: m & (HEAD == 0)), ("causal", "causal_documents")),
    "second_row_open": (result(lambda m, q, k, x: m | (batch_row(x) == 1)), ("causal", "padding")),
    "odd_queries_open": (result(lambda m, q, k, x: m | (q % 2 == 1)), ("causal", "padding")),
    "last_key_closed": (result(lambda m, q, k, x: m & (k != k.shape[1] - 1)), ("causal", "documents")),
    "last_query_open": (result(lambda m, q, k, x: m | (q == q.shape[0] - 1)), ("window", "upper_left")),
    "unrelated_table": (result(lambda m, q, k, x: m & row(x, "visible")), ("causal", "documents")),
    "one_token_hidden": (result(lambda m, q, k, x: m & (row(x, "input_ids") != 7)), ("causal",)),
    "one_token_sees_all": (result(lambda m, q, k, x: m | (column(x, "input_ids") == 3)), ("window",)),
    "de_morgan_slips": (result(lambda m, q, k, x: ~(~m & (k != q + 1))), ("causal",)),
    "first_keys_open": (result(lambda m, q, k, x: m | (k < 6)), ("window", "causal_padding")),
    "half_open": (result(lambda m, q, k, x: m | (k < k.shape[1] // 2)), ("causal",)),
    "both_ways": (result(lambda m, q, k, x: m | m.transpose(-1, -2)), ("window",)),
    "shorter_than_range": (result(lambda m, q, k, x: m & (q - k < 200)), ("causal",)),
    "every_third": (result(lambda m, q, k, x: m & ((q - k) % 3 == 0)), ("causal",)),
    "where_swapped": (result(lambda m, q, k, x: torch.where(m, -torch.inf, 0.0)), ("causal", "padding")),
    "filled_where_kept": (
        result(lambda m, q, k, x: torch.zeros(m.shape).masked_fill(m, -torch.inf)),
        ("window", "documents"),
    ),
}
UNKNOWN: dict[str, tuple[Mutation, tuple[str, ...]]] = {
    "int8_wraps": (indices(lambda q, k: (q.to(torch.int8), k.to(torch.int8))), ("causal", "window")),
    "uint8_wraps": (indices(lambda q, k: (q.to(torch.uint8) - 1, k.to(torch.uint8))), ("causal",)),
    "int32_wraps": (indices(lambda q, k: (q.int() * (1 << 24), k.int() * (1 << 24))), ("upper_left",)),
    "bfloat16_rounds": (indices(lambda q, k: ((q + 200).bfloat16(), (k + 200).bfloat16())), ("causal", "upper_left")),
    "float16_rounds": (indices(lambda q, k: ((q + 2000).half(), (k + 2000).half())), ("causal",)),
    "float32_rounds": (
        indices(lambda q, k: ((q + (1 << 24) - 50).float(), (k + (1 << 24) - 50).float())),
        ("causal",),
    ),
}
REFUSED: dict[str, tuple[Mutation, tuple[str, ...]]] = {
    "drops_by_one": (result(lambda m, q, k, x: torch.where(m, 0.0, -1.0)), ("causal", "padding")),
    "raises_by_one": (result(lambda m, q, k, x: torch.where(m, 0.0, 1.0)), ("causal",)),
    "drops_weakly": (result(lambda m, q, k, x: torch.where(m, 0.0, -1e4)), ("window",)),
    "half_lowest": (result(lambda m, q, k, x: torch.where(m, 0.0, -65504.0)), ("causal",)),
    "nan_where_blocked": (result(lambda m, q, k, x: torch.where(m, 0.0, torch.nan)), ("causal",)),
    "nan_by_product": (result(lambda m, q, k, x: (1.0 - m.float()) * -torch.inf), ("padding",)),
    "bool_as_number": (result(lambda m, q, k, x: m.float()), ("causal",)),
}


# ---------------------------------------------------------------- what no mutation makes


def flipped_buffer(*cells: tuple[int, int]) -> Tensor:
    buffer = torch.ones(2 * LONGEST, 2 * LONGEST, dtype=torch.bool).tril()
    for cell in cells:
        buffer[cell] = ~buffer[cell]
    return buffer


BUFFER, ODD, ODD_FAR = flipped_buffer(), flipped_buffer((3, 4)), flipped_buffer((140, 3))
STRAY = torch.zeros(2 * LONGEST, dtype=torch.int64).index_fill(0, torch.tensor([9]), 1)


def cut(buffer: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return buffer[: q.shape[0], : k.shape[1]]


def positions(x: X) -> Tensor:
    return row(x, "position_ids") <= column(x, "position_ids")


def chunk(q: Tensor, k: Tensor, of_q: int, of_k: int) -> Tensor:
    return q // of_q == k // of_k


SINGLE: dict[str, NearMiss] = {
    "tril_diagonal_1": NearMiss(lambda q, k, x: torch.tril(torch.ones_like(q * k), 1).bool(), Causal()),
    "tril_diagonal_minus_1": NearMiss(lambda q, k, x: torch.tril(torch.ones_like(q * k), -1).bool(), Causal()),
    "triu": NearMiss(lambda q, k, x: torch.triu(torch.ones_like(q * k)).bool(), Causal()),
    "triu_from_0": NearMiss(lambda q, k, x: torch.full((q.shape[0], k.shape[1]), -torch.inf).triu(0), Causal()),
    "triu_from_2": NearMiss(lambda q, k, x: torch.full((q.shape[0], k.shape[1]), -torch.inf).triu(2), Causal()),
    "buffer_one_row_down": NearMiss(lambda q, k, x: cut(BUFFER.roll(1, 0), q, k), Causal()),
    "buffer_from_the_end": NearMiss(lambda q, k, x: BUFFER[-q.shape[0] :, : k.shape[1]], Causal()),
    "buffer_with_an_odd_cell": NearMiss(lambda q, k, x: cut(ODD, q, k), Causal()),
    "buffer_with_a_far_odd_cell": NearMiss(lambda q, k, x: cut(ODD_FAR, q, k), Causal()),
    "wrong_corner": NearMiss(lambda q, k, x: k <= q, Causal("lower_right"), square=False, form=Causal()),
    "other_wrong_corner": NearMiss(lower_right, Causal(), square=False, form=Causal("lower_right")),
    "window_5": NearMiss(lambda q, k, x: (k <= q) & (k > q - 5), SlidingWindow(4), form=SlidingWindow(5)),
    "window_longer_than_the_example": NearMiss(lambda q, k, x: (k <= q) & (k > q - 10), Causal(), form=SlidingWindow(10)),
    "window_both_ways": NearMiss(lambda q, k, x: (q - k).abs() < 4, SlidingWindow(4)),
    "window_of_the_future": NearMiss(lambda q, k, x: (k >= q) & (k < q + 4), SlidingWindow(4)),
    "causal_chunk": NearMiss(lambda q, k, x: chunk(q, k, 4, 4) & (k <= q), SlidingWindow(4)),
    "chunk_both_ways": NearMiss(lambda q, k, x: chunk(q, k, 100, 100), Full()),
    "chunks_of_two_sizes": NearMiss(lambda q, k, x: chunk(q, k, 100, 101) & (k <= q), Causal()),
    "prefix_of_the_example": NearMiss(lambda q, k, x: (k <= q) | (k < 6), Causal()),
    "prefix_by_data": NearMiss(lambda q, k, x: (k <= q) | (k < column(x, "segments")[:, :, :1]), Causal()),
    "count_with_a_gap": NearMiss(
        lambda q, k, x: torch.where(k == 7, 0, 1).cumsum(-1) <= torch.where(q == q, 1, 0).cumsum(0), Causal()
    ),
    "count_with_a_far_gap": NearMiss(
        lambda q, k, x: torch.where(k == 99, 0, 1).cumsum(-1) <= torch.where(q == q, 1, 0).cumsum(0), Causal(), "unknown"
    ),
    "count_with_a_stray": NearMiss(
        lambda q, k, x: (1 + STRAY[: k.shape[1]]).cumsum(0)[None] <= torch.where(q == q, 1, 0).cumsum(0), Causal(), "unknown"
    ),
    "positions_swapped": NearMiss(lambda q, k, x: column(x, "position_ids") <= row(x, "position_ids"), Causal()),
    "positions_of_the_first_row": NearMiss(lambda q, k, x: positions({"position_ids": x["position_ids"][:1]}), Causal()),
    "positions_against_indices": NearMiss(lambda q, k, x: row(x, "position_ids") <= q, Causal()),
    "positions_strict": NearMiss(lambda q, k, x: row(x, "position_ids") < column(x, "position_ids"), Causal()),
    "padding_of_queries": NearMiss(lambda q, k, x: (k <= q) & (column(x, "attention_mask") != 0), Causal() & PADDED),
    "padding_above_1": NearMiss(lambda q, k, x: (row(x) > 1) & (q == q), PADDED),
    "padding_is_1": NearMiss(lambda q, k, x: (row(x) == 1) & (q == q), PADDED),
    "padding_of_another_table": NearMiss(
        lambda q, k, x: torch.where(q >= 0, row(x, "segments"), row(x)) != 0, PADDED, form=Padding("segments")
    ),
    "padding_moved_by_one": NearMiss(lambda q, k, x: F.pad(x["attention_mask"], (1, 0))[:, None, None, :-1] != 0, PADDED),
    "neighbouring_documents": NearMiss(
        lambda q, k, x: (column(x, "segments") - row(x, "segments")).abs() <= 1, SAME_SEGMENT, "unknown"
    ),
    "next_document": NearMiss(lambda q, k, x: column(x, "segments") == row(x, "segments") + 1, SAME_SEGMENT, "unknown"),
    "row_without_a_key": NearMiss(lambda q, k, x: torch.where(row(x) != 0, 0.0, LOWEST), PADDED, "unknown"),
    "lowest_twice": NearMiss(
        lambda q, k, x: torch.where(k <= q, 0.0, LOWEST) + torch.where(k == q + 3, LOWEST, 0.0), SlidingWindow(4)
    ),
    "lowest_taken_back": NearMiss(
        lambda q, k, x: torch.where(k <= q, 0.0, LOWEST) - torch.where(k == q + 3, LOWEST, 0.0), Causal(), "refused"
    ),
}


def _mutants() -> Iterator[tuple[str, NearMiss]]:
    groups: list[tuple[dict[str, tuple[Mutation, tuple[str, ...]]], Outcome]] = [
        (REFUTED, "refuted"),
        (UNKNOWN, "unknown"),
        (REFUSED, "refused"),
    ]
    for group, outcome in groups:
        for name, (mutation, masks) in group.items():
            for mask in masks:
                genuine = GENUINE[mask]
                yield f"{mask}-{name}", NearMiss(mutation(genuine.make), genuine.form, outcome, square=genuine.square)


NEAR_MISSES: dict[str, NearMiss] = {**dict(_mutants()), **SINGLE}
