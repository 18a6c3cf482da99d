"""Where ranks meet between generated kernels: each writes into the memory of the others, and waits for what they write."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from trilithon.capture.collectives import ALL_GATHER, MEETINGS, WAIT, group_of
from trilithon.lower.native.fused.launch import AFTER_RANKS, dependent_launch
from trilithon.lower.native.fused.operations import NOTHING
from trilithon.rewrite.unlift import device_of

BLOCK = 1024  # numbers of a program
APART = 32  # what ranks write in different meetings starts at multiples of so many numbers
FEWEST = 2  # meetings of a step: what a rank takes in the next step may overwrite what another has not read in a single one


class CannotMeet(Exception):
    """Ranks cannot reach each other's memory, or not for what they exchange; the text says why."""


@dataclass(frozen=True)
class Inboxes:
    """Memory of each rank that all can write to.

    Attributes:
        addresses: `[ranks]` int64, on this rank's device: where each rank's memory begins, as this rank reaches it.
        own: this rank.
        held: what must live as long.
    """

    addresses: Tensor
    own: int
    held: Any

    @property
    def ranks(self) -> int:
        return len(self.addresses)


class Meeting(nn.Module):
    """The sum of what all ranks have, or all of it one behind the other; the same on each rank to the last bit.

    Args:
        inboxes: of all meetings of a step.
        first: number of the inbox at which this meeting's part begins.
        result: fake tensor of what it gives.
        joins: give all of it; else its sum.
    """

    def __init__(self, inboxes: Inboxes, first: int, result: Tensor, joins: bool) -> None:
        super().__init__()
        self.inboxes, self.first, self.joins = inboxes, first, joins
        self.shape, self.dtype = tuple(result.shape), result.dtype
        self.size = result.numel() // (inboxes.ranks if joins else 1)

    def call(self, x: Tensor, result: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = x, result, self.inboxes.addresses, self.first, self.size
        options = {"RANKS": self.inboxes.ranks, "OWN": self.inboxes.own, "JOINS": self.joins, "BLOCK": BLOCK}
        return args, {**options, "num_warps": 4, **dependent_launch(x.device)}

    def programs(self) -> tuple[int]:
        return (-(-self.size // BLOCK),)

    def forward(self, x: Tensor) -> Tensor:
        from trilithon.lower.native.fused.step_kernels import meet

        result = x.new_empty(self.shape)
        args, options = self.call(x, result)
        meet[self.programs()](*args, **options)
        return result

    def prepare(self) -> None:
        """Compile what `forward` would launch."""
        from trilithon.lower.native.fused.step_kernels import meet

        x = torch.empty(self.size, dtype=self.dtype, device=self.inboxes.addresses.device)
        args, options = self.call(x, x.new_empty(self.shape))
        if x.is_cuda:
            meet.warmup(*args, grid=self.programs(), **options)


def meet_in_memory(fused: GraphModule) -> GraphModule:
    """A copy of a step whose ranks meet in each other's memory; all ranks call it. Kernels are compiled, and not run.

    It may run when all ranks have come back from here.

    Args:
        fused: made by `fuse_step` of a share.

    Raises:
        CannotMeet: on this rank; others may have come to an end.
    """
    meetings, group = _meetings(fused), group_of(fused.graph)
    if group is None or len(meetings) < FEWEST or any(n.meta["val"].dtype == torch.float64 for n in meetings):
        raise CannotMeet("ranks meet once a token, or in numbers of 64 bits")
    sizes = [-(-_inbox(n) // APART) * APART for n in meetings]
    inboxes = shared_memory(sum(sizes), group, device_of(fused))
    made = GraphModule(fused, copy.deepcopy(fused.graph))
    for name, kernel in list(made.named_children()):
        if getattr(kernel, AFTER_RANKS, False):
            kernel = copy.copy(kernel)
            setattr(kernel, AFTER_RANKS, False)
            made.add_submodule(name, kernel)
    first = 0
    for number, (node, size) in enumerate(zip(_meetings(made), sizes, strict=True)):
        meeting = Meeting(inboxes, first, node.meta["val"], str(node.target) == ALL_GATHER)
        try:
            meeting.prepare()
        except Exception as error:  # Triton's errors have no common class
            raise CannotMeet(f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no message')}") from error
        _replace(made, node, f"meeting_{number}", meeting)
        first += size
    made.recompile()
    return made


def _inbox(node: Node) -> int:
    """Numbers that a rank keeps of all ranks."""
    result: Tensor = node.meta["val"]
    return result.numel() * (1 if str(node.target) == ALL_GATHER else dist.get_world_size(_group(str(node.args[-1]))))


def _meetings(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if str(n.target) in MEETINGS]


def _replace(gm: GraphModule, node: Node, name: str, meeting: Meeting) -> None:
    """A collective and the wait for it by one kernel."""
    gm.add_submodule(name, meeting)
    with gm.graph.inserting_before(node):
        new = gm.graph.call_module(name, (node.args[0],))
    for user in list(node.users):
        assert str(user.target) == WAIT
        user.replace_all_uses_with(new)
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)


def _group(name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]


def shared_memory(size: int, group: str, device: torch.device) -> Inboxes:
    """Room for `size` int32 on each rank, with `NOTHING` in it; all ranks call it.

    By PyTorch's symmetric memory: GPUs of one host, or of one NVLink domain, that reach each other's memory.

    Raises:
        CannotMeet: they do not.
    """
    if device.type != "cuda":
        raise CannotMeet("ranks share no memory on this device")
    import torch.distributed._symmetric_memory as symmetric

    ranks = _group(group)
    try:
        own = symmetric.empty(size, dtype=torch.int32, device=device)
        own.fill_(NOTHING)
        handle: Any = symmetric.rendezvous(own, ranks)
        reached = [handle.get_buffer(rank, (size,), torch.int32).data_ptr() for rank in range(dist.get_world_size(ranks))]
    except (RuntimeError, ValueError, NotImplementedError) as error:
        lines = (line.strip() for line in str(error).splitlines())
        raise CannotMeet(f"no symmetric memory: {next((x for x in lines if x), type(error).__name__)}") from error
    torch.cuda.synchronize(device)
    return Inboxes(torch.tensor(reached, dtype=torch.int64, device=device), dist.get_rank(ranks), (own, handle))
