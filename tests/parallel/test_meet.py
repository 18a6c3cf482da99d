"""Ranks that meet in each other's memory between generated kernels; in place of GPUs' memory stand files that all map."""

from __future__ import annotations

import importlib.util
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.shares import alone
from parallel.test_generated import PRESET, few_programs, given, step
from parallel.together import Together
from trilithon.lower.native import step as step_module
from trilithon.lower.native.fused import meet
from trilithon.lower.native.fused.fuse import fuse_step
from trilithon.lower.native.fused.meet import APART, CannotMeet, Inboxes, Meeting, meet_in_memory, shared_memory
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


def steps(folder: Path) -> dict[str, Any]:
    """A share's step with collectives, and as often again with meetings in their place."""
    gm, inputs = step()
    with pytest.MonkeyPatch.context() as patch:
        few_programs(patch)
        patch.setattr(meet, "shared_memory", lambda size, group, device: mapped(size, folder))
        fused = fuse_step(gm, inputs)
        made = meet_in_memory(fused)
    held = given(inputs)
    with torch.no_grad():
        want = [fused(*[x.clone() for x in held])[0] for _ in range(2)]
        got = [made(*[x.clone() for x in held])[0] for _ in range(2)]
    after = {name: getattr(x, "after_ranks", None) for name, x in made.named_children()}
    return {
        "same": all(map(torch.equal, want, got)),
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
        assert found["same"] and not found["collectives"]
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

    forward = Meeting.forward
    with pytest.MonkeyPatch.context() as patch:
        few_programs(patch)
        patch.setattr(meet, "shared_memory", memory)
        patch.setattr(Meeting, "forward", wrong)
        patch.setattr(step_module, "tune", lambda *_, **__: 0)
        patch.setattr(step_module, "_compare", lambda *_: None)
        made = step_module.make_step(gm, inputs)
    assert made.one_row is not None
    return made.note, sum(isinstance(x, Meeting) for x in made.one_row.children())


def test_all_ranks_meet_in_memory_or_none_does(pair: Together, tmp_path: Path) -> None:
    alone(PRESET)
    kernels, more = "decode: 8 generated kernels a token for one row", "; for more, compiled by Inductor"
    assert pair(chosen, tmp_path, "") == [(f"{kernels}, between which ranks meet 3 times in each other's memory{more}", 3)] * 2
    by = f"{kernels}, between which ranks meet 3 times by torch.distributed"
    first, other = pair(chosen, tmp_path, "memory")
    assert first == (f"{by} (another rank cannot use them){more}", 0)
    assert other == (f"{by} (no peer access){more}", 0)
    for note, meetings in pair(chosen, tmp_path, "numbers"):
        assert note.startswith(f"{by} (") and not meetings


def test_a_cpu_has_no_such_memory(pair: Together) -> None:
    assert pair(refusal) == ["ranks share no memory on this device"] * 2


def refusal() -> str:
    with pytest.raises(CannotMeet) as found:
        shared_memory(32, dist.group.WORLD.group_name, torch.device("cpu"))  # type: ignore[union-attr]
    return str(found.value)
