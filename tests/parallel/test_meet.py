"""Ranks that meet in each other's memory between generated kernels; in place of GPUs' memory stand files that all map."""

from __future__ import annotations

import importlib
import importlib.util
import random
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.fx import Graph, GraphModule

from parallel.shares import alone
from parallel.test_generated import PRESET, few_programs, given, step
from parallel.together import Together
from trilithon.lower.native import step as step_module
from trilithon.lower.native.fused import meet
from trilithon.lower.native.fused.fuse import fuse_step
from trilithon.lower.native.fused.meet import APART, CannotMeet, Inboxes, Meeting, meet_in_memory, places, shared_memory
from trilithon.lower.native.fused.operations import NOTHING

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None, reason="for Triton's interpreter"
)


def mapped(size: int, folder: Path) -> Inboxes:
    """What `shared_memory` gives on GPUs."""
    ranks, own = dist.get_world_size(), dist.get_rank()
    torch.full((size,), NOTHING, dtype=torch.int32).numpy().tofile(folder / str(own))
    dist.barrier()
    held = [torch.from_file(str(folder / str(r)), shared=True, size=size, dtype=torch.int32) for r in range(ranks)]
    return Inboxes(torch.tensor([x.data_ptr() for x in held]), own, held)


def exchanged(folder: Path, dtype: torch.dtype, size: int, rounds: int) -> list[dict[str, Any]]:
    """What a sum and a join behind it give, time after time, with ranks that come early and late."""
    ranks, own = dist.get_world_size(), dist.get_rank()
    part = -(-ranks * size // APART) * APART
    inboxes = mapped(2 * part, folder)
    total = Meeting(inboxes, 0, torch.empty(1, size, dtype=dtype, device="meta"), joins=False)
    joined = Meeting(inboxes, part, torch.empty(ranks * size, dtype=dtype, device="meta"), joins=True)
    found, late = [], random.Random(own)
    for number in range(rounds):
        generator = torch.Generator().manual_seed(number)
        all_have = torch.randn(ranks, size, generator=generator)
        all_have[:, 0] = float("nan")
        all_have[:, 1] = torch.tensor([NOTHING], dtype=torch.int32).view(torch.float32)  # a number that looks like none
        x = all_have.to(dtype)
        time.sleep(late.random() / 20)
        rounding = 2**-7 if dtype == torch.bfloat16 else 0.0  # the interpreter cuts bfloat16 off
        added, together = total(x[own : own + 1].clone()), joined(x[own].clone())
        want = torch.zeros(1, size)
        for each in x:
            want += each.float()
        found.append(
            {
                "sum": torch.allclose(added.float(), want.to(dtype).float(), rtol=rounding, atol=0.0, equal_nan=True),
                "join": torch.equal(together.nan_to_num(nan=7.0), x.flatten().nan_to_num(nan=7.0)),
                "nan": bool(added[0, :2].isnan().all()),
            }
        )
    dist.barrier()
    empty = torch.from_file(str(folder / str(own)), shared=True, size=2 * part, dtype=torch.int32)
    return [*found, {"empty": bool((empty == NOTHING).all())}]


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 40), (torch.float16, 1500), (torch.bfloat16, 1024)])
def test_sums_and_joins(pair: Together, tmp_path: Path, dtype: torch.dtype, size: int) -> None:
    """Exactly what is added up in float32 in the order of ranks and rounded once; nothing is left in the inboxes."""
    for of_rank in pair(exchanged, tmp_path, dtype, size, 4):
        assert all(all(each.values()) for each in of_rank), of_rank


def test_three_ranks(three: Together, tmp_path: Path) -> None:
    for of_rank in three(exchanged, tmp_path, torch.float16, 77, 3):
        assert all(all(each.values()) for each in of_rank), of_rank


