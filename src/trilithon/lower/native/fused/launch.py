"""Run the generated kernels: each is written to a file once, compiled by Triton when first launched."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trilithon.folders import replace_file, users_cache
from trilithon.lower.native.argmax import PIECE
from trilithon.lower.native.fused.operations import padded
from trilithon.lower.native.fused.text import Segment, Site, Text

A_WARP = 2048  # weights that a warp loads at once
LEAST_SHARE = 16  # see `Attention`
MOST_PARTS = 256  # of the keys
TUNED_SLOTS = 2176  # of the caches with which kernels are measured
MOST_WARPS = 8
HELD = 2048  # numbers of parts that a warp puts together
MOST_ROWS = 16  # of a matrix in one program, where settings are measured
FILLED = 264  # programs that keep a large GPU busy
AFTER_RANKS = "after_ranks"  # what a kernel is called that is the first behind a collective


def kernel_folder() -> Path:
    """`kernels` in `$TRILITHON_CACHE`, or in `trilithon` in the user's cache folder; else, one of this process."""
    own = os.environ.get("TRILITHON_CACHE")
    try:
        folder = (Path(own).expanduser() if own else users_cache()) / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass  # no home, or one that is read-only
    return _own_folder()


@cache
def _own_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="trilithon-"))


@cache
def kernel_of(name: str, source: str) -> Any:
    """The Triton function of a source; Triton reads it from a file."""
    module_name = f"trilithon_step_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    path = kernel_folder() / f"{module_name}.py"
    replace_file(path, source)
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _launch(kernel: nn.Module, device: torch.device) -> dict[str, Any]:
    """Not behind a collective, which may run on a stream of its own."""
    return {"PDL": False} if getattr(kernel, AFTER_RANKS, False) else dependent_launch(device)


