"""Train byte-llama, the small real checkpoint that ships with Trilithon, on text that ships with Python.

Text: the prose paragraphs of `pydoc_data.topics` (the language reference) and of Python's license file, and the
opening paragraph of each module docstring of the standard library. Source files are parsed, never imported, and read
in sorted order, so one Python version always gives one corpus. Paragraphs of code, grammar and tables are left out,
lines are unwrapped and the quotes around single words are dropped, so that a plain prompt continues in plain English.

    python scripts/train_byte_llama.py --out src/trilithon/data/byte-llama

The checkpoint in the repository came from that line; its README.md holds the time, the machine and the losses. The
run is seeded, and nothing in it depends on the clock.
"""

from __future__ import annotations

import argparse
import ast
import math
import pydoc_data.topics
import re
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

BOS, EOS, PAD = 256, 257, 258
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "distutils", "tkinter", "turtledemo"}
PROMPTS = ("The for statement is used to", "A class definition is", "Return the number of")
BATCH_TOKENS = 1024
PEAK_RATE = 3e-3
# Most steps see short windows, which are cheap; every eighth sees the full context, so that every position is trained.
# Full windows kept for the end do harm: by then nothing holds beyond the short length, and the loss jumps tenfold.
SHORT_TOKENS, FULL_TOKENS, FULL_EVERY = 128, 1024, 8


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=259,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=FULL_TOKENS,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """Token `n` is byte `n`; 256, 257 and 258 are the special tokens. There are no merges."""
    alphabet = bytes_to_unicode()
    core = Tokenizer(models.BPE(vocab={alphabet[byte]: byte for byte in range(256)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True) for name in ("<|bos|>", "<|eos|>", "<|pad|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=FULL_TOKENS,
    )


def documents() -> Iterator[list[str]]:
    """The paragraphs of every document, in a fixed order."""
    for _, topic in sorted(pydoc_data.topics.topics.items()):
        yield prose(topic)
    stdlib = Path(sysconfig.get_path("stdlib"))
    yield prose((stdlib / "LICENSE.txt").read_text(encoding="utf-8"))
    for path in sorted(stdlib.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(stdlib).parts):
            yield prose(ast.get_docstring(ast.parse(path.read_bytes())) or "")[:1]


def prose(text: str) -> list[str]:
    """The paragraphs of `text` that read as English sentences, each on one line."""
    paragraphs = (" ".join(lines.split()) for lines in re.split(r"\n\s*\n", text))
    return [re.sub(r"[\"“'`*]+([\w.]+)[\"”'`*]+", r"\1", paragraph) for paragraph in paragraphs if is_prose(paragraph)]


def is_prose(paragraph: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    ends = paragraph.endswith((".", ":", ";"))
    plain = not re.search(r">>>|::=|[#=|_*-]{3}|[{}\\]", paragraph)
    return len(paragraph) >= 40 and ends and plain and letters >= 0.87 * len(paragraph) and paragraph[0].isupper()


def corpus() -> tuple[Tensor, Tensor]:
    """Training and held-out tokens; every twentieth document is held out, and a paragraph counts once."""
    seen: set[str] = set()
    streams: tuple[list[int], list[int]] = ([], [])
    for index, paragraphs in enumerate(documents()):
        new = [paragraph for paragraph in dict.fromkeys(paragraphs) if paragraph not in seen]
        seen.update(new)
        if new:
            streams[index % 20 == 19].extend([BOS, *"\n\n".join(new).encode(), EOS])
    train, held_out = (torch.tensor(stream) for stream in streams)
    print(f"{len(train):,} training tokens, {len(held_out):,} held out")
    return train, held_out


def windows(stream: Tensor, starts: Tensor, tokens: int) -> Tensor:
    return stream[starts[:, None] + torch.arange(tokens + 1, device=stream.device)]


def loss_of(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats a byte."""
    logits = model(batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, stream: Tensor) -> float:
    """Loss over the first 64 full-context windows of `stream`, or all it has."""
    starts = torch.arange(0, len(stream) - FULL_TOKENS - 1, FULL_TOKENS, device=stream.device)[:64]
    losses = [loss_of(model, windows(stream, part, FULL_TOKENS)).item() for part in starts.split(8)]
    return sum(losses) / len(losses)


def train(model: LlamaForCausalLM, stream: Tensor, steps: int, seed: int) -> None:
    """AdamW under a warm-up and a cosine decay to 2 % of the peak rate."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)
    random = torch.Generator().manual_seed(seed)
    began = time.monotonic()
    for step in range(steps):
        warm, progress = min(1.0, (step + 1) / 50), step / steps
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        tokens = FULL_TOKENS if step % FULL_EVERY == 0 else SHORT_TOKENS
        starts = torch.randint(len(stream) - tokens - 1, (BATCH_TOKENS // tokens,), generator=random)
        loss = loss_of(model, windows(stream, starts.to(stream.device), tokens))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 1:
            print(f"step {step:5d}  loss {loss.item():.3f} nats/byte  {time.monotonic() - began:5.0f} s", flush=True)


@torch.no_grad()
def sample(model: LlamaForCausalLM, text: PreTrainedTokenizerFast, prompt: str) -> str:
    ids = text(prompt, return_tensors="pt").input_ids.to(model.device)
    return text.decode(model.generate(ids, max_new_tokens=64, do_sample=False, attention_mask=torch.ones_like(ids))[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stream, held_out = (part.to(device) for part in corpus())
    model = LlamaForCausalLM(config()).to(device)
    print(f"{model.num_parameters():,} parameters on {device}, torch {torch.__version__}, {args.threads} threads")
    began = time.monotonic()
    train(model, stream, args.steps, args.seed)
    print(f"{args.steps} steps of {BATCH_TOKENS} tokens in {(time.monotonic() - began) / 60:.1f} minutes")
    model.half().float().eval()  # what is measured is what is saved
    print(f"loss: training text {evaluate(model, stream):.3f}, held out {evaluate(model, held_out):.3f} nats/byte")
    model.half().save_pretrained(args.out)
    text = tokenizer()
    text.save_pretrained(args.out)
    for prompt in PROMPTS:
        print(repr(sample(model.float(), text, prompt)))


if __name__ == "__main__":
    main()
