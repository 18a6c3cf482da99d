"""Compile kernels on all cores, before they are launched."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Interpreter

from trilithon.lower.native.fused.launch import Kernel

Args = tuple[Any, ...]


def import_beside() -> None:
    """Import Triton in a thread, and have it hash its own files, which is part of the name of each kernel that it keeps."""
    threading.Thread(target=_import, name="triton").start()


def _import() -> None:
    with suppress(ImportError):  # of a version that has it elsewhere; kernels that cannot be made are refused where they are
        from triton.runtime.cache import triton_key

        triton_key()


@contextmanager
def on_all_cores() -> Iterator[None]:
    """What is compiled inside is compiled by threads, where Triton can; a kernel that is launched is waited for.

    Errors of kernels that do not compile are found by their launch.
    """
    import triton

    if not hasattr(triton, "AsyncCompileMode"):
        yield
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True) as mode:
        yield
    for future in mode.raw_futures:
        forget_frames(future.exception())


def forget_frames(error: BaseException | None) -> None:
    """Triton keeps the error of a kernel that does not compile, and an error the frames it went through, with all they hold."""
    while error is not None:
        error.__traceback__, error = None, error.__cause__


def prepare(kernel: Kernel, args: Args) -> None:
    """Compile a kernel if that can be done; its launch says why not."""
    with suppress(Exception):  # Triton's errors have no common class
        kernel.prepare(*args)


def prepare_all(fused: GraphModule, inputs: Sequence[Tensor]) -> None:
    """Compile the kernels of one run, each source once; what is not a `Kernel` is run."""
    sources = set[str]()

    def seen(kernel: Kernel, args: Args) -> None:
        if kernel.source not in sources:
            prepare(kernel, args)
        sources.add(kernel.source)

    if inputs[0].is_cuda:
        with on_all_cores():
            dry_run(fused, inputs, seen)


def dry_run(fused: GraphModule, inputs: Sequence[Tensor], seen: Callable[[Kernel, Args], None]) -> None:
    """Call `seen` with each kernel of a run and what it takes; none is launched, and zeros are in place of what it makes."""
    _Dry(fused, seen).run(*inputs)


class _Dry(Interpreter):
    """Not a class of `dry_run` itself: with its closure it would keep the caches of `inputs` until Python looks for cycles."""

    def __init__(self, module: GraphModule, seen: Callable[[Kernel, Args], None]) -> None:
        super().__init__(module)
        self.seen = seen

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kernel = self.fetch_attr(target)
        if not isinstance(kernel, Kernel):
            return super().call_module(target, args, kwargs)
        self.seen(kernel, args)
        return kernel.zeros(*args)
