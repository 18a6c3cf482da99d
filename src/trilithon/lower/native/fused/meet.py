"""Where ranks meet between generated kernels: each writes into the memory of the others, and waits for what they write."""

from __future__ import annotations

import copy
import platform
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
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
APART = 32  # parts of an inbox start at multiples of so many numbers
FEWEST = 2  # meetings of a step: see `places`


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

    def forward(self, x: Tensor) -> Tensor:
        return _launch(x, self.inboxes.addresses, self.first, self.inboxes.own, self.joins, x.new_empty(self.shape))

    def prepare(self) -> None:
        """Compile what `forward` would launch."""
        result = torch.empty(self.shape, dtype=self.dtype, device=self.inboxes.addresses.device)
        x = result.flatten()[: result.numel() // (self.inboxes.ranks if self.joins else 1)]
        _launch(x, self.inboxes.addresses, self.first, self.inboxes.own, self.joins, result, runs=False)


def _launch(x: Tensor, addresses: Tensor, first: int, own: int, joins: bool, result: Tensor, runs: bool = True) -> Tensor:
    from trilithon.lower.native.fused.step_kernels import meet

    ranks, programs = len(addresses), (-(-x.numel() // BLOCK),)
    args = x, result, addresses, first, x.numel()
    options = {"RANKS": ranks, "OWN": own, "JOINS": joins, "BLOCK": BLOCK, "num_warps": 4, **dependent_launch(x.device)}
    if runs:
        meet[programs](*args, **options)
    elif x.is_cuda:
        meet.warmup(*args, grid=programs, **options)
    return result


@torch.library.custom_op("trilithon::meet", mutates_args=())
def meeting(x: Tensor, addresses: Tensor, first: int, own: int, joins: bool) -> Tensor:
    """A `Meeting` in a graph that Inductor compiles. It writes to memory that no other operation knows of.

    Args:
        addresses: of `Inboxes`.
    """
    return _launch(x.contiguous(), addresses, first, own, joins, _met(x, addresses, first, own, joins))


@meeting.register_fake
def _met(x: Tensor, addresses: Tensor, first: int, own: int, joins: bool) -> Tensor:
    return x.new_empty((x.shape[0] * (len(addresses) if joins else 1), *x.shape[1:]))


MEET = torch.ops.trilithon.meet.default


def meet_in_memory(fused: GraphModule, plain: GraphModule, rows: int) -> tuple[GraphModule, GraphModule]:
    """Copies of a step whose ranks meet in each other's memory; all ranks call it. Kernels are compiled, and not run.

    They may run when all ranks have come back from here.

    Args:
        fused: made by `fuse_step` of a share.
        plain: what it was made of, for any number of rows. Where it says nothing of the order of two meetings, it is given
            back as it is: ranks could come to them in other orders.
        rows: most of them.

    Raises:
        CannotMeet: on this rank; others may have come to an end.
    """
    meetings, group = _meetings(fused), group_of(fused.graph)
    if group is None or len(meetings) < FEWEST or any(n.meta["val"].dtype == torch.float64 for n in meetings):
        raise CannotMeet("ranks meet once a token, or in numbers of 64 bits")
    firsts, size = places([(_inbox(n) * rows, str(n.target) == ALL_GATHER) for n in meetings])
    inboxes = shared_memory(size, group, device_of(fused))
    return _by_kernels(fused, inboxes, firsts), _by_operations(plain, inboxes, firsts) if _is_chain(plain) else plain


def places(meetings: list[tuple[int, bool]]) -> tuple[list[int], int]:
    """Where in an inbox each meeting of a step begins, and how large it is.

    A place may serve again when another meeting was between: who comes to that has read what came to the first, and who leaves
    it knows so. So sums take turns with two places, and where they are odd the last has one of its own, since the first of the
    next step follows it; a join has one of its own.

    Args:
        meetings: how much each takes, and whether it is a join.
    """
    sums = [i for i, (_, joins) in enumerate(meetings) if not joins]
    own = [i for i, (_, joins) in enumerate(meetings) if joins]
    turns = [2 if len(sums) % 2 and i == sums[-1] else number % 2 for number, i in enumerate(sums)]
    slots = dict(zip(sums, turns, strict=True)) | {i: 3 + number for number, i in enumerate(own)}
    sizes = [0] * (3 + len(own))
    for i, slot in slots.items():
        sizes[slot] = max(sizes[slot], -(-meetings[i][0] // APART) * APART)
    begins = list(accumulate(sizes, initial=0))
    return [begins[slots[i]] for i in range(len(meetings))], begins[-1]


def _by_kernels(fused: GraphModule, inboxes: Inboxes, firsts: list[int]) -> GraphModule:
    """All kernels may then start while the one before ends."""
    made = GraphModule(fused, copy.deepcopy(fused.graph))
    for name, kernel in list(made.named_children()):
        if getattr(kernel, AFTER_RANKS, False):
            kernel = copy.copy(kernel)
            setattr(kernel, AFTER_RANKS, False)
            made.add_submodule(name, kernel)
    for number, (node, first) in enumerate(zip(_meetings(made), firsts, strict=True)):
        module, name = Meeting(inboxes, first, node.meta["val"], str(node.target) == ALL_GATHER), f"meeting_{number}"
        try:
            module.prepare()
        except Exception as error:  # Triton's errors have no common class
            raise CannotMeet(f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no message')}") from error
        made.add_submodule(name, module)
        with made.graph.inserting_before(node):
            _replace(node, made.graph.call_module(name, (node.args[0],)))
    made.recompile()
    return made


def _by_operations(plain: GraphModule, inboxes: Inboxes, firsts: list[int]) -> GraphModule:
    made = GraphModule(plain, copy.deepcopy(plain.graph))
    made.register_buffer("inboxes", inboxes.addresses)
    made.inboxes_held = inboxes.held
    with made.graph.inserting_before(next(iter(made.graph.nodes))):
        addresses = made.graph.get_attr("inboxes")
    for node, first in zip(_meetings(made), firsts, strict=True):
        with made.graph.inserting_before(node):
            args = node.args[0], addresses, first, inboxes.own, str(node.target) == ALL_GATHER
            _replace(node, made.graph.call_function(MEET, args))
    made.recompile()
    return made


def _is_chain(gm: GraphModule) -> bool:
    """Does each meeting need what the one before gave?"""
    last, behind = None, set[Node]()
    for node in gm.graph.nodes:
        if str(node.target) in MEETINGS:
            if last is not None and not any(n in behind for n in node.all_input_nodes):
                return False
            last, behind = node, {node}
        elif any(n in behind for n in node.all_input_nodes):
            behind.add(node)
    return True


def _inbox(node: Node) -> int:
    """Numbers that a rank keeps of all ranks, for one row."""
    result: Tensor = node.meta["val"]
    return result.numel() * (1 if str(node.target) == ALL_GATHER else dist.get_world_size(_group(str(node.args[-1]))))


def _meetings(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if str(n.target) in MEETINGS]


def _replace(node: Node, new: Node) -> None:
    """A collective and the wait for it by one operation."""
    for user in list(node.users):
        assert str(user.target) == WAIT
        new.meta = dict(user.meta)
        user.replace_all_uses_with(new)
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _group(name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]


def _is_one_host(ranks: Any) -> bool:
    hosts = [""] * dist.get_world_size(ranks)
    dist.all_gather_object(hosts, host(), group=ranks)
    return len(set(hosts)) == 1


def host() -> str:
    """A text of this host alone, while it runs: containers of several hosts may have one name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def shared_memory(size: int, group: str, device: torch.device) -> Inboxes:
    """Room for `size` int32 on each rank, with `NOTHING` in it; all ranks call it.

    By PyTorch's symmetric memory: GPUs of one host that reach each other's memory.

    Raises:
        CannotMeet: they do not.
    """
    if device.type != "cuda":
        raise CannotMeet("ranks share no memory on this device")
    ranks = _group(group)
    if not _is_one_host(ranks):
        raise CannotMeet("ranks are on several hosts")
    import torch.distributed._symmetric_memory as symmetric

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
