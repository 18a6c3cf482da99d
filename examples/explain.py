"""Prove what the masks of two models mean: Mistral's window, and one that looks causal but is not."""

import torch
from torch.nn.functional import scaled_dot_product_attention

import trilithon


class NearMiss(torch.nn.Module):
    """Attention with a mask that is causal but for one cell."""

    def forward(self, q, k, v):
        rows = torch.arange(q.shape[-2])[:, None]
        columns = torch.arange(k.shape[-2])
        mask = (columns <= rows) & ~((rows == 40) & (columns == 3))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)


mistral = trilithon.load_model("mistral-7b", layers=1, device="meta")  # its exact sizes; no weight is made
print(trilithon.explain(mistral))

q = k = v = torch.randn(2, 4, 64, 16)
report = trilithon.explain(NearMiss().eval(), {"q": q, "k": k, "v": v})
print(report)

(site,) = report.sites
print("the mask is", site.verdict.value, "to be", site.mask)
print("it is not", site.nearest, "as this cell shows:", site.witness)

window = trilithon.SlidingWindow(4)
print(f"{window} over 8 tokens:")
for row in window.materialize(1, 1, 8, 8)[0, 0].tolist():
    print("  " + "".join("█" if allowed else "·" for allowed in row))
