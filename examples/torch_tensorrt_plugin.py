"""Torch-TensorRT with and without Trilithon: errors against eager, and milliseconds a call. Needs an NVIDIA GPU.

pip install torch-tensorrt-rtx trilithon && python examples/torch_tensorrt_plugin.py --json result.json
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import transformers

SIZES = {"num_hidden_layers": 4, "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
TOKENS = 512


def models():
    """Name -> the model and its inputs: an encoder with padding, a sliding window, a causal model."""
    ids, mask = torch.randint(0, 1000, (2, TOKENS)), torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, TOKENS // 2 :] = 0
    grouped = {**SIZES, "num_key_value_heads": 8}
    yield "encoder, padding", transformers.BertConfig(**SIZES), (ids, mask)
    yield "sliding window", transformers.MistralConfig(**grouped, sliding_window=64), (ids,)
    yield "causal", transformers.LlamaConfig(**grouped), (ids,)


class Hidden(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.model = transformers.AutoModel.from_config(config, attn_implementation="sdpa")
        self.more = {} if config.model_type == "bert" else {"use_cache": False}

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **self.more).last_hidden_state


def measure(run, inputs):
    for _ in range(5):
        result = run(*inputs)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        run(*inputs)
    torch.cuda.synchronize()
    return result, (time.perf_counter() - start) / 20 * 1e3


def row(name, config, inputs, plugin):
    import torch_tensorrt

    torch.manual_seed(0)
    model, inputs = Hidden(config).eval().half().cuda(), [x.cuda() for x in inputs]
    expected, eager_ms = measure(model, inputs)
    found = {"model": name, "eager ms": eager_ms}
    for label, prepare in (("default", plugin.uninstall), ("trilithon", plugin.install)):
        prepare()
        program = torch.export.export(model, tuple(inputs), strict=False)
        result, ms = measure(torch_tensorrt.dynamo.compile(program, arg_inputs=inputs), inputs)
        kept = torch.ones_like(expected[..., 0]).bool() if len(inputs) == 1 else inputs[1].bool()  # padding has no meaning
        found |= {f"{label} error": float((result - expected)[kept].abs().max()), f"{label} ms": ms}
    return found


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this needs an NVIDIA GPU: Torch-TensorRT cannot even be imported without one")
    from trilithon.integrations import torch_tensorrt as plugin

    with torch.no_grad():
        rows = [row(*given, plugin) for given in models()]
    for found in rows:
        print("  ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{value:<18}" for key, value in found.items()))
    if chosen.json:
        chosen.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
