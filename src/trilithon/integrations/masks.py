"""What the compilers of others are given: a graph whose attention calls have a flag where their mask was proved to be one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch.fx import GraphModule, Node

from trilithon.capture.program import GraphProgram
from trilithon.options import Options
from trilithon.passes import run_passes
from trilithon.prove.cache import default_cache
from trilithon.prove.program import Examined, examine_program, size_ranges
from trilithon.prove.verdict import Proof
from trilithon.report.build import site_report
from trilithon.report.report import Report, SiteReport
from trilithon.rewrite.drop_masks import DropMasks, droppable, guards, why_not_droppable
from trilithon.spec.masks import Causal
from trilithon.stages import stage

Objects = Callable[[Examined, Proof], str]


@dataclass(frozen=True)
class _Call:
    """An attention call, what was found of it, and the proof by which its mask goes, or why it stays."""

    node: Node
    examined: Examined
    proof: Proof | None
    why: str = ""


def drop_proved_masks(
    gm: GraphModule, program: GraphProgram, calls: Mapping[Node, Node], report: Report, options: Options, objects: Objects
) -> Report:
    """Prove the masks of a program, and change the graph that it is the program of, in place.

    Only proofs count that take nothing for granted but sizes: nobody would look at the values of inputs.

    Args:
        program: a functional form of the graph.
        calls: an attention call of the program -> the node of the graph that it is.
        report: what is known of the graph.
        objects: why a proof may not be used here, or "".
    """
    with stage("prove"):
        cache = default_cache() if options.proof_cache else None
        examined = examine_program(program, (), options.solver_seconds, cache)
    found = [_decide(calls[e.site.output], e, objects) for e in examined if e.site.output in calls]
    with stage("rewrite"):
        drop = DropMasks({call.node: call.proof.mask for call in found if call.proof is not None})
        outcomes = run_passes(gm, (drop,)) if drop.calls else {}
    return replace(
        report,
        ranges=size_ranges(program),
        sites=[_site(call) for call in found],
        passes={name: outcome.changed for name, outcome in outcomes.items()},
    )


def _decide(node: Node, examined: Examined, objects: Objects) -> _Call:
    proofs = droppable(examined)
    free = next((proof for proof in proofs if not guards(proof)), None)
    if free is not None:
        why = objects(examined, free)
        return _Call(node, examined, None if why else free, why)
    if proofs:
        assumed = ", ".join(a.text for a in guards(proofs[0]))
        return _Call(node, examined, None, f"{proofs[0].mask} only if {assumed}, which nobody checks")
    refused = examined.meaning and why_not_droppable(examined.site, examined.meaning)
    return _Call(node, examined, None, refused or "")


def _site(call: _Call) -> SiteReport:
    """A report's entry that says what becomes of the call."""
    site = site_report(call.examined, {})
    if call.proof is not None:
        flag = "is_causal=True" if call.proof.mask == Causal() else "no mask"
        return replace(site, mask=call.proof.mask, assumptions=call.proof.assumptions, runs_on=f"attention, {flag}")
    given = "its mask" if call.examined.site.mask is not None else "no mask to prove"
    return replace(site, runs_on=f"attention with {given}" + (f" ({call.why})" if call.why else ""))