@cache
def dependent_launch(device: torch.device) -> dict[str, Any]:
    """Hopper GPUs start a kernel while the one before ends."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": able, **({"launch_pdl": True} if able else {})}


Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]  # a Triton function, how many programs, what it takes
Made = Tensor | tuple[Tensor, ...]


class Kernel(nn.Module):
    """Triton kernels, and what they make.

    Attributes:
        launches: kernels of a call.
        name, source: of the kernel; one that is not generated has no source.
    """

    launches = 1
    name: str
    source = ""

    def call(self, *reads: Tensor) -> tuple[list[Launch], Made]:
        """What a call launches, and what that makes."""
        raise NotImplementedError

    def forward(self, *reads: Tensor) -> Made:
        launches, made = self.call(*reads)
        for function, programs, args, options in launches:
            function[programs](*args, **options)
        return made

    def prepare(self, *reads: Tensor) -> None:
        """Compile what `forward` would launch."""
        for function, programs, args, options in self.call(*reads)[0]:
            function.warmup(*args, grid=programs, **options)

    def zeros(self, *reads: Tensor) -> Made:
        """In place of what `forward` makes, without a launch."""
        made = self.call(*reads)[1]
        return made.zero_() if isinstance(made, Tensor) else tuple(x.zero_() for x in made)

    def candidates(self) -> list[dict[str, int]]:
        """Settings that may be fastest, the present ones first; none where there is no choice."""
        return []

    def settings(self) -> dict[str, int]:
        return {}

    def use(self, settings: dict[str, int]) -> None:
        for name, value in settings.items():
            setattr(self, name, value)


class Generated(Kernel):
    """A kernel that was written for a region of a graph.

    Attributes:
        results: shape and type of each value it makes.
    """

    def __init__(self, text: Text) -> None:
        super().__init__()
        self.name, self.source = text.name, text.source
        self.results = [(tuple(x.meta["val"].shape), x.meta["val"].dtype) for x in text.makes]

    @property
    def function(self) -> Any:
        return kernel_of(self.name, self.source)

    def made(self, like: Tensor) -> tuple[Tensor, ...]:
        return tuple(like.new_empty(shape, dtype=dtype) for shape, dtype in self.results)


class Values(Generated):
    """See `text_of_values`."""

    def call(self, *reads: Tensor) -> tuple[list[Launch], Made]:
        made = self.made(reads[0])
        options = {"num_warps": 4, **_launch(self, reads[0].device)}
        return [(self.function, (len(made),), (*reads, *made), options)], made


class Products(Generated):
    """See `text_of_products`.

    Attributes:
        rows: of each matrix, in one program.
    """

    def __init__(self, text: Text, segments: tuple[Segment, ...], width: int) -> None:
        super().__init__(text)
        self.widths = [s.width for s in segments]
        self.width, self.matrices = width, max(len(s.linears) for s in segments)
        self.rows, self.warps = tile(width, self.widths, self.matrices)

    def settings(self) -> dict[str, int]:
        return {"rows": self.rows, "warps": self.warps}

    def candidates(self) -> list[dict[str, int]]:
        """More and fewer rows, by more or fewer warps: 32 to 128 numbers a thread."""
        numbers = padded(self.width) * self.matrices
        shapes = [tile(self.width, self.widths, self.matrices)]
        for warps in (1, 2, 4, 8):
            shapes += [(min(MOST_ROWS, warps * held // numbers), warps) for held in (A_WARP, A_WARP // 2, 2 * A_WARP)]
        return [{"rows": rows, "warps": warps} for rows, warps in dict.fromkeys(shapes) if rows]

    def call(self, *reads: Tensor) -> tuple[list[Launch], Made]:
        made = self.made(reads[0])
        programs = sum(-(-n // self.rows) for n in self.widths)
        options = {"ROWS": self.rows, "num_warps": self.warps, **_launch(self, reads[0].device)}
        return [(self.function, (programs,), (*reads, *made), options)], made


def tile(width: int, widths: list[int], matrices: int) -> tuple[int, int]:
    """Rows of a program, and its warps: 64 numbers a thread were fastest, if that makes programs for the whole GPU.

    Args:
        width: of a row.
        widths: rows of each segment.
        matrices: whose rows a program multiplies at once.
    """
    numbers = padded(width) * matrices
    warps = 8 if numbers > 4096 else 2 if matrices > 1 else 4
    rows = max(1, warps * A_WARP // numbers)
    fair = max(1, sum(widths) // FILLED)
    return min(rows, 1 << (fair.bit_length() - 1)), warps


class Largest(Kernel):
    """The place of the largest number, `[1]` int64; of equal ones the first."""

    name = "largest"

    def __init__(self) -> None:
        super().__init__()
        self._arrived = Arrived()

    def call(self, *reads: Tensor) -> tuple[list[Launch], Made]:
        from trilithon.lower.native.fused.step_kernels import largest

        (x,) = reads
        result = x.new_empty(1, dtype=torch.int64)
        programs = -(-x.numel() // PIECE)
        values, places = x.new_empty(programs, dtype=torch.float32), x.new_empty(programs, dtype=torch.int32)
        args = x, result, values, places, self._arrived(1, x.device), x.numel()
        options = {"BLOCK": PIECE, "BLOCK_P": padded(programs), "num_warps": 4, **_launch(self, x.device)}
        return [(largest, (programs,), args, options)], result


class Arrived:
    """Counters of programs that have ended; each kernel leaves zeros behind."""

    def __init__(self) -> None:
        self.counts: Tensor | None = None

    def __call__(self, size: int, device: torch.device) -> Tensor:
        if self.counts is None or self.counts.device != device:
            self.counts = torch.zeros(size, dtype=torch.int32, device=device)
        return self.counts


class Attention(Generated):
    """See `text_of_attention`; a second kernel puts together what its programs find. The caches are written in place.

    Attributes:
        splits: most parts of the keys.
        block_n: keys of a tile.
        share: numbers of an attended head that one program puts together of all parts.
    """

    launches = 2

    def __init__(self, text: Text, site: Site) -> None:
        super().__init__(text)
        self.sizes = site.sizes
        self.mask = {"WINDOW": site.window, "CHUNK": site.chunk, "RING": site.ring}
        self.block_n, self.splits, self.warps = self._shapes()[0]
        self.share = LEAST_SHARE

    def _shapes(self) -> list[tuple[int, int, int]]:
        """Keys of a tile, parts, warps; what is likely to be fast comes first. A warp alone waits for no other."""
        g, _, d, e = self.sizes
        found = []
        for held in (256, 128):  # numbers of a thread
            for n in (64, 32, 16, 128):
                parts = min(MOST_PARTS, max(-(-TUNED_SLOTS // n), FILLED // g))
                found.append((n, parts, max(1, n * (padded(d) + padded(e)) // (32 * held))))
        return [shape for shape in found if shape[-1] <= MOST_WARPS]

    def settings(self) -> dict[str, int]:
        return {"block_n": self.block_n, "splits": self.splits, "warps": self.warps, "share": self.share}

    def candidates(self) -> list[dict[str, int]]:
        """Larger and smaller tiles, by more and fewer warps; parts put together by fewer programs."""
        shapes, most = self._shapes(), max(LEAST_SHARE, padded(self.sizes[3]))
        found = [(*shape, LEAST_SHARE) for shape in shapes]
        found += [(*shape, share) for shape in shapes[:3] for share in (2 * LEAST_SHARE, 4 * LEAST_SHARE)]
        names = ("block_n", "splits", "warps", "share")
        return [dict(zip(names, each, strict=True)) for each in dict.fromkeys(found) if each[-1] <= most]

    def call(self, *reads: Tensor) -> tuple[list[Launch], Made]:
        from trilithon.lower.native.fused.attention_kernels import put_together

        k, v, start, *others = reads
        g, n, _, e = self.sizes
        found = [k.new_empty(g * n, self.splits + 1, width, dtype=torch.float32) for width in (e, 2)]
        args = (*others, k, v, *found, *k.stride()[1:3], *v.stride()[1:3], k.shape[2], self.splits)
        options = {"BLOCK_N": self.block_n, "num_warps": self.warps, "num_stages": 2, **_launch(self, k.device)}
        first = self.function, (g * (self.splits + 1),), args, options
        made, parts = self.made(k), padded(self.splits + 1)
        warps = max(1, min(MOST_WARPS, parts * self.share // HELD))
        sizes = {"BLOCK_N": self.block_n, "E": e, "BLOCK_S": parts, "SHARE": self.share, "num_warps": warps}
        second = (*found, *made, start, k.shape[2], self.splits), {**self.mask, **sizes, **dependent_launch(k.device)}
        return [first, (put_together, (g * n * -(-e // self.share),), *second)], made
