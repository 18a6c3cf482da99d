"""Many masks in one exported program, since exporting is slow; and what torch says each of them is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import scaled_dot_product_attention

from trilithon.capture.sites import Site, find_sites
from trilithon.errors import CannotLift
from trilithon.lift.meaning import Meaning, lift_site
from trilithon.prove.program import size_ranges
from trilithon.prove.prove import Ranges
from trilithon.prove.samples import Sample
from trilithon.prove.scans import close_scans, scan_lemmas
from trilithon.prove.solve import Prover
from trilithon.prove.verdict import Proof
from trilithon.prove.witness import Witness, find_witness
from trilithon.spec.evaluate import evaluate
from trilithon.spec.masks import Mask
from trilithon.spec.term import Term

MaskFn = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
HEADS, LONGEST = 2, 256
TABLES = {
    "attention_mask": torch.int64,
    "visible": torch.bool,
    "position_ids": torch.int64,
    "segments": torch.int64,
    "input_ids": torch.int64,
}


class Attends(nn.Module):
    """Makes every mask, and attends with the first: the others stand in its place when they are lifted."""

    def __init__(self, makes: Sequence[MaskFn]) -> None:
        super().__init__()
        self.makes = makes

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor,
        visible: Tensor,
        position_ids: Tensor,
        segments: Tensor,
        input_ids: Tensor,
    ) -> list[Tensor]:
        given = (attention_mask, visible, position_ids, segments, input_ids)
        x = dict(zip(TABLES, given, strict=True))
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
        masks = [make(i, j, x) for make in self.makes]
        whole = masks[0].expand(q.shape[0], HEADS, q.shape[2], k.shape[2])
        return [scaled_dot_product_attention(q, k, v, attn_mask=whole), *masks]


@dataclass(frozen=True)
class Run:
    """One call: its tables, and every mask that the exported program made."""

    b: int
    s: int
    t: int
    tables: dict[str, Tensor]
    masks: list[Tensor]

    def meets(self, proof: Proof) -> bool:
        """Do these inputs meet what the proof assumes?"""
        about = [a for a in proof.assumptions if a.table in self.tables]
        return all(bool(a.holds(self.tables[a.table])) for a in about)


@dataclass(frozen=True)
class Batch:
    """Masks exported together, with dynamic batch and lengths 1 to `LONGEST`."""

    makes: tuple[MaskFn, ...]
    square: bool = True

    @cached_property
    def program(self) -> ExportedProgram:
        b, s, t = Dim("b", min=1, max=8), Dim("s", min=1, max=LONGEST), Dim("t", min=1, max=LONGEST)
        t = s if self.square else t
        shapes = {"q": {0: b, 2: s}, "k": {0: b, 2: t}, "v": {0: b, 2: t}} | {name: {0: b, 1: t} for name in TABLES}
        example = self.inputs(2, 6, 6 if self.square else 9, seed=0)
        return torch.export.export(
            Attends(self.makes).eval(),
            (),
            example,
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )

    @cached_property
    def module(self) -> nn.Module:
        return self.program.module()

    @cached_property
    def ranges(self) -> Ranges:
        return size_ranges(self.program)

    @cached_property
    def sites(self) -> list[Site]:
        """The one site of the program, with each mask in turn."""
        (site,) = find_sites(self.program.graph)
        _, *masks = self.program.graph.output_node().args[0]
        return [replace(site, mask=mask) for mask in masks]

    @cached_property
    def meanings(self) -> list[Meaning | CannotLift]:
        """What each mask was lifted to, or why it was refused."""
        return [self._lift(site) for site in self.sites]

    def _lift(self, site: Site) -> Meaning | CannotLift:
        try:
            return lift_site(self.program, site)
        except CannotLift as refusal:
            return refusal

    def meaning(self, n: int) -> Meaning:
        meaning = self.meanings[n]
        assert isinstance(meaning, Meaning), meaning
        return meaning

    def inputs(self, b: int, s: int, t: int, seed: int, tame: bool = False) -> dict[str, Tensor]:
        """Random inputs; tame ones are not padded and their positions go on by one."""
        g = torch.Generator().manual_seed(seed)
        ones, along = torch.ones(b, t, dtype=torch.int64), torch.arange(t).expand(b, t)
        wild = torch.randint(0, 2, (b, t), generator=g) * torch.randint(1, 4, (b, t), generator=g)
        return {
            "q": torch.zeros(b, HEADS, s, 2),
            "k": torch.zeros(b, HEADS, t, 2),
            "v": torch.zeros(b, HEADS, t, 2),
            "attention_mask": ones if tame else wild,
            "visible": ones.bool() if tame else torch.randint(0, 2, (b, t), generator=g).bool(),
            "position_ids": along + seed if tame else torch.randint(-1, 4, (b, t), generator=g),
            "segments": torch.randint(0, 3, (b, t), generator=g),
            "input_ids": torch.randint(0, 9, (b, t), generator=g),
        }

    def run(self, b: int, s: int, t: int, seed: int, tame: bool = False) -> Run:
        inputs = self.inputs(b, s, t, seed, tame)
        _, *masks = self.module(**inputs)
        return Run(b, s, t, {name: inputs[name] for name in TABLES}, [mask.expand(b, HEADS, s, t) for mask in masks])

    @cached_property
    def runs(self) -> list[Run]:
        """Short ones of all kinds, and a long one in which nothing far away can hide."""
        sizes = [(1, 1, 1), (2, 2, 2), (1, 3, 3), (3, 5, 5), (2, 7, 7), (1, 12, 12), (2, LONGEST, LONGEST)]
        if not self.square:
            sizes = [(1, 1, 3), (2, 3, 1), (1, 3, 5), (2, 7, 4), (1, 6, 9), (1, LONGEST, 100), (1, 100, LONGEST)]
        return [self.run(*size, seed, tame) for seed, size in enumerate(sizes) for tame in (False, True)]

    def lifted(self, n: int, run: Run, term: Term) -> Tensor:
        """A term of mask `n`, evaluated at every cell of a run."""
        meaning = self.meaning(n)
        sizes = (run.b, HEADS, run.s, run.t)
        env: dict[str, Tensor | int] = {d.args[0]: n for d, n in zip(meaning.dims, sizes, strict=True) if d.op == "var"}
        for axis, (name, size) in enumerate(zip("bhqk", sizes, strict=True)):
            env[name] = torch.arange(size).view([-1 if i == axis else 1 for i in range(4)])
        return evaluate(term, env, {**meaning.constants, **run.tables}).expand(sizes)

    def assert_holds(self, n: int, proof: Proof, runs: Sequence[Run] | None = None) -> None:
        """What was proved of mask `n` is so in every run that meets the assumptions."""
        meaning = self.meaning(n)
        for run in (r for r in runs or self.runs if r.meets(proof)):
            says, where = kept(run.masks[n]), f"b={run.b} s={run.s} t={run.t}"
            assert says is not None, f"{proof.mask} was proved of a mask with other values than kept and blocked"
            claimed = self.lifted(n, run, proof.mask.at_sizes(*meaning.dims[2:]))
            assert torch.equal(claimed, says), f"false proof of {proof.mask} at {where}"
            assert not loses_a_row(run.masks[n]), f"{proof.mask} was proved, but a row has no key at {where}"

    def witness(self, n: int, claim: Mask) -> Witness | None:
        """A cell where mask `n` and the claim differ, as the prover finds it."""
        meaning = self.meaning(n)
        prover = Prover(dict(zip("bhqk", meaning.dims, strict=True)), self.ranges, meaning.tables)
        closed, _ = close_scans(meaning.keep, prover)
        lemmas, _ = scan_lemmas(closed, prover)
        return find_witness(meaning.keep, claim.at_sizes(*meaning.dims[2:]), meaning, prover, closed, lemmas)


def kept(mask: Tensor) -> Tensor | None:
    """The cells a mask keeps, or None if some are neither kept nor blocked."""
    if mask.dtype == torch.bool:
        return mask
    blocked = mask <= torch.finfo(mask.dtype).min / 2
    return mask == 0 if bool(((mask == 0) | blocked).all()) else None


def loses_a_row(mask: Tensor) -> bool:
    """Is a row blocked altogether, by numbers that are not -inf? Its attention is then the mean of V, not 0."""
    if mask.dtype == torch.bool:
        return False
    lost = (mask != 0).all(-1)
    return bool((lost & (mask != -torch.inf).any(-1)).any())


def replays(make: MaskFn, claim: Mask, cell: dict[str, int], sample: Sample) -> bool:
    """Does torch see the two differ at this cell, with the tables of the sample?"""
    b, s, t = cell["b"] + 1, cell["s"], cell["t"]
    b = max([b, *(table.shape[0] for table in sample.tables.values() if table.dim())])
    zeros = {name: torch.zeros(b, t, dtype=dtype) for name, dtype in TABLES.items()}
    tables = zeros | {name: x.to(TABLES[name]) for name, x in sample.tables.items() if name in TABLES}
    mask = kept(make(torch.arange(s)[:, None], torch.arange(t)[None, :], tables).expand(b, HEADS, s, t))
    assert mask is not None
    index = tuple(cell[name] for name in "bhqk")
    return bool(mask[index]) != bool(claim.materialize(b, HEADS, s, t, tables)[index])
