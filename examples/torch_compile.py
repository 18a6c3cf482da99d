"""torch.compile with and without Trilithon's proofs: same numbers, no mask where it is proved causal."""

import torch
from torch.utils.benchmark import Timer

import trilithon
from trilithon.integrations import dynamo

TOKENS = 1024

dynamo.register()  # an installed package is known without this
model = trilithon.load_model("byte-llama").model  # hidden states, without the logits
ids = torch.randint(256, (1, TOKENS))

plain = torch.compile(model)
proved = torch.compile(model, backend="trilithon")
with torch.no_grad():
    expected = model(ids, use_cache=False).last_hidden_state
    for name, compiled in (("inductor", plain), ("trilithon", proved)):
        error = (compiled(ids, use_cache=False).last_hidden_state - expected).abs().max()
        milliseconds = Timer("f(x, use_cache=False)", globals={"f": compiled, "x": ids}).timeit(3).median * 1e3
        print(f"{name:10} {milliseconds:6.1f} ms a call of {TOKENS} tokens, off eager by at most {error:.1e}")

for report in dynamo.reports():
    print(report)
