"""Plain data and back, and fingerprints: equal content, equal hash; other content, another hash."""

from __future__ import annotations

import json
import math
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch

from trilithon.prove.verdict import Proof, Verdict
from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.assumption import guard
from trilithon.spec.codec import canonical_names, decode, encode, fingerprint, readable_classes, rename
from trilithon.spec.masks import B, Causal, Documents, Formula, Full, H, K, Mask, Padding, Q, SlidingWindow
from trilithon.spec.term import Term

S, U = t.var("s70"), t.var("s7")
CLASSES = readable_classes(Proof, Verdict)


def entry(index: Term) -> Term:
    return t.read("position_ids", (B, index), "int")


BREAKS = t.ite((entry(t.counter(0)) - entry(t.counter(0) - 1)).eq(1), t.ZERO, t.ONE)
TERMS: dict[str, Term] = {
    "literal": t.TRUE,
    "variable": S,
    "sum": 3 * Q - 2 * K + S - 7,
    "comparison": K <= Q,
    "equality": (2 * Q - 3 * K).eq(5),
    "and_or_not": ((K <= Q) & H.eq(1)) | ~t.read("flags", (B, K), "bool"),
    "division": t.eq(t.floor_div(Q, t.integer(4)), t.floor_div(K, t.integer(4))) | t.mod(Q, S).eq(0),
    "product": Q * S <= K,
    "prefix_sum": t.eq(t.prefix_sum(BREAKS, Q), t.prefix_sum(BREAKS, K)),
    "ite": t.ite(K <= Q, entry(Q), entry(K)).eq(S),
    "float": float_term.compare("le", float_term.to_float(entry(Q), "float32"), t.real(0.1)),
    "infinite": t.ite(K <= Q, t.real(0.0), t.real(-math.inf)),
    "number": t.read("size:s70**3", (), "int").eq(S),
}
VALUES: dict[str, Any] = {
    "mask": SlidingWindow(4, "lower_right"),
    "and": Causal() & Padding("attention_mask") & SlidingWindow(3),
    "documents": Documents(t.prefix_sum(BREAKS, Q)),
    "formula": Formula(TERMS["and_or_not"]),
    "proof": Proof(Full(), Verdict.REFUTED, (guard("x", "all_ones"),), {"b": 0, "s": 3}, "not full", 0.1),
    "plain": ("text", 1, True, None, 0.1, -math.inf, ()),
}


@pytest.mark.parametrize("name", TERMS)
def test_a_term_survives(name: str) -> None:
    assert decode(json.loads(json.dumps(encode(TERMS[name]))), {}) is TERMS[name]


@pytest.mark.parametrize("name", VALUES)
def test_a_value_survives(name: str) -> None:
    back = decode(json.loads(json.dumps(encode(VALUES[name]))), CLASSES)
    assert back == VALUES[name]
    assert type(back) is type(VALUES[name])


def test_every_mask_can_be_read() -> None:
    def family(base: type) -> set[type]:
        return {base}.union(*(family(sub) for sub in base.__subclasses__() if sub.__module__.startswith("trilithon.")))

    assert family(Mask) <= set(CLASSES.values())


def test_other_classes_are_refused() -> None:
    class Foreign(Mask):
        pass

    assert Foreign not in readable_classes().values()
    for data in (
        {"class": "Path", "fields": {}},
        {"class": "Causal", "fields": {"algin": "upper_left"}},
        {"enum": "Verdict"},
        {},
    ):
        with pytest.raises((KeyError, TypeError)):
            decode(data, CLASSES)
    for data in ({"term": []}, {"term": [["sum", "int", [[], 0]]]}, {"term": [["exec", "int", ["1"]]]}, {"term": 3}):
        with pytest.raises((ValueError, TypeError, IndexError)):
            decode(data, CLASSES)
    for value in (torch.zeros(2), object(), {1: 2}, [1]):
        with pytest.raises(TypeError, match="no plain form"):
            encode(value)


