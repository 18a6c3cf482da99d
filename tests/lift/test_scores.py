"""Masked scores, put together again from what was lifted: kept cells have their value, all others are blocked."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lift.rows_scores import LIFTED, REFUSED, Logits
from trilithon.capture.sites import Site, find_sites
from trilithon.errors import CannotLift
from trilithon.lift.meaning import Meaning, lift_site
from trilithon.spec.evaluate import evaluate

X = dict[str, Tensor]
ROWS: dict[str, Logits] = {**LIFTED, **{name: logits for name, (logits, _) in REFUSED.items()}}


class Attends(nn.Module):
    def __init__(self, logits: Logits) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: X) -> tuple[Tensor, Tensor]:
        i = torch.arange(q.shape[2])
        logits = self.logits(q @ k.transpose(-1, -2), i[:, None], i[None, :], x)
        return logits.softmax(-1) @ v.to(logits.dtype), logits


class Program(nn.Module):
    """Every row, each a module of its own, so that a site tells whose it is."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: Attends(logits) for name, logits in ROWS.items()})

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, slopes: Tensor, kept: Tensor) -> dict[str, Tensor]:
        x = {"bias": bias, "slopes": slopes, "kept": kept}
        both = {name: part(q, k, v, x) for name, part in self.parts.items()}
        return {name: logits for name, (_, logits) in both.items()} | {f"{name}.out": out for name, (out, _) in both.items()}


def inputs(s: int) -> X:
    g = torch.Generator().manual_seed(s)
    shapes = {"q": (3, 2, s, 4), "k": (3, 2, s, 4), "v": (3, 2, s, 4), "bias": (3, 2, s, s), "slopes": (2,)}
    floats = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return {**floats, "kept": torch.randint(0, 2, (3, s), generator=g).bool()}


@cache
def program() -> tuple[ExportedProgram, dict[str, Site]]:
    s = Dim("s", min=1, max=64)
    shapes = {name: {d: s for d, n in enumerate(x.shape) if n == 7} for name, x in inputs(7).items()}
    exported = torch.export.export(Program().eval(), (), inputs(7), dynamic_shapes=shapes, strict=False)
    return exported, {site.name.removeprefix("parts."): site for site in find_sites(exported.graph)}


@cache
def torch_says() -> tuple[X, dict[str, Tensor]]:
    given = inputs(5)
    return given, Program()(**given)


def reconstructed(meaning: Meaning, score: Tensor, given: X) -> tuple[Tensor, Tensor]:
    """Which cells are kept, and what the kept ones hold."""
    sizes = score.shape
    env: dict[str, Tensor | int] = {d.args[0]: n for d, n in zip(meaning.dims, sizes, strict=True) if d.op == "var"}
    for axis, (name, n) in enumerate(zip("bhqk", sizes, strict=True)):
        env[name] = torch.arange(n).view([-1 if i == axis else 1 for i in range(4)])
    read = {**meaning.constants, **given}
    value = meaning.scale * score.double()
    if meaning.softcap is not None:
        value = meaning.softcap * torch.tanh(value / meaning.softcap)
    if meaning.bias is not None:
        value = value + evaluate(meaning.bias.formula, env, read)
    return evaluate(meaning.keep, env, read).expand(sizes), value


@pytest.mark.parametrize("name", LIFTED)
def test_scores_are_put_together_again(name: str) -> None:
    exported, sites = program()
    given, says = torch_says()
    meaning = lift_site(exported, sites[name])
    kept, value = reconstructed(meaning, given["q"] @ given["k"].transpose(-1, -2), given)
    logits = says[name].double()
    torch.testing.assert_close(logits[kept], value[kept], rtol=1e-5, atol=1e-5)
    blocked = logits[~kept]
    assert bool((blocked < -1e30).all())
    assert meaning.needs_key  # a plain softmax makes a row without a key NaN
    assert ("-inf" in meaning.drops) >= bool((blocked == -torch.inf).any())
    assert any(drop != "-inf" for drop in meaning.drops) >= bool((blocked > -torch.inf).any())


@pytest.mark.parametrize("name", REFUSED)
def test_other_scores_are_refused(name: str) -> None:
    exported, sites = program()
    with pytest.raises(CannotLift, match=REFUSED[name][1]):
        lift_site(exported, sites[name])
