"""A model of your own, with a sliding window: proved, compiled with a KV cache, run."""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import trilithon

WINDOW = 8  # keys, the query's own included


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        token = torch.arange(x.shape[1], device=x.device)
        distance = token[:, None] - token
        mask = (distance >= 0) & (distance < WINDOW)
        return x + self.out(scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, vocabulary=256, width=64, layers=2, heads=4):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(128, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, idx):
        positions = torch.arange(idx.shape[1], device=idx.device)
        return self.head(self.blocks(self.tokens(idx) + self.positions(positions)))


torch.manual_seed(0)
model = Model().eval()
llm = trilithon.compile(model, {"idx": torch.ones(2, 8, dtype=torch.int64)}, max_tokens=64)
print(llm.report)

prompt = torch.randint(256, (1, 12))
tokens = llm.generate(prompt, max_new_tokens=20)

expected = prompt
with torch.no_grad():
    for _ in range(20):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=-1)
print("tokens:", tokens[0].tolist())
print("same as the model without a cache:", torch.equal(tokens, expected))