def test_a_deep_term_that_shares_its_parts_stays_small() -> None:
    x = Q
    for n in range(200):
        x = t.ite(K <= n, x + K * x, x * x + n)
    assert len(json.dumps(encode(x))) < 200_000
    assert decode(encode(x), {}) is x
    assert fingerprint(x, {}) == fingerprint(decode(encode(x), {}), {})


ORDERS = ("q k s b", "s k q b", "b k s q", "k b q s")


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_creation_does_not_matter(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a term stand in the order in which they were made; the fingerprint does not tell."""
    literals = {key: x for key, x in t._interned.items() if x.is_literal}
    prints = []
    for names in (ORDERS[0], order):
        monkeypatch.setattr(t, "_interned", WeakValueDictionary(literals))
        made = {name: t.var(name) for name in names.split()}
        q, k, s, b = (made[name] for name in "qksb")
        late = [k > q - 4, k <= q] if order == names else [k <= q, k > q - 4]
        other = (k * q).eq(s) | t.eq(3 * k, 2 * s - q) | (q - k).eq(b)
        prints.append(fingerprint(t.conj(*late, other, t.read("x", (k + s - q,), "bool")), {}))
    assert prints[0] == prints[1]


def test_other_content_has_another_fingerprint() -> None:
    values: list[Any] = [
        *TERMS.values(),
        *VALUES.values(),
        K < Q,
        Q <= K,
        Q - K,
        K - Q,
        (Q - K).eq(1),
        (K - Q).eq(1),
        t.read("flags", (K, B), "bool"),
        t.read("flags", (B, K), "bool"),
        t.read("flags", (B, K), "int"),
        t.read("flag", (B, K), "int"),
        t.floor_div(Q, K),
        t.floor_div(K, Q),
        t.ite(H.eq(0), Q, K),
        t.ite(H.eq(0), K, Q),
        1,
        1.0,
        "1",
        True,
        None,
        (),
        ((),),
        ("a", "b"),
        ("ab",),
        {"a": "b"},
        torch.zeros(2),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(2, 1),
        torch.tensor([0.0, -0.0]),
        torch.tensor([0.0, 1.0]),
        torch.tensor(0.0),
        torch.zeros(0),
        torch.zeros(2, dtype=torch.bfloat16),
        torch.zeros(4, dtype=torch.bool),
    ]
    seen = {fingerprint(value, {}) for value in values}
    assert len(seen) == len(values)


def test_tensors_are_known_by_content_not_by_layout() -> None:
    x = torch.arange(6).view(2, 3)
    assert fingerprint(x, {}) == fingerprint(x.t().contiguous().t(), {})
    assert fingerprint({"a": x, "b": 1}, {}) == fingerprint({"b": 1, "a": x.clone()}, {})


def test_what_has_no_fingerprint() -> None:
    with pytest.raises(TypeError, match="no fingerprint of a object"):
        fingerprint((1, object()), {})


def test_sizes_are_known_by_their_place() -> None:
    def question(a: Term, b: Term) -> tuple[Term, ...]:
        return (a, b, K <= Q + a - b)

    one, other = question(S, U), question(t.var("s3"), t.var("s99"))
    swapped = (S, U, K <= Q + U - S)
    key = [fingerprint(x, canonical_names(x)) for x in (one, other, swapped)]
    assert key[0] == key[1] != key[2]
    assert canonical_names(one) == {"s70": "$s0", "s7": "$s1"}
    assert canonical_names([t.var("u0"), S, t.var("steps"), t.var("q")]) == {"u0": "$u0", "s70": "$s1"}


def test_only_whole_words_are_renamed() -> None:
    assert rename("s7 <= s70, s700 xs7 s7_x u7 s07", {"s7": "$s0"}) == "$s0 <= s70, s700 xs7 s7_x u7 s07"
