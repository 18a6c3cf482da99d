"""How each layer of a model is shared: by the model's own `tp_plan`, or as its parameters are placed already."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from trilithon.errors import CaptureError
from trilithon.parallel.heads import Heads, heads_in_words, heads_of, part

Kind = Literal["columns", "joined", "rows", "rows of all"]
STYLES: dict[str, Kind | None] = {  # transformers' names; None: each rank holds all of it
    "colwise": "columns",
    "colwise_rep": "joined",
    "colwise_gather_output": "joined",
    "rowwise": "rows",
    "rowwise_rep": "rows of all",
    "rowwise_split_input": "rows of all",
    "embedding_colwise": None,
    "embedding_rowwise": None,
    "replicate": None,
    "replicated_with_grad_allreduce": None,
}
ATTENTION = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Cut:
    """How a linear layer is shared.

    Attributes:
        own: outputs, or of "rows" inputs, that this rank holds; of "joined" the layer itself says which.
    """

    kind: Kind
    own: range


@dataclass(frozen=True)
class Plan:
    """How a model is shared.

    Attributes:
        cuts: by the path of the layer; what is not here is held by each rank.
        heads: by the path of the attention, its local heads, and how many there are in all.
        notes: for the report.
    """

    cuts: Mapping[str, Cut]
    heads: Mapping[str, tuple[Heads, int, int]]
    notes: tuple[str, ...]


def is_dtensor(x: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def has_dtensors(model: object) -> bool:
    """Is it cut already, into parts that say how?

    Raises:
        CaptureError: it is, and they do not.
    """
    if not isinstance(model, nn.Module):
        return False
    placed = any(is_dtensor(x) for x in model.parameters())
    if not placed and (getattr(model, "_tp_size", None) or 1) > 1:  # as transformers had it before DTensors
        raise CaptureError(
            f"cannot share {type(model).__name__} among ranks",
            why="transformers has cut it already, and its parts are no DTensors, which would say how",
            todo="load it whole, without tp_plan, and give it to trilithon.tensor_parallel",
        )
    return placed


def make_plan(model: nn.Module, rank: int, ranks: int) -> Plan:
    """How `model` is shared.

    Raises:
        CaptureError: it says nothing of how, or something that is not known here.
        InputError: there are more ranks than heads.
    """
    kinds = _kinds(model)
    modules = dict(model.named_modules())
    heads = {path: _heads(model, modules[path], rank, ranks) for path in _attentions(kinds, modules)}
    cuts = {path: Cut(kind, _own(path, kind, modules, heads, rank, ranks)) for path, kind in kinds.items()}
    return Plan(cuts, heads, tuple(dict.fromkeys(heads_in_words(h, g, ranks) for _, h, g in heads.values())))


def _kinds(model: nn.Module) -> dict[str, Kind]:
    """How each linear layer is shared, by its path."""
    said: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    placed = has_dtensors(model)
    if not placed:
        _check_known(model, said)
    found: dict[str, Kind] = {}
    for path, module in model.named_modules():
        kind = STYLES.get(_style(said, path) or "")
        if placed:
            kind = _placed(module, kind)
        if kind is not None:
            found[path] = kind
    if not found:
        raise CaptureError(
            f"cannot share {type(model).__name__} among ranks",
            why="it has no tp_plan, and none of its parameters is a DTensor",
            todo="use torch.distributed.tensor.parallel.parallelize_module on it first, or run it on one rank",
        )
    return found | dict.fromkeys(_output(model), "joined")


def _style(said: Mapping[str, str], path: str) -> str | None:
    """A plan names layers of all numbers at once: `layers.*.mlp`."""
    return said.get(path) or said.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path))


def _check_known(model: nn.Module, said: Mapping[str, str]) -> None:
    """Of what the plan names, all must be known."""
    names = [*(name for name, _ in model.named_parameters()), *(name for name, _ in model.named_modules())]
    modules = dict(model.named_modules())
    for name in names:
        style = _style(said, name)
        if style is None or STYLES.get(style, "") is None:
            continue
        if style not in STYLES or not isinstance(modules.get(name), nn.Linear):
            what = (
                "parallel styles of experts, packed weights and others" if style not in STYLES else "other than linear layers"
            )
            raise CaptureError(
                f"cannot share {type(model).__name__} among ranks",
                why=f"its tp_plan has {style!r} for {name}, and {what} are not known here",
                todo="run it on one rank",
            )


def _placed(module: nn.Module, said: Kind | None) -> Kind | None:
    """How a parallelised layer is shared: where its weight is split, and what the plan says more."""
    weight = getattr(module, "weight", None) if isinstance(module, nn.Linear) else None
    axes = {placement.dim for placement in weight.placements if placement.is_shard()} if is_dtensor(weight) else set()  # type: ignore[union-attr]
    if axes == {0}:
        return said if said in ("columns", "joined") else "columns"
    if axes == {1}:
        return said if said in ("rows", "rows of all") else "rows"
    return None


def _output(model: Any) -> Iterator[str]:
    """The path of the layer that makes logits. All ranks get the same ones, whatever the plan says of it."""
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(layer, nn.Linear):
        yield next(path for path, module in model.named_modules() if module is layer)


def _attentions(kinds: Mapping[str, Kind], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Paths of modules whose queries, keys and values are shared by heads."""
    for path in modules:
        if all(kinds.get(f"{path}.{name}") == "columns" for name in ATTENTION):
            yield path


def _heads(model: Any, attention: Any, rank: int, ranks: int) -> tuple[Heads, int, int]:
    width = getattr(attention, "head_dim", None)
    group = getattr(attention, "num_key_value_groups", None)
    if not isinstance(width, int) or not isinstance(group, int):
        raise CaptureError(
            f"cannot share {type(model).__name__} among ranks",
            why=f"{type(attention).__name__} does not say how its heads lie: it has no head_dim and num_key_value_groups",
            todo="set them on the module, or run it on one rank",
        )
    g = attention.k_proj.out_features // width
    return heads_of(g * group, g, rank, ranks), g * group, g


def _own(
    path: str,
    kind: Kind,
    modules: Mapping[str, nn.Module],
    heads: Mapping[str, tuple[Heads, int, int]],
    rank: int,
    ranks: int,
) -> range:
    """Outputs, or inputs, of this rank; those of attention are whole heads."""
    layer: Any = modules[path]
    size = layer.out_features if kind in ("columns", "joined") else layer.in_features
    parent, _, name = path.rpartition(".")
    if parent not in heads or kind not in ("columns", "rows"):
        return part(size, rank, ranks)
    held, h, g = heads[parent]
    own, count = (held.kv, g) if name in ATTENTION[1:] else (held.queries, h)
    width, rest = divmod(size, count)
    if rest:
        raise CaptureError(
            f"cannot share {path} among ranks",
            why=f"its {size} numbers do not divide into {count} heads",
            todo="run the model on one rank",
        )
    return range(own.start * width, own.stop * width)
