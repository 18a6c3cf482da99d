"""Torch-TensorRT with and without Trilithon: errors against eager, milliseconds a call. Needs an NVIDIA GPU; `--json FILE`."""

import json
import sys
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

TOKENS, VALID = 2048, {"bert": 700}  # each row is of TOKENS; the second row of an encoder is padding behind VALID
SIZES = {"num_hidden_layers": 4, "vocab_size": 1000, "hidden_size": 1024, "intermediate_size": 2816, "use_cache": False}
SIZES |= {"num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": TOKENS}
MODELS = {"encoder, padding": (BertForMaskedLM, BertConfig(**SIZES)), "causal": (LlamaForCausalLM, LlamaConfig(**SIZES))}
MODELS["sliding window"] = (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=64))
KERNELS = {"efficient": [SDPBackend.EFFICIENT_ATTENTION], "any": [*map(SDPBackend, range(4))]}


class Logits(torch.nn.Sequential):
    def forward(self, input_ids, attention_mask=None):
        return self[0](input_ids, attention_mask).logits


@torch.no_grad()
def measure(kind, config, kernels, torch_tensorrt, plugin):
    torch.manual_seed(0)
    model, ids = Logits(kind(config)).eval().half().cuda(), torch.randint(0, 1000, (2, TOKENS)).cuda()
    mask = (torch.arange(TOKENS) < torch.tensor([[TOKENS], [VALID.get(config.model_type, TOKENS)]])).long().cuda()
    inputs = (ids, mask)[: 1 + (config.model_type in VALID)]
    expected = model(*inputs)
    found = {"largest logit": float(expected[mask.bool()].abs().max())}
    for label in ("eager", "default", "trilithon"):
        (plugin.install if label == "trilithon" else plugin.uninstall)()
        try:
            with sdpa_kernel(kernels):  # the kernel that eager would take is what stands in the graph
                program = torch.export.export(model, inputs, strict=False)
                f = model if label == "eager" else torch_tensorrt.dynamo.compile(program, arg_inputs=inputs)
                found[f"{label} error"] = float((f(*inputs) - expected)[mask.bool()].abs().max())  # padding has no meaning
                run = Timer("f(*x)", globals={"f": f, "x": inputs}).blocked_autorange(min_run_time=0.5)
            found[f"{label} ms"] = run.median * 1e3
        except Exception as error:
            found[f"{label} fails"] = str(error).partition("\n")[0]
    return found


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("this needs an NVIDIA GPU: Torch-TensorRT cannot even be imported without one")
    import torch_tensorrt

    from trilithon.integrations import torch_tensorrt as plugin

    rows = {f"{name}, {k}": measure(*MODELS[name], KERNELS[k], torch_tensorrt, plugin) for k in KERNELS for name in MODELS}
    made = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "torch_tensorrt": plugin.version(), "rows": rows}
    print(json.dumps(made, indent=2))
    if "--json" in sys.argv:
        Path(sys.argv[-1]).write_text(json.dumps(made, indent=2))
