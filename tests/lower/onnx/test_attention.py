"""Attention alone as ONNX, many calls in one model: ONNX Runtime against the canonical op, and against PyTorch's SDPA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import scaled_dot_product_attention as sdpa

from trilithon.capture.export import capture
from trilithon.lower.onnx.session import Session
from trilithon.lower.onnx.translate import lower_onnx, save, translate
from trilithon.rewrite.op import ATTENTION
from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.bias_text import write_bias
from trilithon.spec.masks import H, K, Q

Given = Mapping[str, Tensor]
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

    def __call__(self, x: Given) -> Tensor:
        k, v, kept = (x["far_k"], x["far_v"], x["far_kept"]) if self.other else (x["k"], x["v"], x["kept"])
        tables = [TABLE.to(k)] if self.bias else None
        sinks = SINKS.to(k) if self.sinks else None
        key_mask = kept != 0 if "padding" in self.mask else None
        return ATTENTION(x["q"], k, v, self.mask, self.scale, None, key_mask, None, self.bias, tables, self.softcap, sinks)


MASKS = ("full", "causal", "window(3)", "local(1, 2)", "causal & chunked(4)", "padding(m)", "causal & padding(m)")
OTHERS = ("full", "causal", "window(3)", "causal & padding(m)")
CALLS = {
    **{mask: Call(mask) for mask in MASKS},
    **{f"{mask}, other keys": Call(mask, other=True) for mask in OTHERS},
    "slopes": Call("causal", bias=SLOPE),
    "slopes, other keys": Call("padding(m)", other=True, bias=SLOPE),
    "bias of distance": Call("full", bias=NEAR),
    "bias, padded": Call("causal & padding(m)", bias=NEAR),
    "softcap": Call("causal", softcap=0.7),
    "softcap, padded": Call("window(3) & padding(m)", softcap=0.7),
    "sinks": Call("causal & padding(m)", sinks=True),
    "odd scale": Call("causal", scale=0.3),
}


def as_is(q: str = "q", k: str = "k", v: str = "v", mask: Callable[[Given], Tensor] | None = None, **more: Any) -> Any:
    return lambda x: sdpa(x[q], x[k], x[v], None if mask is None else mask(x), **more)


KEPT: dict[str, Callable[[Given], Tensor]] = {
    "bias of activations": as_is("k", mask=lambda x: x["q"].mean(-1)[:, :1, :, None] * x["k"][:, :1, None, :, 0]),
    "grouped, no mask": as_is(enable_gqa=True),
    "grouped, causal": as_is(is_causal=True, enable_gqa=True),
    "causal, other keys": as_is("k", "far_k", "far_v", is_causal=True),
    "rows without keys": as_is(
        "k", mask=lambda x: (x["kept"] != 0)[:, None, None, :].expand(-1, -1, x["k"].shape[2], -1).tril()
    ),
    "rows of -inf": as_is("k", mask=lambda x: torch.where(x["kept"] != 0, 0.0, -torch.inf).to(x["k"])[:, None, None, :]),
    "rows of the lowest number": as_is(
        "k", mask=lambda x: (1.0 - x["kept"].to(x["k"])[:, None, None, :]) * torch.finfo(x["k"].dtype).min
    ),
    "one head of queries": lambda x: sdpa(x["q"][:, :1], x["k"], x["v"]),
    "two axes": as_is("k", mask=lambda x: torch.ones_like(x["q"][0, 0] @ x["k"][0, 0].mT).tril(1) > 0),
    "three axes": lambda x: sdpa(x["k"][:, 0], x["k"][:, 1], x["v"][:, 0], is_causal=True),
    "one batch of keys": lambda x: sdpa(x["k"], x["k"][:1], x["v"][:1]),
}


class Many(nn.Module):
    def __init__(self, calls: Mapping[str, Callable[[Given], Tensor]]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, q, k, v, far_k, far_v, kept, far_kept) -> tuple[Tensor, ...]:
        x = {"q": q, "k": k, "v": v, "far_k": far_k, "far_v": far_v, "kept": kept, "far_kept": far_kept}
        return tuple(call(x) for call in self.calls.values())


def given(b: int, s: int, far: int, dtype: torch.dtype, padded: bool = True) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(s)
    shapes = {"q": (4, s, 8), "k": (2, s, 8), "v": (2, s, 6), "far_k": (2, far, 8), "far_v": (2, far, 6)}
    made = {name: torch.randn(b, *shape, generator=make).to(dtype) for name, shape in shapes.items()}
    for name, n in (("kept", s), ("far_kept", far)):
        made[name] = torch.ones(b, n, dtype=torch.int64)
        if padded:
            made[name][0, : n // 2 + 1] = 0  # on the left: a causal row has no key
            made[name][-1] = 0  # no row has any
    return made


def exported(calls: Mapping[str, Any], dtype: torch.dtype, folder: Path) -> tuple[Any, Session, nn.Module]:
    """The ONNX model of all calls, a session of it, and the lowered program, which PyTorch runs."""
    example, b, s, far = given(2, 5, 7, dtype), *(Dim(n, min=1, max=99) for n in ("b", "s", "far"))
    shapes = {name: {0: b, x.dim() - 2 if x.dim() == 4 else 1: far if "far" in name else s} for name, x in example.items()}
    program = lower_onnx(capture(Many(calls).eval(), example, shapes).program)
    made = translate(program, 23)
    return made.model, Session(save(made, folder / "many.onnx", {})[0], threads=1), program.module()


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


FEW = ("causal", "odd scale", "causal & padding(m)", "slopes")
ROWS = {
    torch.float32: (1e-6, tuple(CALLS), {"no mask": 2, "is_causal": 2, "mask": len(CALLS) - 7}),
    torch.float64: (1e-7, FEW, {"is_causal": 2, "mask": 2}),  # the scale is a float32
    torch.float16: (2e-3, FEW, {"is_causal": 2, "mask": 1}),  # slopes times positions lose digits
}


@pytest.mark.parametrize("dtype", ROWS, ids=str)
def test_the_canonical_op(dtype: torch.dtype, tmp_path: Path) -> None:
    close, names, expected = ROWS[dtype]
    model, session, lowered = exported({name: CALLS[name] for name in names}, dtype, tmp_path)
    assert forms(model) == expected
    precise = [n.attributes["softmax_precision"].value for n in model.graph if "softmax_precision" in n.attributes]
    assert precise == ([1] * sum(expected.values()) if dtype == torch.float16 else []), "softmax in float32"
    for b, s, far, padded in ((2, 5, 7, True), (1, 1, 3, False), (3, 9, 4, True)):
        x = given(b, s, far, dtype, padded)
        for name, mine, torched in zip(names, session(x), lowered(**x), strict=True):
            want = CALLS[name](x)
            assert mine.isfinite().all(), name
            for got in (mine, torched):
                assert (got - want).norm() <= close * want.norm(), f"{name} at {b, s, far}"


def test_sdpa_that_was_not_rewritten(tmp_path: Path) -> None:
    model, session, _ = exported(KEPT, torch.float32, tmp_path)
    assert forms(model) == {"mask": 6, "no mask": 1, "is_causal": 1}
    for b, s, far in ((2, 5, 7), (3, 4, 9)):
        x = given(b, s, far, torch.float32)
        for name, mine in zip(KEPT, session(x), strict=True):
            want = KEPT[name](x)
            assert (mine - want).norm() <= 1e-6 * want.norm(), f"{name} at {b, s, far}"
