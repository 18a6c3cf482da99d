"""Translation validation: a site's own mask, run by torch on concrete inputs, against the mask that was proved.

A proof speaks of the lifted formula. If a handler reads an operation wrongly, formula and program part, and what is
proved is about another mask. So the program's nodes are run as they are at a few random sizes, with inputs that meet
the proof's assumptions, and every cell is compared with the proved mask, and with the bias and the sinks that the
canonical op would carry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trilithon.capture.sites import Site
from trilithon.lift.meaning import Meaning
from trilithon.lift.scores import SCORE
from trilithon.lift.symtensor import sort_of
from trilithon.prove.mask_graph import CannotRun, MaskGraph, shape_of
from trilithon.prove.prove import Ranges
from trilithon.prove.samples import random_tables
from trilithon.prove.verdict import Proof
from trilithon.spec import term as t
from trilithon.spec.assumption import KINDS
from trilithon.spec.evaluate import evaluate
from trilithon.spec.term import Term
from trilithon.spec.traverse import free_vars, walk

ROUNDS = 3  # sizes at which a mask is compared
EDGE = 2  # the round that looks at the largest distance that the mask speaks of, if it is short enough
MOST_TRIES = 9  # sizes may contradict each other, or inputs index out of range
MOST_ROUNDINGS = 8  # between the scores and the softmax
SHORTEST, LONGEST, MOST_ROWS = 2, 12, 3
MOST_CELLS, MOST_EDGE_CELLS = 1 << 22, 1_200_000


@dataclass(frozen=True)
class Validation:
    """What running a site's own mask showed.

    Attributes:
        cells: cells that were compared, and agree with the proved mask.
        sizes: the sizes they were compared at, e.g. "b=2 h=4 s=5 t=5".
        skipped: why nothing could be compared, or "".
        difference: where the program's own mask and the proved one disagree, or "".
    """

    cells: int = 0
    sizes: tuple[str, ...] = ()
    skipped: str = ""
    difference: str = ""


def validate(graph: MaskGraph, site: Site, meaning: Meaning, proof: Proof, ranges: Ranges) -> Validation:
    """Compare `proof.mask` with what the nodes of `graph` compute, at a few random sizes.

    Args:
        graph: what makes `site.mask`.
        ranges: size symbol -> lowest and highest value that the export allows.
    """
    check = _Check(graph, site, meaning, proof, ranges)
    cells, why = 0, ""
    compared: list[str] = []
    for n in range(MOST_TRIES):
        try:
            found = check.at(n)
        except CannotRun as reason:
            why = str(reason)
            continue
        if found.difference:
            return found
        cells += found.cells
        compared += found.sizes
        if len(compared) == ROUNDS or check.is_one_case:
            break
    return Validation(cells, tuple(compared), skipped="" if compared else why)


@dataclass(frozen=True)
class _Check:
    graph: MaskGraph
    site: Site
    meaning: Meaning
    proof: Proof
    ranges: Ranges

    @property
    def symbols(self) -> list[str]:
        return sorted(_symbols(*self.meaning.dims, *self.graph.sizes()))

    @property
    def is_one_case(self) -> bool:
        """No size and no input can vary."""
        return not self.symbols and all(name in self.meaning.constants for name in self.graph.inputs.values())

    def at(self, n: int) -> Validation:
        """Compare at the sizes and inputs of try `n`."""
        generator = torch.Generator().manual_seed(n)
        sizes = self._draw_sizes(n, generator)
        dims = [_value(d, sizes) for d in self.meaning.dims]
        self._require_small(dims, sizes, MOST_EDGE_CELLS if n == EDGE else MOST_CELLS)
        given = self._draw_inputs(sizes, generator)
        with torch.no_grad():
            value, sizes = self.graph.run(given, sizes)
        self._require_in_range(sizes)
        cells = _Cells.of(self, dims, sizes, given)
        try:
            value = cells.fit(value)
            kept, odd = cells.read(value)
            kept, odd, claimed, value = torch.broadcast_tensors(kept, odd, cells.evaluate(self.mask), value)
        except RuntimeError as error:
            raise CannotRun(f"the mask does not fit the scores at {_text(dims)}") from error
        wrong = (odd | (kept != claimed)).nonzero()
        if len(wrong):
            return Validation(difference=self._difference(wrong[0].tolist(), dims, kept, odd, value))
        if not cells.fits_positions(value, kept):
            return Validation(difference=f"at {_text(dims)}, its bias is not the one by position in every row")
        if not self._has_sinks(sizes, generator):
            return Validation(difference=f"at {_text(dims)}, its sinks are not those of {self.meaning.sinks_table}")
        return Validation(kept.numel(), (_text(dims),))

    def _has_sinks(self, sizes: dict[str, int], generator: torch.Generator) -> bool:
        """Is the column that joins the scores the table of sinks, in every row?"""
        name = self.meaning.sinks_table
        if not name:
            return True
        column = replace(self, graph=MaskGraph.of(replace(self.site, mask=self.site.sinks, score=None), ()))
        given = column._draw_inputs(sizes, generator)
        value, _ = column.graph.run(given, sizes)
        if name not in given:
            return False
        own = given[name].to(value.dtype).view(1, -1, 1, 1)
        return value.shape[1] == own.shape[1] and bool(torch.equal(value, own.expand_as(value)))

    @property
    def mask(self) -> Term:
        return self.proof.mask.at_sizes(*self.meaning.dims[2:])

    def _draw_sizes(self, n: int, generator: torch.Generator) -> dict[str, int]:
        """Each size for itself; later tries give all the same, since some must be equal where export says nothing."""
        lengths = _symbols(*self.meaning.dims[2:])
        rows = _symbols(self.meaning.dims[0]) - lengths
        common = _random(SHORTEST, LONGEST, generator)
        sizes = {}
        for name in self.symbols:
            low, high = self.ranges.get(name, (1, None))
            wanted = _random(SHORTEST, LONGEST, generator)
            if name in rows:
                wanted = 1 if n == EDGE else min(wanted, MOST_ROWS)
            elif n == EDGE and name in lengths:
                wanted += _longest_distance(self.mask)
            elif n >= ROUNDS:
                wanted = common
            sizes[name] = max(low, wanted if high is None else min(wanted, high))
        return sizes

    def _require_small(self, dims: list[int], sizes: dict[str, int], most: int) -> None:
        mask = math.prod(_value(size, sizes) for size in shape_of(self.graph.nodes[-1]))
        cells = max(mask, dims[0] * dims[2] * dims[3])
        if not 0 < cells <= most:
            raise CannotRun(f"its mask has {cells} cells at {_text(dims)}, {'too many' if cells else 'nothing'} to compare")

    def _draw_inputs(self, sizes: dict[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        """Random inputs that meet the proof's assumptions; the program's constants as they are."""
        inputs = {name: node for node, name in self.graph.inputs.items()}
        shapes = {name: tuple(t.integer(_value(d, sizes)) for d in shape_of(n)) for name, n in inputs.items()}
        reads = [t.read(name, (), sort_of(n.meta["val"].dtype)) for name, n in inputs.items()]
        given = tuple(a for a in self.proof.assumptions if a.table in inputs and a.kind in KINDS)
        tables = random_tables(reads, sizes, replace(self.meaning, tables=shapes), given, generator)
        drawn = {name: tables[name].to("cpu", n.meta["val"].dtype) for name, n in inputs.items()}
        if SCORE in drawn:
            drawn[SCORE] = 1 + drawn[SCORE].abs()  # numbers near 0 lose digits in half precision
        for a in given:
            if not bool(a.holds(drawn[a.table])):
                raise CannotRun(f"no input was found for which {a.text}")
        return drawn

    def _require_in_range(self, sizes: dict[str, int]) -> None:
        """The proof says nothing about integers that the program reads from data and its assertions would refuse."""
        for name, value in sizes.items():
            low, high = self.ranges.get(name, (value, None))
            if value < low or (high is not None and value > high):
                raise CannotRun(f"the program does not allow {name}={value}")

    def _difference(self, at: list[int], dims: list[int], kept: Tensor, odd: Tensor, value: Tensor) -> str:
        index = tuple(at)
        cell = " ".join(f"{name}={i}" for name, i in zip("bhqk"[4 - len(at) :], at, strict=True))
        mask = self.proof.mask
        if odd[index]:
            says = f"the program has {float(value[index]):g}, which neither keeps nor blocks"
        elif kept[index]:
            says = f"the program allows what {mask} blocks"
        else:
            says = f"the program blocks what {mask} allows"
        return f"at {cell} with {_text(dims)}, {says}"


@dataclass(frozen=True)
class _Cells:
    """One concrete case: what a cell of the mask must hold if it is kept."""

    check: _Check
    dims: list[int]
    env: Mapping[str, Tensor | int]
    given: Mapping[str, Tensor]

    @classmethod
    def of(cls, check: _Check, dims: list[int], sizes: Mapping[str, int], given: Mapping[str, Tensor]) -> _Cells:
        env: dict[str, Tensor | int] = {**sizes}
        for axis, (name, size) in enumerate(zip("bhqk", dims, strict=True)):
            env[name] = torch.arange(size).view([-1 if i == axis else 1 for i in range(4)])
        return cls(check, dims, env, given)

    def evaluate(self, term: Term) -> Tensor:
        try:
            return evaluate(term, self.env, self.given)
        except KeyError as missing:
            raise CannotRun(f"the proved mask reads {missing.args[0]}, which the mask's own nodes do not") from missing

    def fit(self, x: Tensor) -> Tensor:
        """`[b * h, s, t]` as `[b h s t]`."""
        return x.reshape(self.dims) if self.check.meaning.flat and x.dim() == 3 else x

    def read(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Which cells the program keeps, and which it neither keeps nor blocks (see `lift/scores.py`)."""
        if value.dtype == torch.bool:
            kept, odd = value, torch.zeros_like(value)
        else:
            expected, largest = self.expected()
            rounding = MOST_ROUNDINGS * self.check.graph.rounding
            kept = (value.double() - expected).abs() <= rounding * largest
            weakest = max((float(d) for d in self.check.meaning.drops if d != "False"), default=-math.inf)
            odd = ~(kept | (value <= weakest / 2))  # scores are added to it
        if self.check.site.is_causal:
            kept = kept & torch.ones(self.dims[2:], dtype=torch.bool).tril()
        return kept, odd

    def expected(self) -> tuple[Tensor, Tensor]:
        """What a kept cell holds: the scores, scaled and capped, plus the bias; and the largest of the two."""
        bias = self.check.meaning.bias
        score, added = self.scores(), torch.zeros(()) if bias is None else self.evaluate(bias.formula)
        return score + added, torch.maximum(score.abs(), added.abs())

    def scores(self) -> Tensor:
        """The scores, scaled and capped; 0 where the mask is added to them elsewhere."""
        if SCORE not in self.given:
            return torch.zeros(())
        scale, cap = self.check.meaning.scale, self.check.meaning.softcap
        if scale is None:
            raise CannotRun("the factor on its scores is no number of the program")
        score = scale * self.fit(self.given[SCORE]).double()
        return score if cap is None else cap * torch.tanh(score / cap)

    def fits_positions(self, value: Tensor, kept: Tensor) -> bool:
        """Do kept cells of a row hold the scores plus the bias by position plus one number of the row?"""
        by_position = self.check.meaning.position_bias
        if by_position is None:
            return True
        rest, score, bias, kept = torch.broadcast_tensors(value.double(), self.scores(), self.evaluate(by_position), kept)
        largest = torch.stack([rest.abs(), score.abs(), bias.abs()]).masked_fill(~kept, 0.0).amax((0, -1))
        rest = rest - score - bias
        spread = rest.masked_fill(~kept, -math.inf).amax(-1) - rest.masked_fill(~kept, math.inf).amin(-1)
        return bool((spread <= MOST_ROUNDINGS * self.check.graph.rounding * largest).all())


def _symbols(*sizes: Term) -> frozenset[str]:
    return frozenset().union(*map(free_vars, sizes))


def _value(size: Term, sizes: dict[str, int]) -> int:
    try:
        return int(evaluate(size, sizes))
    except KeyError as missing:
        raise CannotRun(f"the size {size} depends on data ({missing.args[0]})") from missing


def _random(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _longest_distance(mask: Term) -> int:
    """The largest number in a mask, such as the width of a window."""
    terms = list(walk([mask]))
    return max([abs(x.args[1]) for x in terms if x.op == "sum"] + [abs(x.value) for x in terms if x.op == "int"], default=0)


def _text(dims: list[int]) -> str:
    return " ".join(f"{name}={n}" for name, n in zip("bhst", dims, strict=True))
