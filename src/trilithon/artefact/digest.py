"""The hash of a file: its SHA-256; of one of several blocks, the SHA-256 of theirs, one behind the other.

So threads can hash a file side by side: one alone takes as long for the weights of a model as all else that a load does.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

BLOCK = 1 << 26  # bytes
READ = 1 << 20  # bytes at a time
THREADS = min(8, os.cpu_count() or 1)


class Digest:
    """Of what is written piece by piece."""

    def __init__(self) -> None:
        self._blocks: list[bytes] = []  # of those that are whole
        self._open, self._room = hashlib.sha256(), BLOCK

    def update(self, piece: bytes | memoryview) -> None:
        left = memoryview(piece).cast("B")
        while left:
            fits, left = left[: self._room], left[self._room :]
            self._open.update(fits)
            self._room -= len(fits)
            if not self._room:
                self._blocks.append(self._open.digest())
                self._open, self._room = hashlib.sha256(), BLOCK

    def hexdigest(self) -> str:
        ends_with_a_block = self._blocks and self._room == BLOCK
        return _together(self._blocks if ends_with_a_block else [*self._blocks, self._open.digest()])


def digest_of(opened: Any, size: int) -> str:
    """The hash of a file.

    Args:
        opened: at its start, for reading, without a buffer.
        size: its bytes.

    Raises:
        OSError: it cannot be read.
    """
    starts = range(0, max(size, 1), BLOCK)
    if not hasattr(os, "preadv"):
        return _one_behind_the_other(opened)
    with ThreadPoolExecutor(min(THREADS, len(starts))) as pool:
        return _together(pool.map(partial(_block, opened.fileno()), starts))


def _block(file: int, start: int) -> bytes:
    digest, held, end = hashlib.sha256(), memoryview(bytearray(READ)), start + BLOCK
    while start < end and (count := os.preadv(file, [held[: end - start]], start)):
        digest.update(held[:count])
        start += count
    return digest.digest()


def _one_behind_the_other(opened: Any) -> str:
    digest, held = Digest(), memoryview(bytearray(READ))
    while count := opened.readinto(held):
        digest.update(held[:count])
    return digest.hexdigest()


def _together(blocks: Iterable[bytes]) -> str:
    first, *others = blocks
    return hashlib.sha256(b"".join([first, *others])).hexdigest() if others else first.hex()
