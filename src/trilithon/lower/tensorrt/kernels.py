"""What an engine will run, read without a GPU: its layers from the builder's log, its attention kernels from its own bytes.

An engine of TensorRT-RTX carries its kernels as CUDA C++ text. That of an attention kernel says which keys a query may
reach (`col_left_bound`, `col_right_bound`) and what is done to the scores, so that a mask that the builder dropped shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path

from trilithon.errors import CannotLower
from trilithon.lower.tensorrt.capability import SiteLowering
from trilithon.spec.masks import Causal, LocalWindow, Mask, SlidingWindow, parse, parts

_LAYER = re.compile(r"Name: (.*?), LayerType: (.*?), .*TacticName: (.*?), StreamId: \d+, Metadata: (.*)")
_KERNEL = re.compile(rb"__global__ void[^;{]{0,80}?(_ge[mv]+_mha_v\d_0x[0-9a-f]+\w*)\(")
_LONGEST = 1 << 20  # bytes of one kernel's text, and of what belongs to it in front
_ROW = re.compile(r"row([+-]\d+)?")
_WITHIN = re.compile(r"(?:max\((?:0,(.*)|(.*),0)|min\((?:(?:shape)?\d+,(.*)|(.*),(?:shape)?\d+))\)")  # kept inside the keys
_TYPES = {"DATA_TYPE_FP16": "float16", "DATA_TYPE_BF16": "bfloat16", "DATA_TYPE_FP32": "float32"}
_SCORES = "epilogue_impl("  # what a gemm kernel does to a score before the softmax
_EDIT = re.compile(r"__myln_(select|add)___myln_(float|half|bf16)")


@dataclass(frozen=True)
class Layer:
    """One kernel launch.

    Attributes:
        name: TensorRT's.
        kind: e.g. "kgen" (a generated kernel) or "gemm".
        tactic: name of the kernel, e.g. `_gemm_mha_v2_0x...`; empty for shape arithmetic on the CPU.
        modules: paths of the modules whose operations it computes.
    """

    name: str
    kind: str
    tactic: str
    modules: tuple[str, ...] = ()

    @property
    def is_attention(self) -> bool:
        """Is it one kernel for a whole attention?"""
        return "_mha_v" in self.tactic


@dataclass(frozen=True)
class AttentionKernel:
    """One attention kernel.

    Attributes:
        name: as in `Layer.tactic`.
        left: first key that query `row` reaches, e.g. "max(0,row-63)"; empty where the kernel walks over all keys.
        right: last key, e.g. "row"; empty likewise.
        predicate: the same as a condition on `row` and `col`.
        edits_scores: it adds to the scores or selects among them: where a mask is that the bounds do not hold.
        scale: factor on the scores in the product; 1 where it is applied elsewhere.
        accumulator: what products are added up in, e.g. "float32"; empty where it is not stated.
        runtime_skipping: it reads a map of the tiles to skip.
        head_group_size: query heads that share a key head in the kernel; 1 where keys are repeated in front of it.
    """

    name: str
    left: str = ""
    right: str = ""
    predicate: str = ""
    edits_scores: bool = False
    scale: float = 1.0
    accumulator: str = ""
    runtime_skipping: bool = False
    head_group_size: int = 1


def layer_table(messages: Iterable[str]) -> list[Layer]:
    """The layers that a build logged, in order of execution; it must log with `ProfilingVerbosity.DETAILED`."""
    lines = (line for message in messages if "Layers:\n" in message for line in message.split("\n"))
    found = (_LAYER.match(line) for line in lines)
    return [Layer(m[1], m[2], m[3], tuple(filter(None, m[4].split("\x1f")))) for m in found if m]


def attention_kernels(engine: bytes | mmap) -> list[AttentionKernel]:
    """The attention kernels in a serialized engine, in order of first use."""
    found, before = [], 0
    for match in _KERNEL.finditer(engine):
        start = match.start()
        head = engine[max(before, start - _LONGEST) : start].decode("latin1")
        body = _braces(engine[start : start + _LONGEST].decode("latin1"), 0)
        found.append(_kernel(match[1].decode(), head, body))
        before = start + len(body)
    return found


def check_kernels(plan: Path, layers: Iterable[Layer], sites: Iterable[SiteLowering]) -> None:
    """Compare the kernel of each attention with what was proved of its mask.

    Args:
        plan: the file of the engine.
        layers: its layers.
        sites: what each attention became.

    Raises:
        CannotLower: a kernel cannot be that attention.
    """
    with plan.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as engine:
        kernels = {kernel.name: kernel for kernel in attention_kernels(engine)}
    launched = [layer for layer in layers if layer.is_attention and layer.tactic in kernels]
    of_one_kernel = [site for site in sites if site.form != "summed"]
    for layer, possible in zip(launched, _sites_of(launched, of_one_kernel), strict=True):
        kernel = kernels[layer.tactic]
        found = [
            contradiction(kernel, parse(site.mask), from_start=site.from_start) if site.mask else None for site in possible
        ]
        if found and all(why is not None for why in found):
            raise CannotLower(
                f"TensorRT built {possible[0].name} wrong",
                why=f"its kernel {kernel.name} is not {possible[0].mask}: {found[0]}",
                todo="use attention='decomposed', or backend='native', and report this with trilithon doctor",
            )


def _sites_of(launched: list[Layer], sites: list[SiteLowering]) -> list[list[SiteLowering]]:
    """The sites that each attention kernel may be: the one in its place, or all that it names, or any.

    A kernel names the modules of whatever is computed in it, and that may be the end of the site before; and kernels that
    do not wait for each other come in any order.
    """
    named = [[site for site in sites if site.name in layer.modules] for layer in launched]
    if len(launched) == len(sites) and all(site in found for site, found in zip(sites, named, strict=True)):
        return [[site] for site in sites]
    return [found or sites for found in named]


def _kernel(name: str, head: str, body: str) -> AttentionKernel:
    """A kernel from what stands between it and the one before (its parameters, if it has any), and its own text."""
    start = head.rfind(f"struct {name.split('_0x')[0]}_params_t")
    if start < 0:
        return AttentionKernel(name, edits_scores=bool(_EDIT.search(body)))
    own = head[start:]
    scores = own.find(_SCORES)
    given = [x.strip() for x in _first(r"\.initialize\((.*?)\);", own + body).split(",")]
    return AttentionKernel(
        name,
        left=_bound("col_left_bound", own),
        right=_bound("col_right_bound", own),
        predicate=_bound("mask_pred", own),
        edits_scores=scores >= 0 and bool(_EDIT.search(_braces(own, scores))),
        scale=next((float(x) for x in given if re.fullmatch(r"-?\d\.\d+e[+-]\d+", x)), 1.0),
        accumulator=_TYPES.get(given[2] if len(given) > 2 else "", ""),
        runtime_skipping=_first(r"USE_RUNTIME_SKIPPING = (\d)", own) == "1",
        head_group_size=int(_first(r"HEAD_GROUP_SIZE = (\d+)", own) or 1),
    )


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.DOTALL)
    return match[1] if match else ""


def _bound(function: str, text: str) -> str:
    """What a one-line function returns, casts and spaces left out: `row + ((int32_t) -63)` is `row-63`."""
    value = _first(function + r"\([^)]*\)\s*const\s*\{\s*return(.*?);", text)
    plain = re.sub(r"\(\(int32_t\) (-?\w+)\)", r"\1", value).replace(" ", "").replace("+-", "-")
    return re.sub(r"row\+0\b", "row", plain)


def _braces(text: str, start: int) -> str:
    """From `start` to the brace that closes the first one behind it."""
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[start : match.end()]
    return text[start:]


def contradiction(kernel: AttentionKernel, mask: Mask, *, from_start: bool = False) -> str | None:
    """Why the kernel cannot be attention under this mask, or None.

    A kernel may leave out only keys that the mask forbids; and where its bounds let more keys through than the mask does,
    it must edit the scores.

    Args:
        mask: what was proved.
        from_start: queries stand at positions known at run time only, so that no bound can hold.
    """
    left, right, exact = _reach(mask)
    if from_start:
        exact = exact and left is None and right is None
        left = right = None
    own_left, own_right = _offset(kernel.left), _offset(kernel.right)
    if own_right is not None and (right is None or own_right < right):
        return f"it stops at key {kernel.right}, and {mask} allows keys behind that"
    if own_left is not None and (left is None or own_left > left):
        return f"it begins at key {kernel.left}, and {mask} allows keys before that"
    if (exact and (own_left, own_right) == (left, right)) or kernel.edits_scores:
        return None
    reach = f"from {kernel.left or '0'} to {kernel.right or 'the end'}"
    return f"it takes all keys {reach} without a look at a mask, and {mask} forbids some of them"


def _reach(mask: Mask) -> tuple[int | None, int | None, bool]:
    """First and last key that a mask allows, counted from the query's own (None: no limit); and whether that says it all."""
    left: list[int] = []
    right: list[int] = []
    exact = True
    for part in parts(mask):
        match part:
            case Causal(align="upper_left"):
                right.append(0)
            case SlidingWindow(window_keys=n, align="upper_left"):
                left.append(1 - n)
                right.append(0)
            case LocalWindow(before=before, after=after):
                left.append(-before)
                right.append(after)
            case _:
                exact = False
    return max(left, default=None), min(right, default=None), exact


def _offset(bound: str) -> int | None:
    """Place of a bound, counted from the query's own key; None where it does not follow the query."""
    within = _WITHIN.fullmatch(bound)
    match = _ROW.fullmatch(next(filter(None, within.groups()), "") if within else bound)
    return int(match[1] or 0) if match else None
