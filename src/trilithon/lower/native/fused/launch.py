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
from trilithon.lower.native.fused.operations import NOTHING, padded
from trilithon.lower.native.fused.text import Segment, Site, Text
from trilithon.lower.native.split_kv import PROGRAMS

A_WARP = 2048  # weights that a warp loads at once
LEAST_SHARE = 16  # see `Attention`
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
def _kernel(name: str, source: str) -> Any:
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


class _Generated(nn.Module):
    """A kernel with what it makes.

    Attributes:
        name, source: of the kernel.
        results: shape and type of each value it makes.
    """

    def __init__(self, text: Text) -> None:
        super().__init__()
        self.name, self.source = text.name, text.source
        self.results = [(tuple(x.meta["val"].shape), x.meta["val"].dtype) for x in text.makes]

    def candidates(self) -> list[dict[str, int]]:
        """Settings that may be fastest, the present ones first; none where there is no choice."""
        return []

    def settings(self) -> dict[str, int]:
        return {}

    def use(self, settings: dict[str, int]) -> None:
        for name, value in settings.items():
            setattr(self, name, value)

    def made(self, like: Tensor) -> list[Tensor]:
        return [like.new_empty(shape, dtype=dtype) for shape, dtype in self.results]

    def call(self, *reads: Tensor) -> tuple[int, list[Tensor], tuple[Any, ...], dict[str, Any]]:
        """How many programs, what they make, and what the kernel takes."""
        raise NotImplementedError

    def forward(self, *reads: Tensor) -> tuple[Tensor, ...]:
        programs, made, args, options = self.call(*reads)
        _kernel(self.name, self.source)[(programs,)](*args, **options)
        return tuple(made)

    def prepare(self, *reads: Tensor) -> None:
        """Compile what `forward` would launch."""
        programs, _, args, options = self.call(*reads)
        _kernel(self.name, self.source).warmup(*args, grid=(programs,), **options)


class Values(_Generated):
    """See `text_of_values`."""

    def call(self, *reads: Tensor) -> tuple[int, list[Tensor], tuple[Any, ...], dict[str, Any]]:
        made = self.made(reads[0])
        return len(made), made, (*reads, *made), {"num_warps": 4, **_launch(self, reads[0].device)}


class Products(_Generated):
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

    def call(self, *reads: Tensor) -> tuple[int, list[Tensor], tuple[Any, ...], dict[str, Any]]:
        made = self.made(reads[0])
        programs = sum(-(-n // self.rows) for n in self.widths)
        options = {"ROWS": self.rows, "num_warps": self.warps, **_launch(self, reads[0].device)}
        return programs, made, (*reads, *made), options


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


class Largest(nn.Module):
    """The place of the largest number, `[1]` int64; of equal ones the first."""

    def __init__(self) -> None:
        super().__init__()
        self._arrived = Arrived()

    def forward(self, x: Tensor) -> Tensor:
        from trilithon.lower.native.fused.step_kernels import largest

        result = x.new_empty(1, dtype=torch.int64)
        programs = -(-x.numel() // PIECE)
        values, places = x.new_empty(programs, dtype=torch.float32), x.new_empty(programs, dtype=torch.int32)
        largest[(programs,)](
            x, result, values, places, self._arrived(1, x.device), x.numel(),
            BLOCK=PIECE, BLOCK_P=padded(programs), num_warps=4, **_launch(self, x.device),
        )  # fmt: skip
        return result


class Arrived:
    """Counters of programs that have ended; each kernel leaves zeros behind."""

    def __init__(self) -> None:
        self.counts: Tensor | None = None

    def __call__(self, size: int, device: torch.device) -> Tensor:
        if self.counts is None or self.counts.device != device:
            self.counts = torch.zeros(size, dtype=torch.int32, device=device)
        return self.counts


class Attention(_Generated):
    """See `text_of_attention`. The caches are written in place.

    Attributes:
        splits: most parts of the keys.
        block_n: keys of a tile.
        share: numbers of an attended head that one program puts together of all parts.
    """

    def __init__(self, text: Text, site: Site) -> None:
        super().__init__(text)
        self.sizes = site.sizes
        self.block_n, self.splits, self.warps = self._own()
        self.share = LEAST_SHARE
        self._found = Found()

    def _own(self) -> tuple[int, int, int]:
        g, _, d, e = self.sizes
        return 64 if max(d, e) <= 128 else 32, max(1, min(64, 2 * PROGRAMS // g)), 4

    def settings(self) -> dict[str, int]:
        return {"block_n": self.block_n, "splits": self.splits, "warps": self.warps, "share": self.share}

    def candidates(self) -> list[dict[str, int]]:
        """Larger and smaller tiles, more and fewer parts, more warps; parts put together by fewer programs."""
        n, parts, _ = self._own()
        shapes = [(n, parts, 4), (n, parts, 8), (n // 2, parts, 4), (n // 2, 2 * parts, 4), (n // 2, 2 * parts, 8)]
        shapes += [(2 * n, parts, 4), (2 * n, parts, 8), (n, 16, 4), (n, 32, 4), (n, 48, 4), (n, 48, 8), (2 * n, 24, 8)]
        least, most = LEAST_SHARE, max(LEAST_SHARE, padded(self.sizes[3]))
        found = [(*shape, least) for shape in shapes]
        found += [(*shape, share) for shape in ((n, parts, 4), (n, 48, 4), (n, 32, 4)) for share in (2 * least, 4 * least)]
        names = ("block_n", "splits", "warps", "share")
        return [dict(zip(names, each, strict=True)) for each in dict.fromkeys(found) if each[-1] <= most]

    def call(self, *reads: Tensor) -> tuple[int, list[Tensor], tuple[Any, ...], dict[str, Any]]:
        k, v, *others = reads
        g, n, _, e = self.sizes
        made = self.made(others[0])
        shares = g * n * -(-e // self.share)
        held = self._found(shares, self.splits, self.share, k.device)
        args = (*others, *made, k, v, *held, *k.stride()[1:3], *v.stride()[1:3], k.shape[2], self.splits)
        options = {"BLOCK_N": self.block_n, "SHARE": self.share, "num_warps": self.warps, "num_stages": 2}
        options["BLOCK_S"] = max(padded(self.splits), 32 * self.warps // self.share)
        return g * self.splits + shares, made, args, {**options, **_launch(self, k.device)}


class Found:
    """What the parts of an attention find; each kernel leaves `NOTHING` behind."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None

    def __call__(self, shares: int, splits: int, share: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Room for `sums` and `marks` of `put_together`."""
        sizes = (shares, splits, share), (shares, splits, 2)
        if self.held is None or self.held[0].shape != sizes[0] or self.held[0].device != device:
            sums, marks = (torch.full(size, NOTHING, dtype=torch.int32, device=device) for size in sizes)
            self.held = sums, marks
        return self.held
