"""Every code block of the README and of docs/ runs, in one namespace a file, in an empty folder with a tiny model in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import trilithon
from documentation.blocks import ROOT, blocks, check, check_trilithon
from runtime.tiny_llama import tiny_llama
from trilithon.capture import presets
from trilithon.integrations import dynamo
from trilithon.lift.registry import HANDLERS
from trilithon.lower.tensorrt.converters.registry import CONVERTERS

FILES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
WITH_BLOCKS = [path for path in FILES if "```python" in path.read_text() or "```bash" in path.read_text()]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A Llama of one layer over bytes, with random weights, and a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=256, num_hidden_layers=1, max_position_embeddings=8192).save_pretrained(folder)
    trilithon.load_tokenizer("byte-llama").save_pretrained(folder)
    return folder


@pytest.fixture
def one_layer(monkeypatch) -> None:
    """Presets with random weights have one layer and few words: most of a model of one layer is its vocabulary."""

    def cut(config: Any) -> Any:
        config.num_hidden_layers = 1
        config.vocab_size = 1024
        return config

    for name, preset in presets.PRESETS.items():
        if preset.config is not None:
            make = preset.config
            monkeypatch.setitem(presets.PRESETS, name, replace(preset, config=partial(lambda make: cut(make()), make)))


@pytest.fixture
def tables() -> Iterator[None]:
    """What a page adds to the tables of handlers and converters is taken out again."""
    kept = [(table, dict(table)) for table in (HANDLERS, CONVERTERS)]
    yield
    for table, before in kept:
        table.clear()
        table.update(before)


def namespace(folder: Path, path: Path) -> dict[str, Any]:
    """What the reader of a page has before it begins: a model, prompts, and a program of his own."""
    if path.name not in ("README.md", "artefacts.md", "backends.md", "integrations.md"):
        return {}
    ids = torch.randint(256, (1, 8))
    attend = Attend().eval()
    x = torch.randn(2, 2, 8, 16)
    return {
        "trilithon": trilithon,
        "model": trilithon.load_model(str(folder)),
        "tokenizer": trilithon.load_tokenizer(str(folder)),
        "ids": ids,
        "input_ids": ids,
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 4},
        "first_turn": ids,
        "second_turn": torch.cat([ids, torch.randint(256, (1, 80))], dim=-1),
        "exported_program": torch.export.export(attend, (x, x, x)),
    }


class Attend(torch.nn.Module):
    def forward(self, q, k, v):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("path", WITH_BLOCKS, ids=lambda path: path.relative_to(ROOT).as_posix())
@pytest.mark.usefixtures("tables", "one_layer")
@torch._dynamo.config.patch(fake_tensor_cache_enabled=True)  # as PyTorch has it
def test_every_block_runs(path, model_folder, tmp_path, monkeypatch):
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(model_folder)
    monkeypatch.chdir(tmp_path)
    torch.compiler.reset()
    dynamo.register()  # as the entry point of an installed package does
    ran = 0
    for block in blocks(path, namespace(model_folder, path)):
        block.evaluate()
        ran += 1
    assert ran == path.read_text().count("```python\n") + path.read_text().count("```bash\n")


def test_a_block_that_is_not_run_is_checked():
    check("import torch_tensorrt\nx = torch_tensorrt.compile(torch.ones(1).cuda())\nprint(x)", {"torch": torch})
    with pytest.raises(AssertionError, match="unknown names"):
        check("print(y)", {})
    with pytest.raises(AttributeError, match="no_such"):
        check("torch.no_such(1)", {"torch": torch})
    with pytest.raises(ModuleNotFoundError):
        check("import no_such_package", {})


@pytest.mark.parametrize("line", ["explain llama-3.2-1b --no-such", "generate x --max-new-tokens y", "no-such"])
def test_a_wrong_command_line_is_found(line):
    with pytest.raises(Exception, match=r"No such (option|command)|valid integer"):
        check_trilithon(["trilithon", *line.split()])
