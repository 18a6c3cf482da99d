"""Build TensorRT engines for an Ampere GPU on a machine without one, save them, and look into the folder."""

import sys
from pathlib import Path
from tempfile import mkdtemp

import torch

import trilithon
from trilithon.artefact.inspection import as_text, inspect

folder = Path(sys.argv[1] if len(sys.argv) > 1 else mkdtemp(prefix="engines-"))

model = trilithon.load_model("byte-llama", dtype=torch.bfloat16)
options = trilithon.Options(gpu="sm80")
llm = trilithon.compile(model, backend="tensorrt", max_tokens=128, options=options)
print(llm.report)

llm.save(folder, trilithon.load_tokenizer("byte-llama"))
print(as_text(inspect(folder)))
print(f"on a machine with such a GPU: trilithon generate {folder} --prompt 'The for statement'")
