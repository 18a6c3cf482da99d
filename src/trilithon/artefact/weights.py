"""Weights as a safetensors file: written as a stream, a tensor at a time, each memory once; read by mapping it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from trilithon.errors import CannotLower

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
BLOCK = 1 << 26  # bytes that are copied from a GPU at a time
PINNED = 1 << 24  # bytes that are copied to a GPU at a time
THREADS = 4  # that copy to a GPU


class Tensors:
    """Tensors to be saved, by key; those that are the same numbers at the same place are saved once."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}
        self._keys: dict[Any, str] = {}

    def key(self, name: str, tensor: Tensor) -> str:
        """Keep a tensor; the key that it is saved under.

        Raises:
            CannotLower: a file cannot hold it.
        """
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and tensor.device.type != "meta"
        if not plain or tensor.dtype not in TYPES:
            what = f"{name}, a {type(tensor).__name__} of {tensor.dtype} on {tensor.device}"
            raise CannotLower(f"cannot save {what}", why="a file of weights holds dense tensors of usual types alone")
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device) if tensor.numel() else name
        found = self._keys.setdefault(place, name)
        self.kept.setdefault(found, tensor)
        return found


def chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file; those of wide types first, so that each tensor lies at a multiple of its size."""
    order = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header, end = dict[str, Any](), 0
    for name, x in order:
        header[name] = {"dtype": TYPES[x.dtype], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for _, x in order:
        if x.nbytes:
            yield from _bytes_of(x.detach().resolve_conj().resolve_neg())


def _bytes_of(x: Tensor) -> Iterator[memoryview]:
    flat = x.contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, len(flat), BLOCK):
        yield flat[start : start + BLOCK].cpu().numpy().data


def read(path: Path, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a file; on a CPU they are the file itself, mapped."""
    mapped = load_file(path)
    if device.type != "cuda":
        return mapped
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(mapped, pool.map(partial(_to_gpu, device=device), mapped.values()), strict=True))


def _to_gpu(x: Tensor, device: torch.device) -> Tensor:
    """Through pinned memory, which PyTorch keeps until the GPU has read it: CUDA itself copies other memory in one thread."""
    made = torch.empty_like(x, device=device)
    to, of = (t.reshape(-1).view(torch.uint8).split(PINNED) for t in (made, x))
    for block, held in zip(to, of, strict=True):
        block.copy_(held.pin_memory(), non_blocking=True)
    return made
