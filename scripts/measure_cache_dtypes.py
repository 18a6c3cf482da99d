"""Print how far logits are off when K and V are kept in 8 bits: `python scripts/measure_cache_dtypes.py MODEL[:LAYERS] ...`.

A random prompt of 64 tokens, 32 tokens behind it a step each, against the model's own forward, float32 on the CPU: relative
error (Frobenius) of the logits of these steps, and bytes of the cache a token.
"""

from __future__ import annotations

import sys

import torch

import trilithon
from trilithon.bench.measure import random_ids
from trilithon.runtime.verify import relative_error

PROMPT, STEPS = 64, 32


@torch.no_grad()
def measured(name: str, layers: int | None) -> str:
    """One line of a Markdown table."""
    model = trilithon.load_model(name, device="cpu", layers=layers)
    ids = random_ids(model, PROMPT + STEPS)
    want = model(input_ids=ids, use_cache=False).logits[:, PROMPT:]
    cells = []
    for dtype in (None, "int8", "fp8"):
        options = trilithon.Options(cache_dtype=dtype, verify=False)  # type: ignore[arg-type]
        decoder = trilithon.compile(model, max_tokens=PROMPT + STEPS, options=options).decoder
        decoder.prefill(ids[:, :PROMPT], torch.zeros(1, dtype=torch.int64))
        steps = [decoder.decode(ids[:, i]).clone() for i in range(PROMPT, PROMPT + STEPS)]
        error = relative_error(torch.stack(steps, 1), want)
        cells.append(f"{error:.1e}, {decoder.most_cache_bytes // decoder.cache_tokens} bytes")
    return f"| {name}{f', {layers} layers' if layers else ''} | {' | '.join(cells)} |"


def main() -> None:
    print("| | float32 | int8 | fp8 |\n| --- | --- | --- | --- |")
    for argument in sys.argv[1:]:
        name, _, layers = argument.partition(":")
        print(measured(name, int(layers) if layers else None), flush=True)


if __name__ == "__main__":
    main()
