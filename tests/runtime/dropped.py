"""Is a compiled model given up when nobody refers to it, and who holds it if not?"""

from __future__ import annotations

import gc
import types
import weakref
from typing import Any

import torch

import trilithon

DEPTH, MOST = 12, 40


def compiled_and_dropped(device: str, **options: Any) -> list[weakref.ref[Any]]:
    """The model, what was compiled of it, and one of its weights, when all has run once and gone out of sight."""
    model: Any = trilithon.load_model("qwen3-0.6b", device=device, layers=1, dtype=torch.float16 if device == "cuda" else None)
    llm = trilithon.compile(model, max_tokens=64, backend="native", options=trilithon.Options(**options))
    llm.generate(torch.arange(3, 23, device=device)[None], max_new_tokens=12, eos_token_id=None)
    return [weakref.ref(x) for x in (model, llm, model.lm_head.weight)]


def holders(value: object) -> str:
    """Who refers to `value`, and to these in turn, a line each."""
    gc.collect()
    lines: list[str] = []
    seen = {id(value), id(lines)}

    def look(value: object, depth: int) -> None:
        found = gc.get_referrers(value)
        seen.add(id(found))
        for each in found:
            own = isinstance(each, types.FrameType) and each.f_code.co_filename == __file__ and "look" in each.f_code.co_name
            if id(each) in seen or own or len(lines) >= MOST or depth > DEPTH:
                continue
            seen.add(id(each))
            lines.append(f"{'  ' * depth}{type(each).__module__}.{type(each).__name__} {repr(each)[:150]!r}")
            look(each, depth + 1)

    look(value, 0)
    return "\n".join(lines)
