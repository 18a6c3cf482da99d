"""How long the stages of a compilation take."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

Stage = Literal["load", "export", "prove", "rewrite", "build", "tune", "verify"]
ORDER: tuple[Stage, ...] = ("load", "export", "prove", "rewrite", "build", "tune", "verify")
OTHER = "other"
SHOWN = 0.05  # of the whole: less time in no stage is not worth a word


@dataclass(frozen=True)
class StartUp:
    """What a model took until it could be called.

    Attributes:
        seconds: stage -> seconds. "export": `torch.export`, or what a program given as such takes to be made functional;
            "prove": lift, prove and validate the masks; "rewrite": passes, and the cache; "build": lowering, Inductor's
            compilation, engines; "tune": measuring the settings of generated kernels; "verify": comparing with eager, with
            what Triton compiles there at first launches; "load": weights, where a model was given by name; "other".
            A stage within another is not counted in that.
    """

    seconds: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def __str__(self) -> str:
        """E.g. "start-up 38.2 s: export 9.1, prove 2.0, rewrite 1.1, build 12.9, tune 6.0, verify 7.1"."""
        return f"{self.title}: {self.parts}"

    @property
    def title(self) -> str:
        return f"start-up {self.total:.1f} s"

    @property
    def parts(self) -> str:
        """Stage by stage; time in no stage only where it is much."""
        shown = {name: s for name, s in self.seconds.items() if name != OTHER or s > SHOWN * self.total}
        return ", ".join(f"{name} {s:.1f}" for name, s in shown.items())


class Stages:
    """A clock that runs for one stage at a time: the innermost that is open."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open = [OTHER]
        self._since = time.perf_counter()

    @contextmanager
    def of(self, stage: Stage) -> Iterator[None]:
        """Count what happens inside as this stage."""
        self._count()
        self._open.append(stage)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def _count(self) -> None:
        now = time.perf_counter()
        self._add(self._open[-1], now - self._since)
        self._since = now

    def _add(self, stage: str, seconds: float) -> None:
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    def move(self, seconds: float, before: Stage, after: Stage) -> None:
        """Count so many seconds, which were counted as one stage, as another."""
        self._add(before, -seconds)
        self._add(after, seconds)

    @property
    def seconds(self) -> dict[str, float]:
        """Stage -> seconds until now, in the order of the stages; they add up to the whole time."""
        self._count()
        return {name: self._seconds[name] for name in (*ORDER, OTHER) if name in self._seconds}


_clock: ContextVar[Stages | None] = ContextVar("stages", default=None)


@contextmanager
def clocked() -> Iterator[Stages]:
    """A clock for what happens inside; within another one, this has a clock of its own."""
    stages = Stages()
    token = _clock.set(stages)
    try:
        yield stages
    finally:
        _clock.reset(token)


@contextmanager
def stage(name: Stage) -> Iterator[None]:
    """Count what happens inside as this stage, if a clock runs."""
    stages = _clock.get()
    if stages is None:
        yield
        return
    with stages.of(name):
        yield


@contextmanager
def verifying() -> Iterator[None]:
    """Count what happens inside as "verify", save what Inductor compiles there: programs are compiled when first called."""
    stages, before = _clock.get(), _compiled()
    try:
        with stage("verify"):
            yield
    finally:
        if stages is not None:
            stages.move(_compiled() - before, "verify", "build")


def _compiled() -> float:
    """Seconds that Dynamo and all behind it took in this process; it takes a second to import, so who has not stays without."""
    utils = sys.modules.get("torch._dynamo.utils")
    return 0.0 if utils is None else float(utils.calculate_time_spent().get("total_wall_time", 0.0))
