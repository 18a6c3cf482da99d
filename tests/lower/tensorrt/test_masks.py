"""Masks inside a network: every term against its evaluation with torch, and what is shared between sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from trilithon.errors import CannotLower
from trilithon.lower.tensorrt.interpret import interpret
from trilithon.lower.tensorrt.masks import Scores, emit_mask, emit_term
from trilithon.lower.tensorrt.network import ITensor, Network, is_tensor
from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.evaluate import evaluate
from trilithon.spec.mask import B, H, K, Q, S, T
from trilithon.spec.masks import Causal, Documents, Formula, Padding, PrefixLM, SlidingWindow, parse
from trilithon.spec.term import Term

SIZES = ((2, 4, 9, 12), (1, 4, 1, 3))  # b h s t
READ = t.read("table", (B, K), "int")
TERMS: dict[str, Term] = {
    "causal": K <= Q,
    "strictly causal": K < Q,
    "window": (K <= Q) & (K > Q - 4),
    "anti-causal": Q <= K,
    "lower right": K <= Q + T - S,
    "sizes alone": (S + 3 <= T) | (K <= Q),
    "equal": Q.eq(K + 2),
    "scaled": 3 * K <= 2 * Q + 5,
    "product": Q * K <= 20,
    "chunks": t.floor_div(Q, t.integer(4)).eq(t.floor_div(K, t.integer(4))),
    "dilated": t.mod(Q - K, t.integer(3)).eq(0),
    "choice": t.ite(Q <= 3, K + 1, K * 2) <= Q,
    "not": ~(K.eq(Q)) & ~(READ.eq(0)),
    "heads": K * (H + 1) <= Q * 2,
    "rows": K + B <= Q,
    "table": READ.eq(1),
    "both ends of a table": t.read("table", (B, Q), "int").eq(READ),
    "truth table": t.read("truth", (K,), "bool"),
    "clamped": t.ite(Q <= 0, t.ZERO, t.read("table", (B, Q - 1), "int")).eq(READ),
    "prefix": PrefixLM(t.integer(3)).term(),
    "documents": Documents(t.prefix_sum(t.read("table", (B, t.counter(0)), "int"), Q)).term(),
    "always": (K >= 0) | (K < 0),
}


HALF_STEPS = float_term.apply("mul", "bfloat16", float_term.to_float(K, "bfloat16"), t.real(0.2001953125))
DISTANCE = float_term.to_float(t.maximum(Q - K, t.ZERO) + 1, "float32")
LOGARITHM = float_term.function("log", "float32", DISTANCE)
SLOPE = float_term.function("pow", "float32", t.real(0.25), float_term.to_float(H + 1, "float32"))
FLOATS: dict[str, Term] = {
    "alibi": float_term.apply("mul", "float32", SLOPE, float_term.to_float(K - Q, "float32")),
    "in halves": float_term.cast(HALF_STEPS, "float32"),
    "a table of numbers": t.read("numbers", (t.minimum(K, t.integer(2)),), "float"),
    "buckets": t.read("numbers", (float_term.to_int(LOGARITHM),), "float"),
    "cases": t.ite(K <= Q, float_term.to_float(K, "float32"), t.real(-0.5)),
    "numbers by cases": t.ite(K <= Q, t.real(0.25), t.real(-0.5)),
    "smaller": float_term.apply("min", "float32", LOGARITHM, t.real(1.5)),
    "quotient": float_term.apply("div", "float32", float_term.to_float(3 * K - 20, "float32"), t.real(7.0)),
    "cut off": float_term.to_float(float_term.to_int(float_term.apply("div", "float32", DISTANCE, t.real(-3.0))), "float32"),
}


def data(b: int, s: int, tokens: int) -> dict[str, Tensor]:
    long = max(s, tokens)
    return {"table": torch.randint(0, 3, (b, long)), "truth": torch.rand(long) < 0.5, "numbers": torch.randn(5)}


@dataclass
class Bench:
    """A network with the inputs that masks read."""

    sizes: tuple[int, ...]
    dynamic: bool

    def __post_init__(self) -> None:
        self.net = Network()
        b, h, s, tokens = self.sizes
        shape = (b, h, -1, -1) if self.dynamic else self.sizes
        scores = self.net.input("scores", torch.float32, shape)
        self.scores = Scores(tuple(self.net.sizes(scores)), tuple(map(str, shape)))
        self.data = {"scores": torch.zeros(self.sizes), **data(b, s, tokens)}
        self.tables: Mapping[str, ITensor] = {
            name: self.net.input(name, x.dtype, [-1 if self.dynamic and n not in (b, 1) else n for n in x.shape])
            for name, x in self.data.items()
            if name != "scores"
        }

    def value(self, tensor: ITensor, **more: Tensor) -> Tensor:
        self.net.output(tensor, "o")
        held = {self.net.definition.get_input(i).name for i in range(self.net.definition.num_inputs)}
        return interpret(self.net, {name: x for name, x in {**self.data, **more}.items() if name in held})["o"]

    def meant(self, term: Term, start: Tensor | None = None) -> Tensor:
        env: dict[str, Tensor | int] = dict(zip("st", self.sizes[2:], strict=True))
        for axis, (name, size) in enumerate(zip("bhqk", self.sizes, strict=True)):
            env[name] = torch.arange(size).view([-1 if i == axis else 1 for i in range(4)])
        env["q"] = env["q"] + (0 if start is None else start.view(-1, 1, 1, 1))
        return evaluate(term, env, {name: x for name, x in self.data.items() if name != "scores"})


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", TERMS)
def test_a_term_means_what_torch_says(name: str, dynamic: bool) -> None:
    torch.manual_seed(0)
    for sizes in SIZES:
        bench, term = Bench(sizes, dynamic), TERMS[name]
        emitted = emit_term(bench.net, term, bench.scores, None, bench.tables)
        exact = bench.meant(term).expand(sizes)
        if not is_tensor(emitted):
            assert bool((exact == emitted).all())
        else:
            assert torch.equal(bench.value(emitted).expand(sizes), exact), f"{name} at {sizes}"


@pytest.mark.parametrize("name", FLOATS)
def test_a_bias_is_computed_step_by_step(name: str) -> None:
    torch.manual_seed(0)
    for start in (None, torch.tensor([2, 0])):
        bench = Bench(SIZES[0], dynamic=True)
        given = None if start is None else bench.net.input("start", torch.int64, (2,))
        emitted = emit_term(bench.net, FLOATS[name], bench.scores, given, bench.tables)
        exact = bench.meant(FLOATS[name], start).float().expand(SIZES[0])
        got = bench.value(emitted, **({} if start is None else {"start": start}))
        torch.testing.assert_close(got.float().expand(SIZES[0]), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("start", [torch.tensor(5), torch.tensor([0, 7])], ids=["one start", "a start a row"])
def test_queries_behind_a_start(start: Tensor) -> None:
    torch.manual_seed(0)
    bench = Bench(SIZES[0], dynamic=True)
    keys = torch.rand(2, 12) < 0.6
    given = bench.net.input("start", torch.int64, tuple(start.shape))
    mask = parse("padding(keys) & window(4)")
    emitted = emit_mask(bench.net, mask, bench.scores, given, bench.net.input("keys", torch.bool, (2, 12)))
    exact = bench.meant(SlidingWindow(4).term(), start) & keys[:, None, None, :]
    got = bench.value(emitted, start=start, keys=keys)
    assert torch.equal(got.expand(SIZES[0]), exact.expand(SIZES[0]))
    assert not torch.equal(got.expand(SIZES[0]), (bench.meant(SlidingWindow(5).term(), start) & keys[:, None, None, :]))


def test_masks_are_shared() -> None:
    bench = Bench(SIZES[0], dynamic=True)
    net, keys = bench.net, bench.net.input("keys", torch.bool, (2, 12))
    padded = parse("causal & padding(keys)")
    first = emit_mask(net, padded, bench.scores, None, keys)
    layers = net.definition.num_layers
    assert emit_mask(net, padded, bench.scores, None, keys) is first and net.definition.num_layers == layers
    other = Scores(bench.scores.sizes, ("2", "4", "9", "12"))
    distinct = [
        emit_mask(net, padded, bench.scores, None, keys, use="rows"),
        emit_mask(net, padded, other, None, keys),
        emit_mask(net, Causal(), bench.scores),
        emit_mask(net, padded, bench.scores, None, net.input("others", torch.bool, (2, 12))),
        emit_mask(net, SlidingWindow(3), bench.scores),
    ]
    names = {x.name for x in (first, *distinct)}
    assert len(names) == 6


def test_a_mask_is_made_of_indices() -> None:
    """No constant of more than one number for each axis: from that the builder reads no bounds."""
    bench = Bench((2, 4, 9, 12), dynamic=False)
    emit_mask(bench.net, SlidingWindow(3), bench.scores)
    assert max(x.numel() for x in bench.net.data.values()) <= 4
    kinds = [bench.net.definition.get_layer(i).type.name for i in range(bench.net.definition.num_layers)]
    assert kinds.count("FILL") == 2


def test_full_and_empty() -> None:
    bench = Bench((2, 4, 9, 12), dynamic=False)
    assert emit_mask(bench.net, parse("full"), bench.scores) is None
    nothing = emit_mask(bench.net, Formula(S > T), bench.scores)
    assert not bool(bench.value(nothing).any())


REFUSED = {
    "no key mask": (Padding("keys"), "needs a key mask"),
    "unknown table": (Formula(t.read("elsewhere", (K,), "bool")), "reads elsewhere"),
    "a sum to elsewhere": (Formula(t.prefix_sum(READ, Q + 1).eq(1)), "run up to"),
    "a sum over pairs": (Formula(t.prefix_sum(t.read("table", (Q, t.counter(0)), "int"), K).eq(1)), "run up to"),
    "wide numbers": (Formula(float_term.to_int(float_term.to_float(K, "float64")).eq(1)), "float64"),
    "compared floats": (Formula(t.make("float_compare", ("le", t.real(1.0), t.real(2.0)), "bool")), "float_compare"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(case: tuple[Formula, str]) -> None:
    mask, why = case
    bench = Bench((2, 4, 9, 12), dynamic=False)
    with pytest.raises(CannotLower, match=why):
        emit_mask(bench.net, mask, bench.scores, tables=bench.tables)
