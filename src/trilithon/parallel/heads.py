"""Which part of a model a rank holds: by rules that need no communication, and no equal parts."""

from __future__ import annotations

from dataclasses import dataclass

from trilithon.errors import InputError


def part(size: int, rank: int, ranks: int) -> range:
    """The part of `size` things that a rank holds: neighbours, and of any two ranks one holds at most one more."""
    return range(size * rank // ranks, size * (rank + 1) // ranks)


@dataclass(frozen=True)
class Heads:
    """The heads that a rank holds, of `h` query heads and `g` key/value heads.

    Attributes:
        queries, kv: which; each key/value head is read by as many of these query heads.
    """

    queries: range
    kv: range

    @property
    def group(self) -> int:
        """Query heads that read one key/value head."""
        return len(self.queries) // len(self.kv)


def heads_of(h: int, g: int, rank: int, ranks: int) -> Heads:
    """The heads of a rank.

    While there are as many key/value heads as ranks, or more, they are dealt out with all query heads that read them. Else each
    rank holds one of them, as several others do, and shares its query heads with these.

    Raises:
        InputError: there are more ranks than query heads.
    """
    if ranks > h:
        raise InputError(
            f"cannot share {h} query heads among {ranks} ranks",
            why="a rank would hold none",
            todo=f"start {h} ranks or fewer",
        )
    group = h // g
    if g >= ranks:
        kv = part(g, rank, ranks)
        return Heads(range(kv.start * group, kv.stop * group), kv)
    head = next(j for j in range(g) if rank in part(ranks, j, g))
    holders = part(ranks, head, g)
    own = part(group, rank - holders.start, len(holders))
    return Heads(range(head * group + own.start, head * group + own.stop), range(head, head + 1))


def heads_in_words(h: int, g: int, ranks: int) -> str:
    """What the report says of how heads are shared."""
    held = [heads_of(h, g, rank, ranks) for rank in range(ranks)]
    queries, kv = (_counts([len(each) for each in many]) for many in ((x.queries for x in held), (x.kv for x in held)))
    text = f"{h} query heads and {g} key/value heads over {ranks} ranks: each holds {queries} and {kv}"
    if g < ranks:
        copies = _counts([len(part(ranks, j, g)) for j in range(g)])
        text += f"; each key/value head is kept by {copies} ranks, since there are fewer than ranks"
    return text


def _counts(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
