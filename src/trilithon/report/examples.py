"""Example tables: values for the inputs that a mask reads, chosen so that a picture shows what it does with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trilithon.spec import term as t
from trilithon.spec.evaluate import evaluate
from trilithon.spec.term import Term
from trilithon.spec.traverse import tables, walk

LEFT_PADDING = 2  # cells at the head of an example that count as padding
Env = Mapping[str, Tensor | int]


@dataclass(frozen=True)
class Use:
    """How a mask reads one table.

    Attributes:
        axis: the one along which an example varies: that of the tokens if there is one.
        letters: what its indices depend on: `b h q k`, and "#" for the counter of a prefix sum.
        dense: one read depends on the query and on the key.
        equals: a number that entries are compared with for equality, or None; 0 or 1 make it a flag.
    """

    name: str
    sort: str
    axis: int
    letters: frozenset[str]
    dense: bool
    equals: int | None

    @property
    def is_by_key(self) -> bool:
        """Its values stand for keys, so that they can be shown below them."""
        return not self.dense and bool(self.letters & {"k", "#"})


def uses(terms: Iterable[Term]) -> dict[str, list[Term]]:
    """Table -> where it is read."""
    found: dict[str, list[Term]] = {}
    for x in walk(terms):
        if x.op == "read":
            found.setdefault(x.args[0], []).append(x)
    return found


def use_of(name: str, reads: list[Term], terms: Iterable[Term]) -> Use:
    """What the reads of one table have in common."""
    per_read = [[_letters(index) for index in read.args[1:]] for read in reads]
    together = [frozenset().union(*letters) for letters in per_read]
    rank = len(reads[0].args) - 1
    axes = [frozenset().union(*(letters[i] for letters in per_read)) for i in range(rank)]
    by_token = [i for i in range(rank) if axes[i] & {"q", "k", "#"}]
    by_head = [i for i in range(rank) if "h" in axes[i]]
    return Use(
        name=name,
        sort=reads[0].sort,
        axis=(by_token or by_head or [rank - 1])[-1],
        letters=frozenset().union(*together),
        dense=any({"q", "k"} <= letters for letters in together),
        equals=_compared(reads, terms),
    )


def example_tables(
    terms: list[Term], env: Env, known: Mapping[str, Tensor], tokens: int, every: int = 1, seed: int | None = None
) -> dict[str, Tensor]:
    """A table for each name that the terms read and `known` lacks.

    Args:
        env: as `evaluate` takes it; the tables are as large as the reads at these indices need.
        tokens: number of keys.
        every: the picture shows one key of so many.
        seed: draw all at random instead.
    """
    reads = {name: found for name, found in uses(terms).items() if name not in known}
    made = dict(known)
    counters = {t.counter(depth).args[0]: torch.arange(tokens).view(-1, 1, 1, 1) for depth in range(3)}
    while reads:  # a table that gives the indices into another comes first
        name = next((n for n in reads if all(tables(i) <= made.keys() for x in reads[n] for i in x.args[1:])), min(reads))
        found = reads.pop(name)
        rank = len(found[0].args) - 1
        shape = tuple(max(_extent(x.args[1 + i], {**env, **counters}, made, tokens) for x in found) for i in range(rank))
        use = use_of(name, found, terms)
        made[name] = _random(use, shape, seed or 0) if use.dense or seed is not None else _telling(use, shape, tokens, every)
    return {name: table for name, table in made.items() if name not in known}


def _letters(index: Term) -> frozenset[str]:
    names = (x.args[0] for x in walk([index]) if x.op == "var")
    return frozenset("#" if name.startswith("#") else name for name in names)


def _compared(reads: list[Term], terms: Iterable[Term]) -> int | None:
    for x in walk(terms):
        if x.op == "eq0":
            coefficients, constant = t.linear(x.args[0])
            if len(coefficients) == 1 and next(iter(coefficients)) in reads and abs(next(iter(coefficients.values()))) == 1:
                return -constant * next(iter(coefficients.values()))
    return None


def _extent(index: Term, env: Env, made: Mapping[str, Tensor], tokens: int) -> int:
    """The length that an axis needs to be read at this index."""
    if not tables(index) <= made.keys():
        return tokens
    return max(int(evaluate(index, env, made).max()) + 1, 1)


def _telling(use: Use, shape: tuple[int, ...], tokens: int, every: int) -> Tensor:
    """Padding, two packed documents, or one number a head; the same in every row."""
    index = torch.arange(shape[use.axis] if shape else 1)
    restart = 3 * (tokens // every) // 8 * every
    is_flag = use.sort != "int" or use.equals is not None
    if not use.letters & {"q", "k", "#"}:
        values = 1 - index % 2 if is_flag else tokens * (3 + 2 * index) // 8
    elif "position" in use.name and use.sort == "int":
        late = (tokens - len(index)) // every * 2 // 3 * every  # a step of generation: few queries, behind many keys
        values = index + late if len(shape) == 1 else torch.where(index < restart, index, index - restart)
    elif is_flag:
        values = _flags(use, index, restart, every)
    else:
        values = (index >= restart).long()
    dtype = {"int": torch.int64, "bool": torch.bool, "float": torch.float64}[use.sort]
    return values.to(dtype).view([-1 if i == use.axis else 1 for i in range(len(shape))]).expand(shape)


def _flags(use: Use, index: Tensor, restart: int, every: int) -> Tensor:
    """Zeros for padding, then ones; where flags are counted, a one where a document starts."""
    if "#" in use.letters:
        special, marks = use.equals if use.equals is not None else 1, index == restart
    else:
        special, marks = 0 if use.equals in (None, 1) else use.equals, index < LEFT_PADDING * every
    other = 1 - special if special in (0, 1) else special + 1
    return torch.where(marks, special, other)


def _random(use: Use, shape: tuple[int, ...], seed: int) -> Tensor:
    """Any values; those of a cell are the same in all rows and heads."""
    if use.dense and len(shape) > 2:
        return _random(use, shape[-2:], seed).expand(shape)
    generator = torch.Generator().manual_seed(seed)
    if use.sort == "float":
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    if use.sort == "bool":
        return torch.rand(shape, generator=generator) < 0.6
    low = use.equals or 0
    return torch.randint(low, low + (2 if use.dense or use.equals is not None else 6), shape, generator=generator)
