"""Torch-TensorRT with and without Trilithon: errors against eager, milliseconds a call. Needs an NVIDIA GPU; `--json FILE`."""

import json
import sys
from pathlib import Path

import torch
import transformers
from torch.utils.benchmark import Timer

SIZES = {"num_hidden_layers": 4, "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 8}
MODELS = {
    "encoder, padding": transformers.BertConfig(**SIZES),
    "sliding window": transformers.MistralConfig(**SIZES, sliding_window=64),
    "causal": transformers.LlamaConfig(**SIZES),
}


class Hidden(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.model = transformers.AutoModel.from_config(config, attn_implementation="sdpa")
        self.more = {} if config.model_type == "bert" else {"use_cache": False}

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **self.more).last_hidden_state


def measure(config, plugin, torch_tensorrt):
    torch.manual_seed(0)
    model, ids = Hidden(config).eval().half().cuda(), torch.randint(0, 1000, (2, 512)).cuda()
    mask = torch.ones_like(ids)
    mask[1, 256 * (config.model_type == "bert") or 512 :] = 0
    inputs = (ids, mask) if config.model_type == "bert" else (ids,)
    expected, found = model(*inputs), {"eager ms": Timer("f(*x)", globals={"f": model, "x": inputs}).timeit(20).mean * 1e3}
    for label, prepare in (("default", plugin.uninstall), ("trilithon", plugin.install)):
        prepare()
        program = torch.export.export(model, inputs, strict=False)
        engine = torch_tensorrt.dynamo.compile(program, arg_inputs=inputs)
        found[f"{label} error"] = float((engine(*inputs) - expected)[mask.bool()].abs().max())  # padding has no meaning
        found[f"{label} ms"] = Timer("f(*x)", globals={"f": engine, "x": inputs}).timeit(20).mean * 1e3
    return found


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("this needs an NVIDIA GPU: Torch-TensorRT cannot even be imported without one")
    import torch_tensorrt

    from trilithon.integrations import torch_tensorrt as plugin

    with torch.no_grad():
        rows = {name: measure(config, plugin, torch_tensorrt) for name, config in MODELS.items()}
    for name, found in rows.items():
        print(f"{name:<18}", *(f"{key} {value:.3g}" for key, value in found.items()), sep="  ")
    if sys.argv[1:2] == ["--json"]:
        Path(sys.argv[2]).write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}, indent=2))
