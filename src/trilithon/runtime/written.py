"""How far the rows of a cache were written: a ring has lost what is further back than its spare slots reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trilithon.errors import InputError
from trilithon.rewrite.cache_shape import SPARE


@dataclass(frozen=True)
class Written:
    """What rows held at most.

    Attributes:
        most: tokens of each row, before it was taken back; empty = no row was.
    """

    most: tuple[int, ...] = ()

    def by(self, now: Sequence[int]) -> Written:
        """With what the rows hold now."""
        return Written(tuple(max(pair) for pair in zip(now, self.most or now, strict=True)))

    def select(self, rows: Sequence[int]) -> Written:
        """Of rows that become copies of these."""
        return Written(tuple(self.most[i] for i in rows) if self.most else ())

    def check_back(self, now: Sequence[int], wanted: Sequence[int], rings: Sequence[int]) -> None:
        """May rows that hold `now` go back to `wanted`?

        Args:
            rings: slots of each layer that keeps the last tokens alone.

        Raises:
            InputError: they hold less, or a ring has lost what they would see.
        """
        if any(not 0 <= b <= a for a, b in zip(now, wanted, strict=True)):
            raise InputError(
                f"cannot go back to {list(wanted)} tokens", why=f"the rows hold {list(now)}", todo="pass no more than that"
            )
        most = self.by(now).most
        back = max((a - b for a, b in zip(most, wanted, strict=True)), default=0)
        if back > SPARE and any(n < max(most) for n in rings):
            raise InputError(
                f"cannot take back {back} tokens",
                why=f"layers with a window keep {min(rings)} tokens of a row, and the older ones are gone",
                todo=f"take back at most {SPARE} of the most that a row held, or save() before and restore() then",
            )
