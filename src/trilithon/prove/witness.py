"""Find one index where a mask and a claim differ, small enough to read, and confirmed by evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import torch
import z3
from torch import Tensor

from trilithon.lift.meaning import Meaning
from trilithon.prove.encode import Encoder
from trilithon.prove.samples import Sample, draw_samples, random_tables
from trilithon.prove.solve import Answer, Prover
from trilithon.spec import term as t
from trilithon.spec.evaluate import evaluate
from trilithon.spec.term import Term
from trilithon.spec.traverse import walk

SIZE_LIMITS = (4, 16, 64, 1024, 1 << 17)
MOST_ENTRIES = 1 << 14  # of a table that is read out of a model in full


@dataclass(frozen=True)
class Witness:
    """A cell where they differ: `b h q k`, `s t`, the sample it was seen in, and what the mask says."""

    cell: dict[str, int]
    sample: Sample
    allowed: bool


def find_witness(
    keep: Term, claim: Term, meaning: Meaning, prover: Prover, closed: Term | None = None, lemmas: tuple[Term, ...] = ()
) -> Witness | None:
    """A confirmed counterexample to `keep == claim`, or None (then nothing is known).

    Samples are looked at first, then the solver is asked for one at ever larger sizes; `closed` and `lemmas` are
    the easier form of `keep` to ask it about.
    """
    for sample in draw_samples([keep, claim], meaning, prover.ranges, prover.assumptions):
        found = _first_difference(sample, keep, claim, meaning)
        if found is not None:
            return found
    goal = t.eq(keep if closed is None else closed, claim)
    for limit in SIZE_LIMITS:
        small = tuple(d <= max(limit, low) for d in meaning.dims[2:] for low in [_lowest(d, prover)] if d.op != "int")
        answer = prover.valid(goal, given=small, extra=lemmas)
        if answer.status == "unknown":
            return None
        if answer.status == "invalid":
            return _replay(answer, keep, claim, meaning, prover)
    return None


def _first_difference(sample: Sample, keep: Term, claim: Term, meaning: Meaning) -> Witness | None:
    ours, theirs = torch.broadcast_tensors(sample.evaluate(keep), sample.evaluate(claim))
    differ = (ours != theirs).nonzero()
    if len(differ) == 0:
        return None
    index = differ[0].tolist()
    index = [0] * (4 - len(index)) + index
    cell = dict(zip("bhqk", index, strict=True))
    return Witness({**cell, **_lengths(sample.env, meaning)}, sample, bool(ours[tuple(differ[0].tolist())]))


def _lengths(env: Mapping[str, Tensor | int], meaning: Meaning) -> dict[str, int]:
    return {"s": int(evaluate(meaning.dims[2], env)), "t": int(evaluate(meaning.dims[3], env))}


def _lowest(size: Term, prover: Prover) -> int:
    return prover.ranges.get(size.args[0], (0, None))[0] if size.op == "var" else 0


def _replay(answer: Answer, keep: Term, claim: Term, meaning: Meaning, prover: Prover) -> Witness | None:
    """Evaluate both at the solver's cell: with random tables that meet the assumptions, then with the solver's own."""
    env: dict[str, Tensor | int] = {name: low for name, (low, _) in prover.ranges.items()}
    env.update(dict.fromkeys("bhqk", 0))
    env.update({name: value for name, value in answer.model.items() if "!" not in name and "@" not in name})
    generator = torch.Generator().manual_seed(0)
    for tables in (
        random_tables([keep, claim], env, meaning, prover.assumptions, generator),
        dict(_tables_of(answer, (keep, claim), env, meaning)),
    ):
        sample = Sample(env, tables)
        ours, theirs = bool(sample.evaluate(keep)), bool(sample.evaluate(claim))
        if ours != theirs:
            cell = {name: int(env[name]) for name in "bhqk"}
            return Witness({**cell, **_lengths(env, meaning)}, sample, ours)
    return None


def _tables_of(
    answer: Answer, terms: tuple[Term, ...], env: Mapping[str, Tensor | int], meaning: Meaning
) -> Iterator[tuple[str, Tensor]]:
    """The tables as the model has them: in full when small, else only the entries that the terms read."""
    assert answer.reading is not None
    encode = Encoder()
    entries: dict[str, list[Term]] = {}
    for x in walk(terms):
        if x.op == "read":
            entries.setdefault(x.args[0], []).append(x)
    for name, reads in entries.items():
        if name in meaning.constants:
            yield name, meaning.constants[name]
            continue
        shape = tuple(int(evaluate(d, env)) for d in meaning.tables.get(name, ()))
        table = torch.zeros(shape, dtype=torch.bool if reads[0].sort == "bool" else torch.int64)
        function = encode.table(name, len(shape), reads[0].sort)
        if table.numel() <= MOST_ENTRIES:
            for index in product(*map(range, shape)):
                table[index] = _value(answer.reading, function(*map(z3.IntVal, index)) if shape else function)
        else:
            for x in reads:
                at = [_value(answer.reading, encode(i)) for i in x.args[1:]]
                if all(0 <= i < n for i, n in zip(at, shape, strict=True)):
                    table[tuple(at)] = _value(answer.reading, encode(x))
        yield name, table


def _value(model: z3.ModelRef, expr: z3.ExprRef) -> int:
    value = model.eval(expr, model_completion=True)
    return int(z3.is_true(value)) if z3.is_bool(value) else value.as_long()
