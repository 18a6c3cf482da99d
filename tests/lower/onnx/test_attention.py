"""Attention alone as ONNX, many calls in one model: ONNX Runtime against the canonical op, and against PyTorch's SDPA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import scaled_dot_product_attention as sdpa

from trilithon.capture.export import capture
from trilithon.lower.onnx.decompose import as_exported, canonical
from trilithon.lower.onnx.forms import form_of
from trilithon.lower.onnx.session import Session
from trilithon.lower.onnx.translate import lower_onnx, save, translate
from trilithon.rewrite.op import ATTENTION
from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.bias_text import write_bias
from trilithon.spec.masks import H, K, Q

Given = Mapping[str, Tensor]
Attend = Callable[..., Tensor]
SLOPE = write_bias(float_term.apply("mul", "float32", t.read("x", (H,), "float"), float_term.to_float(K, "float32")), ["x"])
NEAR = write_bias(t.read("x", (t.maximum(t.minimum(K - Q, t.integer(1)), t.integer(-2)) + 2,), "float"), ["x"])
TABLE = torch.tensor([0.5, -0.25, 0.125, 1.0])
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


@dataclass(frozen=True)
class Call:
    """One call of the canonical op; `other`: over keys of another number than queries."""

    mask: str
    other: bool = False
    bias: str = ""
    softcap: float = 0.0
    sinks: bool = False
    scale: float = 0.25

    def __call__(self, x: Given, attend: Attend = ATTENTION) -> Tensor:
        k, v, kept = (x["far_k"], x["far_v"], x["far_kept"]) if self.other else (x["k"], x["v"], x["kept"])
        tables = [TABLE.to(k)] if self.bias else None
        sinks = SINKS.to(k) if self.sinks else None
        key_mask = kept != 0 if "padding" in self.mask else None
        return attend(x["q"], k, v, self.mask, self.scale, None, key_mask, None, self.bias, tables, self.softcap, sinks)


MASKS = ("full", "causal", "window(3)", "local(1, 2)", "causal & chunked(4)", "padding(m)", "causal & padding(m)")
OTHERS = ("full", "causal", "window(3)", "causal & padding(m)")
CALLS = {
    **{mask: Call(mask, scale=0.3) for mask in MASKS},
    **{f"{mask}, other keys": Call(mask, other=True) for mask in OTHERS},
    "slopes": Call("causal", bias=SLOPE),
    "slopes, other keys": Call("padding(m)", other=True, bias=SLOPE),
    "bias, padded": Call("causal & padding(m)", bias=NEAR),
    "softcap": Call("causal", softcap=0.7),
    "softcap, padded": Call("window(3) & padding(m)", softcap=0.7),
    "sinks": Call("causal & padding(m)", sinks=True),
}


def as_is(q: str = "q", k: str = "k", v: str = "v", mask: Callable[[Given], Tensor] | None = None, **more: Any) -> Any:
    return lambda x, attend=sdpa: attend(x[q], x[k], x[v], None if mask is None else mask(x), **more)


LOWEST = torch.finfo(torch.float32).min
KEPT: dict[str, Callable[..., Tensor]] = {
    "bias of activations": as_is("k", mask=lambda x: x["q"].mean(-1)[:, :1, :, None] * x["k"][:, :1, None, :, 0]),
    "grouped, no mask": as_is(enable_gqa=True),
    "grouped, causal": as_is(is_causal=True, enable_gqa=True),
    "flag, other keys": as_is("k", "far_k", "far_v", is_causal=True),
    "rows without keys": as_is(
        "k", mask=lambda x: (x["kept"] != 0)[:, None, None, :].expand(-1, -1, x["k"].shape[2], -1).tril()
    ),
    "rows of -inf": as_is("k", mask=lambda x: torch.where(x["kept"] != 0, 0.0, -torch.inf).to(x["k"])[:, None, None, :]),
    "rows of the lowest number": as_is("k", mask=lambda x: (1.0 - x["kept"].to(x["k"])[:, None, None, :]) * LOWEST),
    "double": lambda x, attend=sdpa: attend(
        *(x["k"].double(), x["k"].double(), x["v"].double(), (x["kept"].double() - 1.0)[:, None, None, :])
    ),
    "two axes": as_is("k", mask=lambda x: torch.ones_like(x["q"][0, 0] @ x["k"][0, 0].mT).tril(1) > 0),
    "three axes": lambda x, attend=sdpa: attend(x["k"][:, 0], x["k"][:, 1], x["v"][:, 0], is_causal=True),
    "one head of queries": lambda x, attend=sdpa: attend(x["q"][:, :1], x["k"], x["v"]),
    "one batch of keys": lambda x, attend=sdpa: attend(x["k"], x["k"][:1], x["v"][:1]),
}
IN_ONNX: dict[str, Callable[..., Tensor]] = {  # the rest is these in other words
    name: (CALLS | KEPT)[name]
    for name in (
        "causal",
        "causal & chunked(4)",
        "causal & padding(m)",
        "full, other keys",
        "window(3), other keys",
        "slopes, other keys",
        "bias, padded",
        "softcap, padded",
        "sinks",
        "grouped, causal",
        "rows without keys",
        "rows of -inf",
        "two axes",
    )
}
SIZES = [(2, 5, 7, True), (1, 1, 3, False), (3, 9, 4, True)]  # rows, queries, other keys, and whether they are padded


class Many(nn.Module):
    def forward(self, q, k, v, far_k, far_v, kept, far_kept) -> tuple[Tensor, ...]:
        x = {"q": q, "k": k, "v": v, "far_k": far_k, "far_v": far_v, "kept": kept, "far_kept": far_kept}
        return tuple(call(x) for call in IN_ONNX.values())


def given(b: int, s: int, far: int, padded: bool = True) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(s)
    shapes = {"q": (4, s, 8), "k": (2, s, 8), "v": (2, s, 6), "far_k": (2, far, 8), "far_v": (2, far, 6)}
    made = {name: torch.randn(b, *shape, generator=make) for name, shape in shapes.items()}
    for name, n in (("kept", s), ("far_kept", far)):
        made[name] = torch.ones(b, n, dtype=torch.int64)
        if padded:
            made[name][0, : n // 2 + 1] = 0  # on the left: a causal row has no key
            made[name][-1] = 0  # no row has any
    return made


Made = tuple[Any, Session, nn.Module]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The ONNX model of all calls, a session of it, and the lowered program, which PyTorch runs."""
    example, b, s, far = given(2, 5, 7), *(Dim(n, min=1, max=99) for n in ("b", "s", "far"))
    shapes = {name: {0: b, x.dim() - 2 if x.dim() == 4 else 1: far if "far" in name else s} for name, x in example.items()}
    program = lower_onnx(capture(Many().eval(), example, shapes).program)
    made = translate(program, 23)
    (file,) = save(made, tmp_path_factory.mktemp("many") / "many.onnx", {})
    return made.model, Session(file, threads=1), program.module()


