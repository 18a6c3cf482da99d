"""What each attention site of the zoo must be proved to be, written down from what the model's authors say of it."""

from __future__ import annotations

from zoo.families import Family
from zoo.modes import CACHED

PADDED = ("ids+padding", "ids+both")


def expected(family: Family, mode: str, site: str, index: int) -> str:
    """The mask's canonical text, and the bias after " + " where there is one.

    Args:
        site: the module's path, without "#2".
        index: the site's number among those of its kind (self or cross attention, of one stack).
    """
    mask = _mask(family, mode, site, index)
    bias = family.bias if "EncDec" not in site and "cross" not in site else ""
    return f"{mask} + {bias}" if bias else mask


def _mask(family: Family, mode: str, site: str, index: int) -> str:
    padded = mode in PADDED
    if family.kind == "decoder":
        own = family.masks[index % len(family.masks)]
        if mode in CACHED:
            return "cache_length(start)" if own == "causal" else own
        if padded:  # chunks are counted from the first token that is no padding
            own = own.replace("chunked(6)", "chunked(6, attention_mask)")
        elif mode == "ids+positions":  # and by position: transformers 5.23 by position_ids, 5.17 by index
            own = own.replace("chunked(6)", "chunked(6")
        return _joined(own, "padding(attention_mask)" if padded else "")
    if family.kind == "encoder":
        return _joined(family.masks[index % len(family.masks)], "padding(attention_mask)" if padded else "")
    if family.kind == "vision" or (family.config == "Whisper" and "decoder" not in site):
        return "full"
    if "decoder" not in site or "EncDec" in site or "encoder_attn" in site:
        return "padding(attention_mask)" if padded and family.config != "Whisper" else "full"
    return _joined("causal", "padding(decoder_attention_mask)" if padded else "")


def _joined(*parts: str) -> str:
    """Masks joined by "and", as `trilithon.spec.masks.conjunction` writes them."""
    kept = sorted(part for joined in parts for part in joined.split(" & ") if part and part != "full")
    return " & ".join(kept) if kept else "full"
