"""Compile a small trained model, generate with its cache, and compare with the model itself."""

import time

import torch

import trilithon


def timed(call):
    start = time.perf_counter()
    return call(), time.perf_counter() - start


model = trilithon.load_model("byte-llama")
tokenizer = trilithon.load_tokenizer("byte-llama")
prompt = tokenizer("The for statement is used to", return_tensors="pt").input_ids

llm = trilithon.compile(model, max_tokens=256)  # proved, rewritten, and held to the model before you get it
print(llm.report)

tokens, seconds = timed(lambda: llm.generate(prompt, max_new_tokens=64))
with torch.no_grad():
    expected, eager_seconds = timed(lambda: model.generate(prompt, max_new_tokens=64, do_sample=False, use_cache=False))
print(tokenizer.decode(tokens[0]))
print(f"64 tokens in {seconds * 1e3:.0f} ms; by the model without a cache {eager_seconds * 1e3:.0f} ms")
print("same tokens as eager:", torch.equal(tokens, expected))

result = llm.generate(prompt, max_new_tokens=64, prompt_lookup_num_tokens=10, return_dict_in_generate=True)
print(f"with drafts from the text itself: {result.accepted} of {result.drafted} tokens were kept")
print("and the tokens are the same:", torch.equal(result.sequences, tokens))
