"""A model over a KV cache: prompts, single tokens and several at once; on a GPU prompts and single tokens are CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trilithon.errors import CapacityExceeded
from trilithon.rewrite.cache_shape import CacheShape
from trilithon.runtime.agree import agreed
from trilithon.runtime.canary import Canary
from trilithon.runtime.context import HeldContext, Snapshot
from trilithon.runtime.prompt import PromptGraphs, bucket
from trilithon.runtime.step import AT_ONCE, Decode, Step, Views, make_step
from trilithon.runtime.written import Written

if TYPE_CHECKING:  # it brings all that lowers, TensorRT's converters too
    from trilithon.lower.backend import Blueprint

Module = Callable[..., Tensor]


@dataclass(frozen=True)
class CachedModules:
    """The programs that `insert_cache` makes, lowered; each takes `(tokens, start, counts, *context, *caches)`.

    `decode` gives logits and the best tokens. `extend` gives logits of all tokens; where it is None several tokens are
    several steps.
    """

    prefill: Module
    decode: Decode
    extend: Module | None = None


@dataclass
class CachedDecoder:
    """A KV cache and the programs over it; see `runtime.protocol.Decoder` for what its methods do.

    The token at position p of a row is in slot `p % slots`. The host knows a bound of the rows' lengths, and asks the device
    for them only where the bound does not fit the cache.

    Args:
        modules: the lowered programs.
        shapes: one entry a site.
        cache_tokens: most tokens a row, prompt and generated tokens together.
        max_batch: rows.
        device: of the cache and the inputs.
        cuda_graphs: replay single steps as CUDA graphs.
        first_tokens: tokens a row that the cache is allocated for at first; it is doubled when full. None = all of it at once.
        context: what all tokens of a row read, of an encoder-decoder.
        prompts: replay prompts as CUDA graphs; not with a context, which would be at other addresses.
        blueprints: what its programs were lowered from, by name; for a file.
        canary: what it was verified with; None = it was not.
        group: ranks that share the model: each calls every method, with the same arguments.
        same_logits: all of them get the same logits to the last bit; else the first rank says which token is best.
        at_once: see `Follower`; `AT_ONCE`, or 1.
    """

    modules: CachedModules
    shapes: list[CacheShape]
    cache_tokens: int
    max_batch: int
    device: torch.device
    cuda_graphs: bool = False
    first_tokens: int | None = None
    context: HeldContext = field(default_factory=HeldContext)
    prompts: PromptGraphs | None = None
    blueprints: dict[str, Blueprint] = field(default_factory=dict)
    canary: Canary | None = None
    group: str | None = None
    same_logits: bool = True
    at_once: int = 1
    caches: list[Tensor] = field(init=False)
    best: Tensor = field(init=False)
    _steps: dict[int, Step] = field(init=False, default_factory=dict)
    _room: int = field(init=False, default=0)
    _used: int = field(init=False, default=0)
    _batch: int = field(init=False, default=0)
    _written: Written = field(init=False, default_factory=Written)

    def __post_init__(self) -> None:
        self.caches, self.best = [], torch.zeros(0, dtype=torch.int64, device=self.device)
        self._allocate(min(self.first_tokens or self.cache_tokens, self.cache_tokens))

    def _allocate(self, room: int) -> None:
        """A cache for `room` tokens a row, with what the present one holds."""
        with torch.inference_mode(False):  # it outlives the mode that the caller is in
            slots = [(x, x.slots(room if x.window is None else self.cache_tokens)) for x in self.shapes]
            fresh = [tensor for x, n in slots for tensor in x.zeros(self.max_batch, n, self.device)]
        for old, new in zip(self.caches, fresh, strict=False):
            new[:, :, : old.shape[2]].copy_(old)
        self.caches, self._room = fresh, room
        self.drop_graphs()

    def reserve(self) -> None:
        """Allocate all that the cache may need; from now on it stays where it is."""
        self._make_room(self.cache_tokens, already=0)

    def drop_graphs(self) -> None:
        """Record steps and prompts anew: what they read or write is at other addresses."""
        for step in self._steps.values():
            step.recorded.clear()
        if self.prompts is not None:
            self.prompts.drop()

    @property
    def cache_bytes(self) -> int:
        """Bytes that are allocated now."""
        return sum(c.numel() * c.element_size() for c in self.caches)

    @property
    def most_cache_bytes(self) -> int:
        """Bytes of a cache for `cache_tokens` tokens a row."""
        return self.max_batch * sum(shape.bytes_of(self.cache_tokens) for shape in self.shapes)

    @property
    def lengths(self) -> Tensor:
        return self._step(self._batch).start.clone()

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, pad: Tensor) -> Tensor:
        """See `Decoder.prefill`. Padding that all rows share is cut off.

        With `prompts` the logits stand in the buffer of a graph: they are valid until the next call, as those of `decode`.

        Raises:
            CapacityExceeded: more rows or tokens than the cache can hold; what it holds stays.
        """
        b, s = input_ids.shape
        self.check_rows(b)
        pads = pad.tolist()
        width = s - min(pads)
        self._make_room(width, already=0)
        step = self._step(b)
        tokens, held = input_ids, self._rows(b)
        padded = width if self.prompts is None else bucket(width, self.cache_tokens)
        if padded != s or max(pads):
            index = torch.arange(padded, device=self.device) + pad[:, None]
            tokens = input_ids.gather(1, index.clamp_max(s - 1))  # padding comes to the right, where no token sees it
        counts = s - pad
        given = tokens, step.start.zero_(), counts
        logits = self.modules.prefill(*given, *held) if self.prompts is None else self.prompts.run(*given, held)
        step.start.copy_(counts)
        self._used, self._batch, self._written = width, b, Written()
        self.best = self._agreed(logits[:, -1].argmax(-1))
        return logits[:, -1]

    @torch.no_grad()
    def take_context(self, given: tuple[Tensor, ...], rows: int) -> None:
        """See `Decoder.take_context`."""
        self.check_rows(rows)
        self.context.take(given, rows)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """See `Decoder.decode`.

        Raises:
            CapacityExceeded: the cache is full; what it holds stays.
        """
        self._make_room(1, already=self._used)
        step = self._step(self._batch)
        step.tokens.copy_(tokens[:, None])
        logits, best = step.run(self.modules.decode, self._rows(self._batch), self.cuda_graphs)
        self.best = self._agreed(best)
        self._used += 1
        return logits[:, -1]

    @torch.no_grad()
    def follow(self, tokens: Tensor) -> Tensor:
        """See `Follower`."""
        self._make_room(AT_ONCE, already=self._used)
        step = self._step(self._batch)
        step.tokens.copy_(tokens[:, None])
        made = step.follow(self.modules.decode, self._rows(self._batch), self.cuda_graphs)
        self.best, self._used = made[:, -1], self._used + AT_ONCE
        return made

    @torch.no_grad()
    def extend(self, tokens: Tensor, counts: Tensor | None = None) -> Tensor:
        """See `Decoder.extend`.

        Raises:
            CapacityExceeded: the tokens do not fit; what the cache holds stays.
        """
        b, s = tokens.shape
        step = self._step(b)
        counts = torch.full_like(step.start, s) if counts is None else counts
        self._make_room(s, already=self._used)
        if self.modules.extend is None:
            return self._one_by_one(tokens, counts)
        logits = self.modules.extend(tokens, step.start, counts, *self._rows(b))
        step.start.add_(counts)
        self._used += s
        self.best = self._agreed(logits.argmax(-1))
        return logits

    def _agreed(self, best: Tensor) -> Tensor:
        return best if self.same_logits else agreed(best, self.group)

    def _one_by_one(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """What stands behind a row's `counts` is written past its end, where no token sees it, and is overwritten later."""
        ends = self._step(self._batch).start + counts
        made = [(self.decode(column).clone(), self.best.clone()) for column in tokens.unbind(1)]
        logits, self.best = (torch.stack(parts, 1) for parts in zip(*made, strict=True))
        if self._rings:
            self._written = self._written.by(self._lengths())
        self._step(self._batch).start.copy_(ends)
        return logits

    @torch.no_grad()
    def rewind(self, lengths: Tensor) -> None:
        """See `Decoder.rewind`. The host reads the lengths."""
        now, wanted = self._lengths(), lengths.tolist()
        self._written.check_back(now, wanted, self._rings)
        self._written = self._written.by(now)
        self._step(self._batch).start.copy_(lengths)
        self._used = max(wanted)

    @torch.no_grad()
    def save(self) -> Snapshot:
        """See `Decoder.save`; a copy of the slots in use."""
        lengths = self._lengths()
        used = max(lengths, default=0)
        context = tuple(x.clone() for x in self.context.tensors)
        caches = tuple(cache[: self._batch, :, :used].clone() for cache in self.caches)
        return Snapshot(tuple(lengths), caches, context, self._written.by(lengths))

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """See `Decoder.restore`.

        Raises:
            CapacityExceeded: the snapshot is of another decoder, which holds more.
        """
        b, used = len(snapshot.lengths), max(snapshot.lengths, default=0)
        self.check_rows(b)
        self._make_room(used, already=0)
        for cache, kept in zip(self.caches, snapshot.caches, strict=True):
            cache[:b, :, : kept.shape[2]].copy_(kept)
        self.context.hold(snapshot.context)
        self._step(b).start.copy_(torch.tensor(snapshot.lengths, device=self.device))
        self._used, self._batch, self._written = used, b, snapshot.written

    @torch.no_grad()
    def select(self, rows: Tensor) -> None:
        """See `Decoder.select`.

        Raises:
            CapacityExceeded: more rows than the cache can hold; what it holds stays.
        """
        self.check_rows(len(rows))
        for cache in self.caches:
            used = cache[:, :, : self._used]
            used[: len(rows)] = used.index_select(0, rows)
        self.context.select(rows)
        self._written = self._written.select(rows.tolist()) if self._written.most else self._written
        start = self._step(self._batch).start[rows]
        self._batch = len(rows)
        self._step(self._batch).start.copy_(start)

    @property
    def _rings(self) -> list[int]:
        return [shape.slots(self.cache_tokens) for shape in self.shapes if shape.window is not None]

    def _lengths(self) -> list[int]:
        found: list[int] = self._step(self._batch).start.tolist() if self._batch else []
        return found

    def check_rows(self, b: int) -> None:
        if b > self.max_batch:
            raise CapacityExceeded(
                f"{b} rows do not fit a cache of {self.max_batch}", todo=f"compile with Options(max_batch={b})"
            )

    def _make_room(self, tokens: int, already: int) -> None:
        """See to it that so many tokens more fit; the present ones are kept."""
        if already and already + tokens > self.cache_tokens:
            self._used = already = max(self._lengths())  # the bound may be too high
        if already + tokens > self.cache_tokens:
            raise CapacityExceeded(
                f"{already + tokens} tokens do not fit a cache of {self.cache_tokens}",
                todo=f"compile with max_tokens={already + tokens} or more, prompt and generated tokens together",
            )
        if already + tokens > self._room:
            doubled = 1 << (already + tokens - 1).bit_length()
            self._allocate(min(doubled, self.cache_tokens))

    def _rows(self, b: int) -> Views:
        return Views(lambda: [*self.context.tensors, *(cache[:b] for cache in self.caches)])

    def _step(self, b: int) -> Step:
        if b not in self._steps:
            self._steps[b] = make_step(b, self.device)
        return self._steps[b]
