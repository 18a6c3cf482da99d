"""Whose tokens a decoder holds: one cache serves many, of which one at a time is in it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from trilithon.errors import InputError
from trilithon.runtime.protocol import Decoder, Snapshot


class Tenant:
    """One whose tokens a decoder may hold.

    Attributes:
        snapshot: its tokens while another's are in the decoder; None while its own are, or where it has none.
    """

    snapshot: Snapshot | None = None


class Memory:
    """A decoder and the tenant whose tokens it holds. A tenant that nobody refers to any more is not saved.

    Args:
        decoder: only to be called within `turn`.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._resident: weakref.ref[Tenant] | None = None
        self._busy = False

    @contextmanager
    def turn(self, tenant: Tenant) -> Iterator[Decoder]:
        """Make the tokens in the decoder those of `tenant`, and leave them to it for a while.

        Raises:
            InputError: another turn is under way: something that `generate` calls calls `generate`.
        """
        if self._busy:
            raise InputError(
                "the compiled model is generating already",
                why="its cache holds the tokens of one call at a time, and this call would break into another",
                todo="call it after the other has returned, not from a streamer, a processor or a criterion",
            )
        self._busy = True
        try:
            self._move_in(tenant)
            yield self.decoder
        finally:
            self._busy = False

    @contextmanager
    def visit(self) -> Iterator[Decoder]:
        """A turn of one whose tokens nobody wants afterwards."""
        guest = Tenant()
        try:
            with self.turn(guest) as decoder:
                yield decoder
        finally:
            self.forget(guest)

    def holds(self, tenant: Tenant) -> bool:
        """Whether the tokens of `tenant` are in the decoder or in its snapshot; if not, it takes them in again."""
        return tenant.snapshot is not None or self._tenant is tenant

    def snapshot_of(self, tenant: Tenant) -> Snapshot | None:
        """A copy of what `tenant` holds, wherever it is; None where it holds nothing."""
        return self.decoder.save() if self._tenant is tenant else tenant.snapshot

    def forget(self, tenant: Tenant) -> None:
        """Drop what `tenant` holds."""
        tenant.snapshot = None
        if self._tenant is tenant:
            self._resident = None

    @property
    def _tenant(self) -> Tenant | None:
        return None if self._resident is None else self._resident()

    def _move_in(self, tenant: Tenant) -> None:
        resident = self._tenant
        if resident is tenant:
            return
        if resident is not None:
            resident.snapshot = self.decoder.save()
        self._resident = None  # should the next line fail, nobody's tokens are there
        if tenant.snapshot is not None:
            self.decoder.restore(tenant.snapshot)
        tenant.snapshot, self._resident = None, weakref.ref(tenant)
