"""The report: what was found at each attention site, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from trilithon.prove.verdict import Proof, Verdict
from trilithon.report.saved import FORMAT, ReportData, SiteData
from trilithon.spec.assumption import Assumption
from trilithon.spec.bias import Bias
from trilithon.spec.masks import Mask
from trilithon.spec.term import Term
from trilithon.stages import StartUp


@dataclass(frozen=True)
class Lifted:
    """The mask of a site as it was lifted, for pictures; it is not saved.

    Attributes:
        keep: may query q attend to key k?
        sizes: numbers of queries and of keys, as terms over size symbols.
        constants: tables that are part of the program.
    """

    keep: Term
    sizes: tuple[Term, Term]
    constants: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteReport:
    """One attention call.

    Attributes:
        name: module path, e.g. "model.layers.0.self_attn".
        kind: the op it exported as: "sdpa", "efficient", "flash", "cudnn", "decomposed", ...
        verdict: only PROVED is rewritten.
        mask, bias: what was proved, or None.
        assumptions: what the proof rests on, each with its `source`.
        witness: for REFUTED, or a proved formula: indices and sizes where the mask differs from `nearest`.
        reason: one sentence.
        formula: the lifted mask as text; "" if it could not be lifted.
        where: the user's source line.
        runs_on: the kernel that will serve it.
        alternatives: other proved forms of this mask, under other assumptions.
        heads: (query heads, key/value heads before repetition), when static; the second is known of rewritten sites only.
        solver_seconds: time in z3.
        cached: the proof comes from the proof cache.
        validated_cells: number of cells on which the program's own mask was run and agreed, or None.
        softcap: scores are capped softly at it, in logits; None = they are not.
        sinks: the softmax counts a learned extra logit a head.
        nearest: the named mask that the witness tells it from.
        lifted: what pictures of it are drawn from, or None if it could not be lifted.
    """

    name: str
    kind: str
    verdict: Verdict
    mask: Mask | None
    assumptions: tuple[Assumption, ...]
    witness: dict[str, int]
    reason: str
    formula: str = ""
    where: str = ""
    runs_on: str = ""
    bias: Bias | None = None
    alternatives: tuple[Proof, ...] = ()
    heads: tuple[int, int | None] | None = None
    solver_seconds: float = 0.0
    cached: bool = False
    validated_cells: int | None = None
    softcap: float | None = None
    sinks: bool = False
    nearest: Mask | None = None
    lifted: Lifted | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> SiteData:
        """Plain data, as `Report.to_json` writes it."""
        return {
            "name": self.name,
            "kind": self.kind,
            "verdict": self.verdict.value,
            "mask": None if self.mask is None else str(self.mask),
            "nearest": None if self.nearest is None else str(self.nearest),
            "bias": None if self.bias is None else str(self.bias),
            "softcap": self.softcap,
            "sinks": self.sinks,
            "assumptions": [{"text": a.text, "source": a.source, "table": a.table, "kind": a.kind} for a in self.assumptions],
            "witness": self.witness,
            "reason": self.reason,
            "formula": self.formula,
            "where": self.where,
            "runs_on": self.runs_on,
            "alternatives": [{"mask": str(p.mask), "assumptions": [str(a) for a in p.assumptions]} for p in self.alternatives],
            "heads": None if self.heads is None else list(self.heads),
            "solver_seconds": self.solver_seconds,
            "cached": self.cached,
            "validated_cells": self.validated_cells,
        }


@dataclass(frozen=True)
class Report:
    """What Trilithon found in one exported program, and what it did.

    Attributes:
        model: name of the model's class.
        inputs: names of the inputs it was exported with.
        route: how it was captured; `failures` are the routes tried before.
        ranges: size symbol -> (lowest, highest or None).
        sizes: size symbol -> the axis that has it, e.g. "input_ids axis 1".
        sites: one entry an attention call, in graph order.
        passes: pass name -> number of places rewritten.
        seconds: stage -> seconds, see `StartUp`; in files written before, other stages.
        versions: package -> version.
        notes: anything else worth a line.
        warnings: what is likely wrong, such as a window that the configuration promises and the program lacks.
    """

    model: str
    inputs: tuple[str, ...]
    route: str
    sites: list[SiteReport]
    failures: tuple[str, ...] = ()
    ranges: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    sizes: dict[str, str] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def guards(self) -> tuple[Assumption, ...]:
        """What the run time checks before it takes the fast program."""
        found = {a: None for s in self.sites if s.verdict is Verdict.PROVED for a in s.assumptions if a.source == "guard"}
        return tuple(found)

    @property
    def start_up(self) -> StartUp:
        """How long each stage took."""
        return StartUp(self.seconds)

    def to_dict(self) -> ReportData:
        """Plain data, as `to_json` writes it."""
        return {
            "format": FORMAT,
            "model": self.model,
            "inputs": list(self.inputs),
            "route": self.route,
            "failures": list(self.failures),
            "ranges": {name: list(bounds) for name, bounds in self.ranges.items()},
            "sizes": self.sizes,
            "sites": [site.to_dict() for site in self.sites],
            "passes": self.passes,
            "seconds": self.seconds,
            "versions": self.versions,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }

    def to_json(self) -> str:
        """The report as JSON text, which `read_report` reads."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        from trilithon.report.text import report_text

        return report_text(self)

    def save(self, path: str | Path) -> Path:
        """Write the report: `.json` as data, `.html` as one self-contained page, anything else as text."""
        from trilithon.report.html import report_html

        path = Path(path)
        text = report_html(self) if path.suffix == ".html" else self.to_json() if path.suffix == ".json" else str(self)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path
