"""A rank's share of a model: plain local tensors, and functional collectives where ranks must meet."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from trilithon.capture import hf
from trilithon.errors import CaptureError, InputError, VerificationFailed
from trilithon.parallel.heads import Heads
from trilithon.parallel.layers import Columns, Joined, Rows
from trilithon.parallel.plan import Cut, Plan, has_dtensors, is_dtensor, make_plan
from trilithon.runtime.verify import TOLERANCE, relative_error
from trilithon.stages import stage

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads")  # what a module may call its numbers of heads
NOTES = "trilithon_shares"


@dataclass(frozen=True)
class Ranks:
    """The processes that share a model.

    Attributes:
        group: their process group; its name stands in graphs.
    """

    group: Any
    rank: int
    size: int

    @property
    def name(self) -> str:
        return str(self.group.group_name)


def tensor_parallel(
    model: nn.Module,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    group: Any = None,
    device: str | torch.device | None = None,
) -> nn.Module:
    """This rank's share of a model: every rank of the group calls it with the same model.

    The weights of attention and MLP are cut as the model's `tp_plan` says (whole heads, see `heads_of`), or as
    `parallelize_module` has cut them; the rest is held by each rank. `model` is left as it is: drop it, and the memory of what
    other ranks hold is free. The shares are run once against `model`, each where it is.

    Args:
        model: of transformers with a `tp_plan`, or any module whose linear layers hold DTensors; its weights are the same on
            all ranks.
        example_kwargs: keyword arguments of one call, to compare with; a Hugging Face model has a default.
        group: None = that of the DTensors, else all processes.
        device: where this rank's share is kept. With `model` on the CPU, a GPU never holds more of it than that. None = where
            `model` is.

    Returns:
        A module to be given to `compile`; of one rank `model` itself, on `device`.

    Raises:
        InputError: there is no process group, or there are more ranks than heads.
        CaptureError: the model does not say how it is shared, or its layers cannot be shared so.
        VerificationFailed: the shares together disagree with `model`.
    """
    ranks = _ranks(model, group)
    if ranks.size == 1 and not has_dtensors(model):
        return model if device is None else model.to(device)
    plan = make_plan(model, ranks.rank, ranks.size)
    with torch.no_grad():
        made = _Maker(model, ranks, plan, None if device is None else torch.device(device)).module(model, "")
        if not any(x.is_meta for x in model.parameters()):
            _require_same(model, made, _example(model, example_kwargs), ranks)
    setattr(made, NOTES, tuple(f"tensor parallel: {note}" for note in (*plan.notes, *_others(plan))))
    return made


def shares_of(model: object) -> tuple[str, ...]:
    """What the report says of a share; nothing of other models."""
    return getattr(model, NOTES, ())


def to_capture(model: Any, example_kwargs: Mapping[str, Any] | None) -> Any:
    """What is captured of what the user gave: a model by its name, or a rank's share of one whose parameters are DTensors."""
    if isinstance(model, str):
        with stage("load"):
            return hf.load_model(model)
    return tensor_parallel(model, example_kwargs) if has_dtensors(model) else model


def _others(plan: Plan) -> list[str]:
    kinds = Counter(cut.kind for cut in plan.cuts.values())
    sums = kinds["rows"] + kinds["rows of all"]
    return [f"{len(plan.cuts)} linear layers are shared; ranks meet in {sums} sums and {kinds['joined']} joins a pass"]


def _ranks(model: nn.Module, group: Any) -> Ranks:
    """Whose share is asked for."""
    if not dist.is_available() or not dist.is_initialized():
        raise InputError(
            "cannot share a model among ranks",
            why="there is no process group",
            todo="start with torchrun, and call torch.distributed.init_process_group() first",
        )
    mesh = next((x.device_mesh for x in model.parameters() if is_dtensor(x)), None)  # type: ignore[attr-defined]
    if mesh is not None and group is None:
        wide = [i for i, size in enumerate(mesh.shape) if size > 1]
        if len(wide) > 1:
            raise CaptureError(
                f"cannot share {type(model).__name__} among ranks",
                why=f"its DTensors lie on a mesh of {list(mesh.shape)} ranks, and one axis alone may be shared over",
                todo="parallelise it over a mesh of one axis",
            )
        group = mesh.get_group(wide[0] if wide else 0)
    group = dist.group.WORLD if group is None else group
    return Ranks(group, dist.get_rank(group), dist.get_world_size(group))