def walked(folder: Path, kinds: str, size: int) -> bool:
    """Does each meeting of several steps give what it should, in places that serve again?

    Ranks dawdle, also between what they send and what they look for.
    """
    ranks, own = dist.get_world_size(), dist.get_rank()
    firsts, total = places([(ranks * size, kind == "j") for kind in kinds])
    inboxes, late = mapped(total, folder), random.Random(own)
    shapes = [(ranks * size,) if kind == "j" else (size,) for kind in kinds]
    made = [
        Meeting(inboxes, first, torch.empty(shape, device="meta"), joins=kind == "j")
        for first, shape, kind in zip(firsts, shapes, kinds, strict=True)
    ]
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    load = builder.create_masked_load

    def late_load(*args: Any) -> Any:
        time.sleep(late.choice((0.0, 0.0, 0.02)))
        return load(*args)

    is_right = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", late_load)
        for again in range(3):
            for number, (each, kind) in enumerate(zip(made, kinds, strict=True)):
                x = torch.arange(ranks * size).view(ranks, size) * (1.0 + again) + number
                is_right &= torch.equal(each(x[own].clone()), x.flatten() if kind == "j" else x.sum(0))
    return is_right


@pytest.mark.parametrize("kinds", ["ssssj", "sssj", "ss", "ssjs"])
def test_places_that_serve_again_hold_what_was_sent(pair: Together, tmp_path: Path, kinds: str) -> None:
    assert pair(walked, tmp_path, kinds, 40) == [True, True]


def steps(folder: Path) -> dict[str, Any]:
    """A share's step with collectives, and as often again with meetings in their place."""
    gm, inputs = step()
    with pytest.MonkeyPatch.context() as patch:
        few_programs(patch)
        patch.setattr(meet, "shared_memory", lambda size, group, device: mapped(size, folder))
        fused = fuse_step(gm, inputs)
        made, several = meet_in_memory(fused, gm, 3)
    held = given(inputs)
    with torch.no_grad():
        want = fused(*[x.clone() for x in held])[0]
        got = [made(*[x.clone() for x in held])[0] for _ in range(2)]
        two = [x.repeat(2, *[1] * (x.dim() - 1)) for x in held]
        traced = torch.compile(several, backend="aot_eager", dynamic=False, fullgraph=True)  # as Inductor sees it
        rows = [module(*[x.clone() for x in two])[0] for module in (gm, several, traced)]
        got.append(made(*[x.clone() for x in held])[0])  # behind steps of more rows
    after = {name: getattr(x, "after_ranks", None) for name, x in made.named_children()}
    return {
        "same": all(torch.equal(x, want) for x in got),
        "rows": all(torch.allclose(x, rows[0], atol=1e-4, rtol=1e-4) for x in rows),
        "operations": [str(n.target) for n in several.graph.nodes if "c10d" in str(n.target) or n.target is meet.MEET],
        "logits": got[0].flatten().tolist(),
        "collectives": [str(n.target) for n in made.graph.nodes if "c10d" in str(n.target)],
        "meetings": sum(isinstance(x, Meeting) for x in made.children()),
        "after": {x for name, x in after.items() if name.startswith("kernel")},
        "kept": sum(bool(getattr(x, "after_ranks", False)) for x in fused.children()),
    }


@torch.no_grad()
def test_a_step_meets_in_memory(pair: Together, tmp_path: Path) -> None:
    """To the last bit: of two ranks there is one order to add up in. Kernels then all start while the one before ends."""
    alone(PRESET)
    first, other = pair(steps, tmp_path)
    for found in (first, other):
        assert found["same"] and found["rows"] and not found["collectives"]
        assert found["operations"] == ["trilithon.meet.default"] * 3
        assert found["meetings"] == 3 and found["after"] == {False}
        assert found["kept"] == 3  # in the step with collectives
    assert first["logits"] == other["logits"]


def chosen(folder: Path, fails: str) -> tuple[str, int]:
    """What a step says of how its ranks meet, and how many meetings it has, where one thing fails on the second rank alone."""
    gm, inputs = step()
    breaks = dist.get_rank() == 1

    def memory(size: int, *_: Any) -> Inboxes:
        made = mapped(size, folder)
        if fails == "memory" and breaks:
            raise CannotMeet("no peer access")
        return made

    def wrong(self: Meeting, x: torch.Tensor) -> torch.Tensor:
        made = forward(self, x)
        return made + 1 if fails == "numbers" and breaks else made

    def wrong_rows(gm: GraphModule, inboxes: Inboxes, firsts: list[int]) -> GraphModule:
        made = by_operations(gm, inboxes, firsts)
        if fails == "numbers of several rows" and breaks:
            output = made.graph.output_node()
            with made.graph.inserting_before(output):
                logits, best = output.args[0]
                output.args = ((made.graph.call_function(torch.neg, (logits,)), best),)
            made.recompile()
        return made

    forward, by_operations = Meeting.forward, meet._by_operations
    with pytest.MonkeyPatch.context() as patch:
        few_programs(patch)
        patch.setattr(meet, "shared_memory", memory)
        patch.setattr(Meeting, "forward", wrong)
        patch.setattr(meet, "_by_operations", wrong_rows)
        patch.setattr(step_module, "tune", lambda *_, **__: 0)
        patch.setattr(step_module, "_compare", lambda *_: None)
        made = step_module.make_step(gm, inputs)
    assert made.one_row is not None
    return made.note, sum(isinstance(x, Meeting) for x in made.one_row.children())


