"""Turn what was examined into report entries."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.export import ExportedProgram

from trilithon.capture.sites import Site
from trilithon.errors import CannotLift
from trilithon.lift.meaning import Meaning
from trilithon.lower.native.attention import kernel_for
from trilithon.prove.program import Examined
from trilithon.prove.prove import Finding
from trilithon.prove.verdict import Proof, Verdict
from trilithon.report.report import Lifted, SiteReport
from trilithon.rewrite.fuse_attention import SITE, why_not_canonical
from trilithon.rewrite.op import ATTENTION
from trilithon.rewrite.unlift import fake_inputs
from trilithon.spec.float_term import fits
from trilithon.spec.position_bias import NOTHING

KEPT, KEPT_DECOMPOSED = "SDPA with the mask as exported", "matmul-softmax-matmul as exported"


def site_report(examined: Examined, rewritten: Mapping[str, tuple[int, int]]) -> SiteReport:
    """The report entry of one site; `rewritten` as `canonical_heads` gives it."""
    site, finding, meaning, validated = examined.site, examined.finding, examined.meaning, examined.validated
    heads = rewritten.get(site.name) or _query_heads(site)
    if finding is None or meaning is None:
        return _refused(site, examined.refusal, heads)
    proof = finding.proof
    proved = proof.verdict is Verdict.PROVED
    refuted = _nearest(finding)
    return SiteReport(
        name=site.name,
        kind=site.kind,
        verdict=proof.verdict,
        mask=proof.mask if proved else None,
        assumptions=proof.assumptions,
        witness=proof.witness if refuted is None else refuted.witness,
        reason=proof.reason if refuted is None else refuted.reason,
        formula=str(finding.formula),
        where=str(site.where),
        runs_on=_runs_on(examined, meaning) if proved else _kept(site),
        alternatives=finding.alternatives,
        heads=heads,
        bias=meaning.bias,
        softcap=meaning.softcap,
        sinks=meaning.sinks,
        solver_seconds=proof.solver_seconds,
        cached=examined.cached,
        validated_cells=validated.cells if validated is not None and validated.cells else None,
        nearest=None if refuted is None else refuted.mask,
        lifted=Lifted(finding.formula, meaning.dims[2:], meaning.constants),
    )


def _refused(site: Site, refusal: CannotLift | None, heads: tuple[int, int | None] | None) -> SiteReport:
    return SiteReport(
        name=site.name,
        kind=site.kind,
        verdict=Verdict.UNKNOWN,
        mask=None,
        assumptions=(),
        witness={},
        reason="not examined" if refusal is None else refusal.why,
        where=str(site.where) if refusal is None else str(refusal.where or site.where),
        runs_on=_kept(site),
        heads=heads,
    )


def _runs_on(examined: Examined, meaning: Meaning) -> str:
    """What a site runs on that was proved."""
    assert examined.proof is not None
    obstacle = why_not_canonical(examined)
    if obstacle is not None:
        return f"{_kept(examined.site)} ({obstacle})"
    bias, q = meaning.position_bias, examined.site.q
    parts = {"bias": bias not in (None, NOTHING), "softcap": meaning.softcap is not None, "sinks": meaning.sinks}
    own = {n.name: n.meta["val"] for n in q.graph.nodes if n.op == "placeholder" and n.name in meaning.own}
    dtypes = {name: value.dtype for name, value in own.items()}
    is_narrow = bias is None or fits(bias, dtypes, q.meta["val"].dtype)
    return kernel_for(examined.proof.mask, [name for name, has in parts.items() if has], fits=is_narrow)


def _kept(site: Site) -> str:
    """What a site runs on that is not rewritten."""
    return KEPT_DECOMPOSED if site.kind == "decomposed" else KEPT


def _nearest(finding: Finding) -> Proof | None:
    """The refuted claim that the mask is the named one nearest to it."""
    return next((p for p in (finding.proof, finding.nearest) if p is not None and p.verdict is Verdict.REFUTED), None)


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