def forms(model: Any) -> Counter[str]:
    found: Counter[str] = Counter()
    for node in model.graph:
        if node.op_type == "Attention":
            masked = len(node.inputs) > 3 and node.inputs[3] is not None
            causal = node.attributes["is_causal"].value
            assert not (masked and causal)
            assert node.attributes["softcap"].value == 0.0
            found["is_causal" if causal else "mask" if masked else "no mask"] += 1
    return found


def test_forms(made: Made) -> None:
    """Softcap and sinks are written out."""
    assert forms(made[0]) == {"no mask": 1, "is_causal": 2, "mask": len(IN_ONNX) - 5}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_onnx_runtime(made: Made, sizes: tuple[int, int, int, bool]) -> None:
    x, (_, session, lowered) = given(*sizes), made
    for (name, call), mine, torched in zip(IN_ONNX.items(), session(x), lowered(**x), strict=True):
        want = call(x)
        assert mine.isfinite().all(), name
        for got in (mine, torched):
            assert (got - want).norm() <= 1e-6 * want.norm(), name


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", CALLS | KEPT)
def test_decompositions(name: str, sizes: tuple[int, int, int, bool]) -> None:
    call, x = (CALLS | KEPT)[name], given(*sizes)
    want, got = call(x), call(x, canonical if name in CALLS else as_exported)
    assert (got - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "mask"), (torch.float16, "decomposed")])
def test_a_bias_must_fit_the_type_of_q(dtype: torch.dtype, kind: str) -> None:
    """Slopes times positions lose digits in halves."""
    q = torch.empty(1, 4, 5, 8, dtype=dtype)
    empty = dict.fromkeys(("q_start", "key_mask", "k_positions", "sinks"))
    call = {"q": q, "k": q, "mask": "causal", "bias": SLOPE, "tables": [TABLE.to(dtype)], "softcap": 0.0, **empty}
    assert form_of(call).kind == kind
