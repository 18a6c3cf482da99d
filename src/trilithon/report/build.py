"""Turn what was examined into report entries."""

from __future__ import annotations

import platform
from importlib import metadata

from trilithon.lower.native.attention import kernel_for
from trilithon.prove.program import Examined
from trilithon.prove.verdict import Verdict
from trilithon.report.report import SiteReport
from trilithon.rewrite.fuse_attention import why_not_canonical
from trilithon.spec.bias import Dense

KEPT = "SDPA with the mask as exported"


def site_report(examined: Examined) -> SiteReport:
    """The report entry of one site."""
    site, finding = examined.site, examined.finding
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
            heads=_heads(examined),
        )
    proof = finding.proof
    proved = proof.verdict is Verdict.PROVED
    obstacle = why_not_canonical(proof.mask) if proved else None
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
        heads=_heads(examined),
        solver_seconds=proof.solver_seconds,
    )


def _heads(examined: Examined) -> tuple[int, int] | None:
    q, k = examined.site.q.meta["val"].shape, examined.site.k.meta["val"].shape
    return (int(q[1]), int(k[1])) if isinstance(q[1], int) and isinstance(k[1], int) else None


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
