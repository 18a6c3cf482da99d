"""Concrete cases of a mask: sizes, random tables that meet the assumptions, and the mask's value there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trilithon.lift.meaning import Meaning
from trilithon.spec.assumption import Assumption
from trilithon.spec.evaluate import evaluate
from trilithon.spec.term import Term
from trilithon.spec.traverse import free_vars, walk

SMALL = (
    2,
    3,
    5,
    7,
    11,
)  # sequence lengths to look at, smallest first: a witness should be readable. Larger ones come from the solver
MOST_CELLS = 1 << 22


@dataclass(frozen=True)
class Sample:
    """One concrete case.

    Attributes:
        env: size symbols as ints; `b h q k` as index tensors that broadcast to `[b, h, s, t]`, or as ints.
        tables: the input tables.
    """

    env: Mapping[str, Tensor | int]
    tables: Mapping[str, Tensor]

    def evaluate(self, term: Term) -> Tensor:
        return evaluate(term, self.env, self.tables)


def draw_samples(
    terms: Iterable[Term],
    meaning: Meaning,
    ranges: Mapping[str, tuple[int, int | None]],
    given: tuple[Assumption, ...],
    count: int = len(SMALL),
    seed: int = 0,
) -> Iterator[Sample]:
    """Random cases at small sizes, every cell of each mask."""
    terms = list(terms)
    symbols = sorted(set().union(*(free_vars(x) for x in (*terms, *meaning.dims, *_sizes(meaning)))) - set("bhqk"))
    for n in range(count):
        generator = torch.Generator().manual_seed(seed * 1000 + n)
        env: dict[str, Tensor | int] = {}
        for j, name in enumerate(symbols):
            low, high = ranges.get(name, (1, None))
            wanted = SMALL[(n + j) % len(SMALL)] + seed
            env[name] = max(low, min(wanted, high if high is not None else wanted))
        sample = sample_at(env, terms, meaning, given, generator)
        if sample is not None:
            yield sample


def _sizes(meaning: Meaning) -> list[Term]:
    return [size for shape in meaning.tables.values() for size in shape]


def sample_at(
    env: dict[str, Tensor | int],
    terms: Iterable[Term],
    meaning: Meaning,
    given: tuple[Assumption, ...],
    generator: torch.Generator,
) -> Sample | None:
    """The case with these sizes and random tables, or None if it is empty or too large to look at."""
    dims = [int(evaluate(d, env)) for d in meaning.dims]
    if min(dims) < 1:
        return None
    dims[0] = min(dims[0], 3)
    if dims[0] * dims[1] * dims[2] * dims[3] > MOST_CELLS:
        return None
    for axis, (name, size) in enumerate(zip("bhqk", dims, strict=True)):
        env[name] = torch.arange(size).view([-1 if i == axis else 1 for i in range(4)])
    return Sample(env, random_tables(terms, env, meaning, given, generator))


def random_tables(
    terms: Iterable[Term],
    env: Mapping[str, Tensor | int],
    meaning: Meaning,
    given: tuple[Assumption, ...],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Tables that the terms read: drawn from an assumption where there is one, else 0/1 or small numbers."""
    tables: dict[str, Tensor] = {}
    for entry in (x for x in walk(terms) if x.op == "read" and x.args[0] not in tables):
        name = entry.args[0]
        if name in meaning.constants:
            tables[name] = meaning.constants[name]
            continue
        shape = tuple(int(evaluate(d, env)) for d in meaning.tables.get(name, ()))
        dtype = {"int": torch.int64, "bool": torch.bool, "float": torch.float64}[entry.sort]
        declared = [a for a in given if a.table == name]
        tables[name] = declared[-1].sample(shape, dtype, generator) if declared else _any_table(shape, dtype, generator)
    return tables


def _any_table(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype == torch.float64:
        return torch.randn(shape, generator=generator, dtype=dtype)
    if dtype == torch.bool or bool(torch.rand((), generator=generator) < 0.5):
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    if len(shape) and bool(torch.rand((), generator=generator) < 0.5):  # numbers that restart, as packed positions do
        restart = torch.rand(shape, generator=generator) < 0.3
        index = torch.arange(shape[-1]).expand(shape)
        start = torch.where(restart, index, 0).cummax(-1).values
        return index - start
    return torch.randint(-2, 6, shape, generator=generator)
