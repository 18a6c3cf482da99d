"""Torch-TensorRT with and without Trilithon: errors against eager, milliseconds a call. Needs an NVIDIA GPU; `--json FILE`."""

import json
import sys
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from transformers import AutoModel, BertConfig, LlamaConfig, MistralConfig

SIZES = {"num_hidden_layers": 4, "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024, "use_cache": False}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 8}
MODELS = {"encoder, padding": BertConfig(**SIZES), "sliding window": MistralConfig(**SIZES, sliding_window=64)}
MODELS["causal"] = LlamaConfig(**SIZES)
KERNELS = {"efficient": [SDPBackend.EFFICIENT_ATTENTION], "any": [*map(SDPBackend, range(4))]}


class Hidden(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.model = AutoModel.from_config(config, attn_implementation="sdpa")

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids, attention_mask).last_hidden_state


@torch.no_grad()
def measure(config, kernels, torch_tensorrt, plugin):
    torch.manual_seed(0)
    model, ids = Hidden(config).eval().half().cuda(), torch.randint(0, 1000, (2, 512)).cuda()
    mask = (torch.arange(512) < torch.tensor([[512], [256 if config.model_type == "bert" else 512]])).long().cuda()
    inputs = (ids, mask)[: 1 + (config.model_type == "bert")]
    expected, found = model(*inputs), {"eager ms": Timer("f(*x)", globals={"f": model, "x": inputs}).timeit(20).mean * 1e3}
    for label in ("default", "trilithon"):
        (plugin.uninstall if label == "default" else plugin.install)()
        try:
            with sdpa_kernel(kernels):  # the kernel that eager would take is what stands in the graph
                engine = torch_tensorrt.dynamo.compile(torch.export.export(model, inputs, strict=False), arg_inputs=inputs)
            found[f"{label} error"] = float((engine(*inputs) - expected)[mask.bool()].abs().max())  # padding has no meaning
            found[f"{label} ms"] = Timer("f(*x)", globals={"f": engine, "x": inputs}).timeit(20).mean * 1e3
        except Exception as error:
            found[f"{label} fails"] = str(error).partition("\n")[0]
    return found


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("this needs an NVIDIA GPU: Torch-TensorRT cannot even be imported without one")
    import torch_tensorrt

    from trilithon.integrations import torch_tensorrt as plugin

    rows = {f"{name}, {k}": measure(MODELS[name], KERNELS[k], torch_tensorrt, plugin) for k in KERNELS for name in MODELS}
    made = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "torch_tensorrt": plugin.version(), "rows": rows}
    print(json.dumps(made, indent=2))
    if "--json" in sys.argv:
        Path(sys.argv[-1]).write_text(json.dumps(made, indent=2))
