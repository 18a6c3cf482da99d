"""The command line in several processes that share a model, as torchrun starts them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from trilithon.errors import InputError, TrilithonError

if TYPE_CHECKING:
    from torch import nn

WAIT = timedelta(minutes=30)  # for the slowest rank: each compiles its own programs
COMMAND = "generate"


def ranks() -> int:
    """How many processes torchrun has started; 1 without it, as where a scheduler says the number alone."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def text_of(error: TrilithonError) -> str:
    """The error, and of several processes which it is of."""
    return str(error) if ranks() == 1 else f"rank {os.environ['RANK']}: {error}"


@contextmanager
def joined() -> Iterator[None]:
    """Be a rank of the process group that torchrun describes; of one process nothing happens.

    The first rank alone prints. A rank that fails ends at once and waits for nobody, so that torchrun ends the others, which
    may wait for it in a collective.
    """
    if ranks() == 1:
        yield
        return
    try:
        _join()
        with _first_alone_prints():
            yield
    except SystemExit as end:
        if end.code:
            _end(int(end.code) if isinstance(end.code, int) else 1)
        _leave()
        raise
    except BaseException:
        import traceback

        traceback.print_exc()
        _end(1)
    _leave()


def _join() -> None:
    import torch
    import torch.distributed as dist

    if next((word for word in sys.argv[1:] if not word.startswith("-")), "") != COMMAND:
        _refuse(f"trilithon runs in several processes for one command only, {COMMAND}", todo="leave torchrun out")
    own, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if gpus and own >= gpus:
        _refuse(
            f"process {own} of this machine has no GPU", why=f"there are {gpus}", todo=f"start torchrun --nproc-per-node {gpus}"
        )
    if gpus:
        torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=WAIT)


def _refuse(what: str, *, why: str = "", todo: str = "") -> NoReturn:
    print(text_of(InputError(what, why=why, todo=todo)), file=sys.stderr)
    sys.exit(1)


def _leave() -> None:
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        dist.all_reduce(torch.zeros(1))  # all have come to the end, and what they sent has arrived
        _end(0)  # CUDA graphs hold collectives, and NCCL would wait for the last of those graphs
    dist.destroy_process_group()


def _end(code: int) -> NoReturn:
    """Without what Python does at its end, which may wait for other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def _first_alone_prints() -> Iterator[None]:
    if os.environ["RANK"] == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def shared(model: str, dtype: str | None, device: str | None, layers: int | None, seed: int) -> nn.Module:
    """This rank's share of a model, which is loaded in the host's memory: a GPU holds no more than the share.

    Raises:
        InputError: `device` is another GPU than this rank's.
    """
    import torch

    from trilithon.cli.common import load
    from trilithon.parallel.share import shares_of, tensor_parallel

    own = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    asked = own if device is None else torch.device(device)
    if asked.type == "cuda" and asked.index not in (None, own.index):
        why = f"{asked} was asked for, and rank {os.environ['RANK']} has {own}"
        raise InputError("ranks cannot share one GPU", why=why, todo="leave --device out: torchrun gives each rank its own")
    made = tensor_parallel(load(model, dtype, device, layers, seed, in_host_memory=True), device=asked)
    print(*shares_of(made), sep="\n")
    return made
