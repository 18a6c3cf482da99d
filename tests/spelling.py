"""Random masks as torch code: strategies of source text, in which equal things are spelled in many ways.

In scope are `s` (tokens), `b` (batch rows), the tables by name `[b s]`, `torch` and `F`. Text is what a failure prints,
and what it takes to run one again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from batch import TABLES

Source = st.SearchStrategy[str]
LOWEST = torch.finfo(torch.float32).min


def run(source: str) -> Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]:
    """The mask function that a text is."""
    code = compile(source, source, "eval")

    def make(q: Tensor, k: Tensor, x: dict[str, Tensor]) -> Tensor:
        scope = {"torch": torch, "F": F, "s": q.shape[0], "b": x["segments"].shape[0], "LOWEST": LOWEST, **x}
        mask: Tensor = eval(code, scope)
        return mask

    return make


def spelled(templates: Sequence[str], *parts: Source) -> Source:
    """One of the templates, with `{0}`, `{1}`, .. filled in."""
    return st.builds(lambda template, *texts: template.format(*texts), st.sampled_from(list(templates)), *parts)


# 0, 1, 2, .. along one axis
COUNTS = (
    "torch.arange(s)",
    "torch.arange(s, dtype=torch.int32)",
    "(torch.ones(s, dtype=torch.int64).cumsum(0) - 1)",
    "(torch.arange(1, s + 1) - 1)",
    "torch.arange(s - 1, -1, -1).flip(0)",
    "(s - 1 - torch.arange(s).flip(0))",
    "(torch.arange(0, 2 * s, 2) // 2)",
    "torch.arange(2 * s)[s:].sub(s)",
    "torch.arange(2 * s)[:s]",
    "(torch.arange(3 * s)[::3] // 3)",
    "torch.cat([torch.zeros(2, dtype=torch.int64), torch.arange(s)])[2:]",
    "torch.cat([torch.arange(s), torch.arange(3)])[:s]",
    "torch.stack([torch.arange(s), torch.zeros(s, dtype=torch.int64)])[0]",
    "F.pad(torch.arange(s), (2, 1))[2:-1]",
    "torch.arange(s).roll(1, 0).roll(-1, 0)",
    "torch.arange(s).repeat(2)[-s:]",
    "torch.arange(s).repeat_interleave(2)[1::2]",
    "torch.arange(s)[torch.arange(s)]",
    "torch.arange(s)[torch.arange(s) - s]",
    "torch.arange(s).gather(0, torch.arange(s))",
    "torch.arange(s).index_select(0, torch.arange(s))",
    "torch.arange(s).view(1, s).expand(b, s)[0]",
    "torch.where(torch.ones(s) > 0, torch.arange(s), 7)",
    "torch.ones(s, s, dtype=torch.int64).tril(-1).sum(-1)",
    "(torch.eye(s, dtype=torch.int64) * torch.arange(s)).sum(0)",
    "torch.arange(s + 1).diff().cumsum(-1).sub(1)",
    "torch.arange(s).clamp(min=0)",
    "torch.arange(s).maximum(torch.zeros_like(torch.arange(s)))",
)
TO_QUERIES = (
    "{0}[:, None]",
    "{0}.view(-1, 1)",
    "{0}.unsqueeze(-1)",
    "{0}.reshape(s, 1)",
    "{0}[None].t()",
    "{0}.expand(s, s).t()",
)
TO_KEYS = ("{0}[None]", "{0}.view(1, -1)", "{0}.unsqueeze(0)", "{0}.expand(s, s)", "{0}[None, None].squeeze(0)")
ROWS_TO_QUERIES = (
    "{0}[:, None, :, None]",
    "{0}.view(b, 1, s, 1)",
    "{0}.unsqueeze(1).unsqueeze(-1)",
    "{0}[:, None, None].transpose(-1, -2)",
    "{0}[:, None, :, None].expand(b, 2, s, s)",
    "{0}.flip(-1)[:, None, :, None].flip(2)",
)
ROWS_TO_KEYS = (
    "{0}[:, None, None]",
    "{0}.view(b, 1, 1, s)",
    "{0}.unsqueeze(1).unsqueeze(1)",
    "{0}[:, None].expand(b, s, s).unsqueeze(1)",
    "{0}[:, None, :, None].permute(0, 1, 3, 2)",
    "{0}[:, torch.arange(s)][:, None, None]",
    "{0}.gather(-1, torch.arange(s).expand(b, s))[:, None, None]",
)
INTEGERS = spelled(
    ("{0}", "{0}.clamp(-9, 9)", "{0}.clamp(-9, 9).int()", "({0} % 3)"),
    st.sampled_from([name for name, dtype in TABLES.items() if dtype == torch.int64]),
)
FLAGS = spelled(
    ("visible", "(attention_mask != 0)", "attention_mask.bool()", "attention_mask.to(torch.bool)", "(attention_mask > 0)")
)

queries = st.one_of(spelled(TO_QUERIES, st.sampled_from(COUNTS)), spelled(ROWS_TO_QUERIES, INTEGERS))
keys = st.one_of(spelled(TO_KEYS, st.sampled_from(COUNTS)), spelled(ROWS_TO_KEYS, INTEGERS))
small, positive = st.integers(-2, 4).map(str), st.integers(1, 3).map(str)
SCALED = (
    "({1} * {0})",
    "({0} * {1})",
    "{0}.mul({1})",
    "torch.add({0} * ({1} - 1), {0})",
    "torch.sub(torch.zeros_like({0}), {0}, alpha=-{1})",
)
MOVED = ("({0} + {1})", "({1} + {0})", "({0} - -{1})", "torch.add({0}, {1})", "(-(-{0} - {1}))", "({1} - -{0})")
DIVIDED = (
    "({0} // {1})",
    "torch.div({0}, {1}, rounding_mode='floor')",
    "(({0} - {0} % {1}) // {1})",
    "torch.floor_divide({0}, {1})",
)
REST = ("({0} % {1})", "torch.remainder({0}, {1})", "({0} - {1} * ({0} // {1}))")


def changed(of: Source) -> Source:
    """`of`, as it is or after a little arithmetic."""
    return st.one_of(
        of,
        spelled(MOVED, of, small),
        spelled(SCALED, of, positive),
        spelled(DIVIDED, of, positive),
        spelled(REST, of, positive),
        spelled(("{0}.abs()", "{0}.relu()", "{0}.clamp(-1, 2)", "(-{0})", "{0}.neg()"), of),
    )


LE = (
    "({0} <= {1})",
    "({0} < {1} + 1)",
    "(~({0} > {1}))",
    "(({0} - {1}) <= 0)",
    "({1} >= {0})",
    "torch.le({0}, {1})",
    "torch.ge({1}, {0}).logical_not().logical_not()",
    "(torch.minimum({0}, {1}) == {0})",
    "(({0} - {1}).clamp(min=0) == 0)",
    "(torch.sub({1}, {0}).relu() + ({0} == {1}) > 0)",
    "({0}.double() <= {1}.double())",
    "(torch.maximum({0}, {1}) < {1} + 1)",
)
EQUAL = (
    "({0} == {1})",
    "(~({0} != {1}))",
    "(({0} - {1}) == 0)",
    "(({0} - {1}).abs() < 1)",
    "(({0} <= {1}) & ({0} >= {1}))",
    "torch.eq({1}, {0})",
    "torch.logical_not({0} - {1})",
)
TRIANGLE = (
    "torch.ones(s, s, dtype=torch.bool).tril({0})",
    "torch.tril(torch.ones(s, s), {0}).bool()",
    "(~torch.ones(s, s, dtype=torch.bool).triu({0} + 1))",
    "(1 - torch.triu(torch.ones(s, s, dtype=torch.int64), {0} + 1)).bool()",
    "(torch.zeros(s, s).masked_fill(torch.ones(s, s).triu({0} + 1) == 1, -torch.inf) == 0)",
    "torch.ones(s, s).tril({0}).logical_not().logical_not()",
)
NOT = (
    "(~{0})",
    "torch.logical_not({0})",
    "({0} ^ True)",
    "({0} == False)",
    "torch.where({0}, False, True)",
    "(1 - {0}.long()).bool()",
    "(1.0 - {0}.float() > 0.5)",
    "{0}.int().eq(0)",
)
AND = (
    "({0} & {1})",
    "torch.logical_and({0}, {1})",
    "({0} * {1})",
    "torch.where({0}, {1}, False)",
    "(~(~{0} | ~{1}))",
    "(({0}.long() + {1}.long()) == 2)",
    "torch.minimum({0}, {1})",
    "({0}.float() * {1}.float() > 0)",
    "(torch.zeros(b, 2, s, s, dtype=torch.bool) | {0}).masked_fill(~{1}, False)",
)
OR = (
    "({0} | {1})",
    "torch.logical_or({0}, {1})",
    "({0} + {1})",
    "torch.where({0}, True, {1})",
    "(~(~{0} & ~{1}))",
    "(({0}.long() + {1}.long()) > 0)",
    "torch.maximum({0}, {1})",
)
SAME = (  # what shapes can do to a mask and undo again
    "{0}.expand(b, 2, s, s).transpose(2, 3).transpose(3, 2)",
    "{0}.expand(b, 2, s, s).reshape(2 * b, s, s).view(b, 2, s, s)",
    "{0}.expand(b, 2, s, s).permute(3, 1, 0, 2).permute(2, 1, 3, 0)",
    "{0}.expand(b, 2, s, s).flip(-1, 1).flip(1, 3)",
    "torch.cat([{0}.expand(b, 2, s, s), torch.zeros(b, 2, s, 3, dtype=torch.bool)], -1)[..., :s]",
    "torch.stack([{0}, {0}], 1).select(1, 0)",
    "F.pad({0}.expand(b, 2, s, s).long(), (1, 2, 0, 3), value=1)[..., :s, 1:-2].bool()",
    "{0}.expand(b, 2, s, s)[:, :, torch.arange(s)[:, None], torch.arange(s)]",
    "{0}.expand(b, 2, s, s)[:, 1 - torch.arange(2)].index_select(1, 1 - torch.arange(2))",
    "{0}.clone().contiguous()",
)

parts = st.one_of(
    spelled(LE, changed(keys), changed(queries)),
    spelled(LE, spelled(MOVED, queries, small), keys),
    spelled(EQUAL, changed(keys), changed(queries)),
    spelled(TRIANGLE, small),
    spelled(ROWS_TO_KEYS, FLAGS),
    spelled(ROWS_TO_QUERIES, FLAGS),
    st.sampled_from(["(torch.arange(2)[:, None, None] == 1)", "(torch.arange(2) < 1).view(2, 1, 1)"]),
)
# What names are made of, so that a good part is proved.
named = st.one_of(
    spelled(LE, spelled(TO_KEYS, st.sampled_from(COUNTS)), spelled(TO_QUERIES, st.sampled_from(COUNTS))),
    spelled(TRIANGLE, st.just("0")),
    spelled(ROWS_TO_KEYS, FLAGS),
    spelled(EQUAL, spelled(ROWS_TO_KEYS, st.just("segments")), spelled(ROWS_TO_QUERIES, st.just("segments"))),
)
leaves = st.one_of(parts, named)
formulas = st.recursive(
    leaves,
    lambda inner: st.one_of(spelled(AND, inner, leaves), spelled(OR, inner, leaves), spelled(NOT, inner), spelled(SAME, inner)),
    max_leaves=4,
)
ADDITIVE = (
    "{0}",
    "torch.where({0}, 0.0, -torch.inf)",
    "torch.where({0}, 0.0, LOWEST)",
    "(1.0 - {0}.float()) * LOWEST",
    "torch.zeros(b, 2, s, s).masked_fill(~{0}, -torch.inf)",
    "torch.full((b, 2, s, s), -torch.inf).masked_fill({0}, 0.0)",
    "torch.where({0}, 0.0, LOWEST) + torch.where({0}, 0.0, LOWEST)",
    "torch.where({0}, 0.0, -torch.inf).bfloat16().float()",
    "torch.where({0}, torch.zeros(()), torch.full((), -torch.inf))",
    "torch.maximum(torch.where({0}, 0.0, -torch.inf), torch.full((), LOWEST))",
)
masks = spelled(ADDITIVE, formulas)