@dataclass
class _Maker:
    """Copies the tree of modules, with a rank's part of each tensor; the tensors that all ranks hold are the model's own, where
    they are on the same device.
    """

    model: nn.Module
    ranks: Ranks
    plan: Plan
    device: torch.device | None
    modules: dict[int, nn.Module] = field(default_factory=dict)
    tensors: dict[int, nn.Parameter] = field(default_factory=dict)
    uses: Counter[int] = field(init=False)

    def __post_init__(self) -> None:
        self.uses = Counter(id(x) for _, x in self.model.named_parameters(remove_duplicate=False))

    def module(self, module: nn.Module, path: str) -> nn.Module:
        if id(module) not in self.modules:
            cut = self.plan.cuts.get(path)
            self.modules[id(module)] = self.copied(module, path) if cut is None else self.layer(module, cut)
        return self.modules[id(module)]

    def copied(self, module: nn.Module, path: str) -> nn.Module:
        """Without what parallelises it: hooks, or another `forward`."""
        made = copy.copy(module)
        held = vars(made)
        held.pop("forward", None)
        held |= {name: OrderedDict() for name in HOOKS}
        held["_buffers"] = {name: None if x is None else x.to(self.device or x.device) for name, x in module._buffers.items()}
        held["_parameters"] = {name: None if x is None else self.kept(x) for name, x in module._parameters.items()}
        parts = {name: self.module(x, f"{path}.{name}".lstrip(".")) for name, x in module._modules.items() if x is not None}
        held["_modules"] = dict(module._modules) | parts
        if path in self.plan.heads:
            _count_heads(made, *self.plan.heads[path])
        return made

    def kept(self, x: nn.Parameter) -> nn.Parameter:
        """All of a parameter, on the share's device; that of several layers once."""
        if id(x) not in self.tensors:
            whole = _whole(x).detach()
            self.tensors[id(x)] = nn.Parameter(whole.to(self.device or whole.device), requires_grad=False)
        return self.tensors[id(x)]

    def layer(self, layer: Any, cut: Cut) -> nn.Module:
        is_shared = cut.kind == "joined" and self.uses[id(layer.weight)] > 1
        weight, bias = self.kept(layer.weight) if is_shared else _whole(layer.weight), layer.bias
        bias = None if bias is None else _whole(bias)
        name, device = self.ranks.name, self.device or weight.device
        if cut.kind == "columns":
            return Columns(weight, bias, cut.own, device)
        if cut.kind == "joined":
            return Joined(weight, bias, self.ranks.rank, self.ranks.size, name, device, is_shared=is_shared)
        return Rows(weight, bias, cut.own, name, device, takes_all=cut.kind == "rows of all")


def _whole(x: Tensor) -> Tensor:
    """All of a parameter; of a DTensor, which several ranks hold, it is brought together."""
    return x.full_tensor() if is_dtensor(x) else x  # type: ignore[attr-defined]


def _count_heads(attention: Any, held: Heads, h: int, g: int) -> None:
    """Let a module count the heads that it holds."""
    attention.num_key_value_groups = held.group
    for name in COUNTS:
        own, total = (len(held.kv), g) if name == COUNTS[-1] else (len(held.queries), h)
        if getattr(attention, name, None) == total:
            setattr(attention, name, own)


def _example(model: nn.Module, given: Mapping[str, Any] | None) -> dict[str, Any]:
    if given is not None:
        return dict(given)
    if not hf.is_hf(model):
        raise InputError(
            f"cannot compare the shares of {type(model).__name__} with it",
            why="there is no example of a call",
            todo="pass example_kwargs={'input_ids': torch.zeros(2, 16, dtype=torch.long)}",
        )
    example, _ = hf.example_for(model, hf.usual_inputs(model)[:1])
    generator = torch.Generator().manual_seed(0)
    most = int(getattr(model.config, "vocab_size", None) or 5)
    for name, x in example.items():
        if isinstance(x, Tensor) and not x.is_floating_point():
            example[name] = torch.randint(0, most, x.shape, generator=generator).to(x)
    return example


def _require_same(model: nn.Module, made: nn.Module, example: Mapping[str, Any], ranks: Ranks) -> None:
    """Run both; all ranks come to the same end."""
    want = _run(model, model, example, "run it", "share it before it is parallelised: tensor_parallel keeps heads whole")
    device = next(made.parameters()).device
    moved = tree_map_only(Tensor, lambda x: x.to(device), dict(example))
    got = _run(model, made, moved, "run its shares", "run it on one rank: its code may count on all heads being there")
    error = torch.tensor(float("inf"), dtype=torch.float64, device=device)
    if got.shape == want.shape:
        error = torch.tensor(relative_error(got, want.to(device)), dtype=torch.float64, device=device)
    error.nan_to_num_(nan=float("inf"))  # the largest of several may leave out what is no number
    dist.all_reduce(error, dist.ReduceOp.MAX, group=ranks.group)
    limit = TOLERANCE.get(want.dtype, 1e-3)
    if not float(error) <= limit:
        raise VerificationFailed(
            f"the shares of {type(model).__name__} disagree with it",
            why=f"the relative error is {float(error):.2e}, and {limit:.0e} is allowed",
            todo="give every rank the same weights; if they have, it cannot be shared as its tp_plan says: run it on one rank",
        )


def _run(model: nn.Module, run: nn.Module, example: Mapping[str, Any], what: str, todo: str) -> Tensor:
    """The first floating result."""
    try:
        found = [x for x in tree_leaves(run(**example)) if isinstance(x, Tensor) and x.is_floating_point()]
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        why = f"{type(error).__name__}: {reason}"
        raise CaptureError(f"cannot share {type(model).__name__} among ranks: cannot {what}", why=why, todo=todo) from error
    if not found:
        raise CaptureError(f"cannot share {type(model).__name__} among ranks", why="it gives no tensor to compare")
    return found[0].full_tensor() if is_dtensor(found[0]) else found[0]  # type: ignore[attr-defined]
