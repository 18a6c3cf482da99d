"""What a model's configuration promises of its attention, against what the exported graph was proved to contain.

A window that the graph lacks, or has without being asked, is how an export goes wrong in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trilithon.prove.verdict import Verdict
from trilithon.report.report import SiteReport
from trilithon.spec.masks import CacheLength, Chunked, LocalWindow, SlidingWindow, parts

LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Limits:
    """What bounds the keys and scores of one layer: 0 or None where nothing does.

    Attributes:
        window_keys: visible keys, the query's own included.
        chunk_keys: tokens of a chunk.
        softcap: c of `c * tanh(scores / c)`.
    """

    window_keys: int = 0
    chunk_keys: int = 0
    softcap: float | None = None


def promised(config: Any, layer: int) -> Limits | None:
    """What `config` says of a layer; None where it says nothing of windows, chunks or caps."""
    names = ("sliding_window", "attention_chunk_size", "attn_logit_softcapping")
    if not any(hasattr(config, name) for name in names) or getattr(config, "is_encoder_decoder", False):
        return None
    window, chunk, softcap = (getattr(config, name, None) for name in names)
    types = getattr(config, "layer_types", None)
    kind = types[layer] if types and layer < len(types) else None
    if kind is None:
        kind = "sliding_attention" if window and getattr(config, "use_sliding_window", True) else "full_attention"
    return Limits(
        window_keys=window or 0 if kind == "sliding_attention" else 0,
        chunk_keys=chunk or 0 if kind == "chunked_attention" else 0,
        softcap=softcap,
    )


def contained(site: SiteReport) -> Limits:
    """What the proved mask of a site has."""
    windows = [p.window_keys for p in parts(site.mask) if isinstance(p, (SlidingWindow, CacheLength))] if site.mask else []
    local = [p.before + 1 for p in parts(site.mask) if isinstance(p, LocalWindow)] if site.mask else []
    chunks = [p.chunk_keys for p in parts(site.mask) if isinstance(p, Chunked)] if site.mask else []
    return Limits(next((w for w in (*windows, *local) if w), 0), next(iter(chunks), 0), site.softcap)


def broken_promises(config: Any, sites: Iterable[SiteReport], ranges: Mapping[str, tuple[int, int | None]]) -> tuple[str, ...]:
    """A line for each proved causal layer whose mask is not what the configuration says.

    Args:
        config: a Hugging Face configuration, or None.
        ranges: size symbol -> lowest and highest value. A window no shorter than every example is no window.
    """
    longest = max((high for _, high in ranges.values() if high is not None), default=None)
    lines: dict[str, list[int]] = {}
    for site in sites:
        layer = LAYER.search(site.name)
        said = promised(config, int(layer[1])) if layer and config is not None else None
        if said is None or layer is None or site.verdict is not Verdict.PROVED or not _is_causal(site):
            continue
        for line in _differences(said, contained(site), longest):
            lines.setdefault(line, []).append(int(layer[1]))
    return tuple(f"{_layers(numbers)}: {line}" for line, numbers in lines.items())


def _is_causal(site: SiteReport) -> bool:
    """Encoders count windows in their own ways."""
    return any(name in str(site.mask) for name in ("causal", "window", "cache_length"))


def _differences(said: Limits, has: Limits, longest: int | None) -> list[str]:
    found = []
    for what, promise, fact in (("window", said.window_keys, has.window_keys), ("chunk", said.chunk_keys, has.chunk_keys)):
        never_reached = longest is not None and promise >= longest
        if promise != fact and not (never_reached and not fact):
            found.append(f"the configuration promises {_keys(what, promise)}, the exported graph has {_keys(what, fact)}")
    if (said.softcap or None) != (None if has.softcap is None else round(has.softcap, 4)):
        found.append(f"the configuration promises softcap {said.softcap}, the exported graph has {has.softcap}")
    return found


def _keys(what: str, keys: int) -> str:
    return f"a {what} of {keys} keys" if keys else f"no {what}"


def _layers(numbers: list[int]) -> str:
    unique = sorted(set(numbers))
    return f"layer {unique[0]}" if len(unique) == 1 else f"layers {', '.join(map(str, unique))}"