def test_all_ranks_meet_in_memory_or_none_does(pair: Together, tmp_path: Path) -> None:
    alone(PRESET)
    text = "decode: 9 generated kernels a token for one row; for more, compiled by Inductor; ranks meet 3 times"
    assert pair(chosen, tmp_path, "") == [(f"{text} in each other's memory", 3)] * 2
    first, other = pair(chosen, tmp_path, "memory")
    assert first == (f"{text} by torch.distributed (another rank cannot use them)", 0)
    assert other == (f"{text} by torch.distributed (no peer access)", 0)
    for fails in ("numbers", "numbers of several rows"):
        for note, meetings in pair(chosen, tmp_path, fails):
            assert note.startswith(f"{text} by torch.distributed (") and not meetings


def on_hosts(names: list[str]) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meet, "host", lambda: names[dist.get_rank()])
        return meet._is_one_host(dist.group.WORLD)


def test_hosts_are_told_apart(pair: Together) -> None:
    """Neither memory nor processes of another host can be reached; all ranks see so, and keep their collectives."""
    assert pair(on_hosts, ["one", "one"]) == [True, True]
    assert pair(on_hosts, ["one", "other"]) == [False, False]
    assert meet.host() == meet.host() != ""


def test_a_cpu_has_no_such_memory(pair: Together) -> None:
    assert pair(refusal) == ["ranks share no memory on this device"] * 2


def refusal() -> str:
    with pytest.raises(CannotMeet) as found:
        shared_memory(32, dist.group.WORLD.group_name, torch.device("cpu"))  # type: ignore[union-attr]
    return str(found.value)


def test_places_serve_again_when_ranks_have_met_elsewhere() -> None:
    """In the order of a step, and from the last meeting of one to the first of the next."""
    for kinds in ("ssssj", "sssj", "ss", "sss", "sj", "sjsj", "ssjs", "s" * 64 + "j", "s" * 65):
        meetings = [(40 + 8 * i, kind == "j") for i, kind in enumerate(kinds)]
        firsts, size = places(meetings)
        ends = [first + taken for first, (taken, _) in zip(firsts, meetings, strict=True)]
        assert all(a != b for a, b in zip(firsts, [*firsts[1:], firsts[0]], strict=True)), kinds
        assert all(first % APART == 0 for first in firsts) and max(ends) <= size
        others = sorted({(a, max(e for f, e in zip(firsts, ends, strict=True) if f == a)) for a in firsts})
        assert all(end <= begin for (_, end), (begin, _) in pairwise(others))  # no two overlap
        assert len(others) <= 3 + kinds.count("j")


def test_meetings_of_which_none_is_first_keep_their_collectives() -> None:
    """Attention and MLP that read one vector: compilers may run either first."""

    def graph(in_a_row: bool) -> GraphModule:
        made = Graph()
        x = made.placeholder("x")
        ops = torch.ops._c10d_functional
        one = made.call_function(ops.wait_tensor.default, (made.call_function(ops.all_reduce.default, (x, "sum", "0")),))
        read = made.call_function(torch.relu, (one if in_a_row else x,))
        two = made.call_function(ops.wait_tensor.default, (made.call_function(ops.all_reduce.default, (read, "sum", "0")),))
        made.output(made.call_function(torch.add, (one, two)))
        return GraphModule(torch.nn.Module(), made)

    assert meet._is_chain(graph(True)) and not meet._is_chain(graph(False))
