"""Names of equal layers as one: `model.layers.0..15.self_attn`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise


def skeleton(name: str) -> str:
    """The name without its numbers, which equal layers share."""
    return re.sub(r"\d+", "#", name)


def common_name(names: Iterable[str]) -> str:
    """`a.0.b`, `a.1.b`, `a.3.b` become `a.0..1,3.b`; names of other layers stand beside each other."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(skeleton(name), []).append(name)
    return ", ".join(map(_numbered, alike.values()))


def _numbered(names: list[str]) -> str:
    """One name for names that differ in their numbers only."""
    split = [re.split(r"(\d+)", name) for name in names]
    differ = [i for i, column in enumerate(zip(*split, strict=True)) if len(set(column)) > 1]
    if not differ:
        return names[0]
    if len(differ) > 1:
        return f"{names[0]} .. {names[-1]}"
    (place,) = differ
    numbers = ranges(sorted(int(parts[place]) for parts in split))
    return "".join([*split[0][:place], numbers, *split[0][place + 1 :]])


def ranges(numbers: Sequence[int]) -> str:
    """Rising numbers, briefly: "0..4,6..10", or "0,2,..,24" when all steps are equal."""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 4 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]},{numbers[1]},..,{numbers[-1]}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
