"""Turn what was examined into report entries."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata

import torch
from torch.export import ExportedProgram

from trilithon.capture.sites import Site
from trilithon.lower.native.attention import kernel_for
from trilithon.prove.program import Examined
from trilithon.prove.verdict import Verdict
from trilithon.report.report import SiteReport
from trilithon.rewrite.fuse_attention import SITE, why_not_canonical
from trilithon.rewrite.op import ATTENTION
from trilithon.rewrite.unlift import fake_inputs
from trilithon.spec.bias import Dense

KEPT = "SDPA with the mask as exported"


def site_report(examined: Examined, rewritten: Mapping[str, tuple[int, int]]) -> SiteReport:
    """The report entry of one site; `rewritten` as `canonical_heads` gives it."""
    site, finding = examined.site, examined.finding
    heads = rewritten.get(site.name) or _query_heads(site)
    if finding is None or examined.meaning is None:
        refusal = examined.refusal
        why = refusal.why if refusal is not None else "not examined"
        return SiteReport(
            name=site.name,
            kind=site.kind,
            verdict=Verdict.UNKNOWN,
            mask=None,
            assumptions=(),
            witness={},
            reason=why,
            where=str(site.where) if refusal is None else str(refusal.where or site.where),
            runs_on=KEPT,
            bias=Dense() if "bias" in why else None,
            heads=heads,
        )
    proof = finding.proof
    proved = proof.verdict is Verdict.PROVED
    obstacle = why_not_canonical(proof.mask, examined.meaning) if proved else None
    return SiteReport(
        name=site.name,
        kind=site.kind,
        verdict=proof.verdict,
        mask=proof.mask if proved else None,
        assumptions=proof.assumptions,
        witness=proof.witness,
        reason=proof.reason,
        formula=str(finding.formula),
        where=str(site.where),
        runs_on=(f"{KEPT} ({obstacle})" if obstacle else kernel_for(proof.mask)) if proved else KEPT,
        alternatives=finding.alternatives,
        heads=heads,
        solver_seconds=proof.solver_seconds,
    )


def canonical_heads(program: ExportedProgram) -> dict[str, tuple[int, int]]:
    """Site name -> query heads and key/value heads, of the sites that a rewritten program has as the canonical op."""
    found = {}
    for node in program.graph.nodes:
        if node.target is ATTENTION:
            q, k = (operand.meta["val"].shape[1] for operand in node.args[:2])
            if SITE in node.meta and isinstance(q, int) and isinstance(k, int):  # none in a program that came canonical
                found[node.meta[SITE]] = (q, k)
    return found


def _query_heads(site: Site) -> tuple[int, None] | None:
    """The key/value heads of a site as exported are not known: its K may hold repeated ones."""
    heads = site.dims[1]
    return (heads, None) if isinstance(heads, int) else None


def size_names(program: ExportedProgram) -> dict[str, str]:
    """Size symbol -> the first axis of an input that has it, e.g. "input_ids axis 1"."""
    named: dict[str, str] = {}
    for name, value in fake_inputs(program).items():
        for axis, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and str(size).isidentifier():
                named.setdefault(str(size), f"{name} axis {axis}")
    return named


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    packages = ("trilithon", "torch", "transformers", "z3-solver")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
