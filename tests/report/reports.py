"""Reports made by hand, for the tests of their text, page, JSON and diff."""

from __future__ import annotations

from dataclasses import replace

from trilithon.prove.verdict import Proof, Verdict
from trilithon.report.report import Lifted, Report, SiteReport
from trilithon.spec import term as t
from trilithon.spec.assumption import Assumption, guard, position_ids
from trilithon.spec.masks import B, Causal, Documents, Formula, H, K, Padding, Q

CONSECUTIVE = guard("position_ids", "consecutive")
RANGE = Assumption("s0", "range", "export range", "s0 <= 1024")
DOCUMENTS = Causal() & Documents(t.read("position_ids", (B, Q), "int"))
ONE_CELL = (K <= Q) & ~(Q.eq(40) & K.eq(3))
ONE_HEAD = (K <= Q) & (~H.eq(2) | (K > Q - 4))
SIZE = t.var("s0")


def proved(layer: int, node: int = 0, **changes: object) -> SiteReport:
    fields: dict[str, object] = {
        "name": f"model.layers.{layer}.self_attn",
        "kind": "sdpa",
        "verdict": Verdict.PROVED,
        "mask": Causal(),
        "assumptions": (CONSECUTIVE, RANGE),
        "witness": {},
        "reason": "proved equal to causal at every index and size",
        "formula": "k <= q",
        "where": f"modeling_llama.py:257, `attn_output = attention(q < k)`  (node sdpa_{node})",
        "runs_on": "SDPA, is_causal=True",
        "alternatives": (Proof(DOCUMENTS, Verdict.PROVED, (guard("position_ids", "bounded"),), solver_seconds=0.1 * node),),
        "solver_seconds": 0.01 * node,
    }
    return SiteReport(**{**fields, **changes})  # type: ignore[arg-type]


def refuted(name: str = "encoder.0") -> SiteReport:
    return SiteReport(
        name=name,
        kind="sdpa",
        verdict=Verdict.REFUTED,
        mask=None,
        assumptions=(),
        witness={"b": 0, "h": 0, "q": 40, "k": 3, "s": 41, "t": 41},
        reason="not causal: the mask blocks what causal allows",
        formula=f"{ONE_CELL} <script>",
        where="model.py:7, `x < y & z`  (node sdpa)",
        runs_on="SDPA with the mask as exported",
        nearest=Causal(),
        lifted=Lifted(ONE_CELL, (SIZE, SIZE)),
    )


def refused(name: str = "encoder.1") -> SiteReport:
    return SiteReport(
        name=name,
        kind="sdpa",
        verdict=Verdict.UNKNOWN,
        mask=None,
        assumptions=(),
        witness={},
        reason="aten.bucketize.Tensor has no handler",
        where="model.py:9, `torch.bucketize(x)`",
        runs_on="SDPA with the mask as exported",
    )


def formula() -> SiteReport:
    """A mask without a name, whose third head differs, with all that can be done to scores."""
    return replace(
        proved(0, alternatives=(), assumptions=(), mask=Formula(ONE_HEAD), formula=str(ONE_HEAD), runs_on="kernel"),
        name="decoder.7",
        witness={"b": 0, "h": 2, "q": 4, "k": 0, "s": 5, "t": 5},
        nearest=Causal(),
        reason="not causal: at b=0 h=2 q=4 k=0 s=5 t=5 the mask blocks what causal allows",
        heads=(8, 2),
        softcap=50.0,
        sinks=True,
        validated_cells=12345,
        cached=True,
    )


def report(*sites: SiteReport, **changes: object) -> Report:
    fields: dict[str, object] = {
        "model": "Tiny<Model>",
        "inputs": ("input_ids", "position_ids"),
        "route": "torch.export, non-strict",
        "failures": ("torch.export, strict: RuntimeError: no",),
        "ranges": {"s0": (1, 1024), "s1": (2, None)},
        "sizes": {"s0": "input_ids axis 1"},
        "passes": {"fuse-attention": 2, "relax-views": 0},
        "seconds": {"export": 1.234, "prove": 0.5},
        "versions": {"torch": "9.9"},
        "notes": ("backend: native",),
    }
    return Report(sites=list(sites), **{**fields, **changes})  # type: ignore[arg-type]


EVERYTHING = report(
    *(proved(layer, node=layer) for layer in range(3)),
    proved(3, mask=Padding(), assumptions=(position_ids.all_ones(),), alternatives=()),
    refuted(),
    refused(),
    formula(),
    warnings=("the configuration promises a window of 4096 keys, and no mask has one",),
)
