"""What a report says of a KV cache."""

from __future__ import annotations

from collections.abc import Sequence

from trilithon.errors import CannotCache
from trilithon.runtime.decoder import CachedDecoder


def cache_notes(decoder: CachedDecoder | CannotCache) -> tuple[str, ...]:
    if isinstance(decoder, CannotCache):
        return (f"no KV cache: {decoder.why}" + (f" (at {decoder.where})" if decoder.where else ""),)
    rows = "1 row" if decoder.max_batch == 1 else f"{decoder.max_batch} rows"
    return (f"KV cache: {decoder.cache_tokens} tokens x {rows}, {decoder.most_cache_bytes / 1e6:.1f} MB",)


def kept_notes(cache_dtype: str | None, errors: Sequence[float]) -> tuple[str, ...]:
    """What a report says of a cache of 8 bits: that it is an approximation, and how good a one.

    Args:
        errors: what `verify_decoder` gave; none where the options ask for no verification.
    """
    if cache_dtype is None:
        return ()
    found = f"{errors[-1]:.1e} on the canary prompts" if errors else "not measured, since verify=False"
    return (f"K and V are kept in {cache_dtype}, an approximation: relative error of the logits against eager {found}",)
