"""What is found of a program once on a machine: found again where anything that it depends on is another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from lower.test_prompt_parts import prompt_of
from trilithon.errors import VerificationFailed
from trilithon.lower.inputs import Axis, Input
from trilithon.lower.native import compared
from trilithon.lower.native.compared import compare_once
from trilithon.lower.native.fused import one_token, remembered
from trilithon.lower.native.fused.one_token import at_one_token

TOKENS = (Input("input_ids", torch.int64, (Axis(1, 1, 1), Axis(1, 8, 8))),)


class Kernel(nn.Module):
    """Stands for a generated one."""

    def __init__(self, source: str, rows: int) -> None:
        super().__init__()
        self.source, self.rows = source, rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def program(source: str = "a", rows: int = 1, width: int = 4, twice: bool = False) -> GraphModule:
    root, graph = nn.Module(), torch.fx.Graph()
    root.kernel = Kernel(source, rows)
    root.weight = nn.Parameter(torch.randn(width))
    x = graph.placeholder("x")
    for _ in range(1 + twice):
        x = graph.call_module("kernel", (x,))
    graph.output(graph.call_function(torch.mul, (x, graph.get_attr("weight"))))
    return GraphModule(root, graph)


class Counted:
    """A comparison that passes."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, *given: Any) -> None:
        self.times += 1


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRILITHON_CACHE", str(tmp_path))
    return tmp_path


def test_once_for_the_same_programs() -> None:
    """Whatever their weights are; and programs of one text are the same in any process."""
    count = Counted()
    for _ in range(3):
        compare_once(count, program(), program(), TOKENS)
    assert count.times == 1


@pytest.mark.parametrize(
    ("made", "inputs"),
    [
        (program("b"), TOKENS),
        (program(rows=2), TOKENS),
        (program(width=8), TOKENS),
        (program(twice=True), TOKENS),
        (program(), (Input("input_ids", torch.int64, (Axis(1, 1, 1), Axis(1, 8, 9))),)),
    ],
    ids=["source", "settings", "sizes", "graph", "inputs"],
)
def test_again_for_others(made: GraphModule, inputs: tuple[Input, ...]) -> None:
    count = Counted()
    compare_once(count, program(), program(), TOKENS)
    compare_once(count, program(), made, inputs)
    assert count.times == 2


@pytest.mark.parametrize("what", ["get_device_name", "triton_version", "source"])
def test_again_elsewhere(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = Counted()
    compare_once(count, program(), program(), TOKENS)
    if what == "get_device_name":
        monkeypatch.setattr(compared, "device_of", lambda gm: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, what, lambda device: "another GPU")
    else:
        monkeypatch.setattr(remembered, what, lambda: "another")
    compare_once(count, program(), program(), TOKENS)
    assert count.times == 2


def test_again_where_the_source_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "source", lambda: None)
    count = Counted()
    for _ in range(2):
        compare_once(count, program(), program(), TOKENS)
    assert count.times == 2


def test_one_that_fails_is_not_kept() -> None:
    def wrong(*given: Any) -> None:
        raise VerificationFailed("they disagree")

    for _ in range(2):
        with pytest.raises(VerificationFailed):
            compare_once(wrong, program(), program(), TOKENS)


def test_a_folder_that_takes_nothing(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(remembered, "replace_file", full)
    count = Counted()
    for _ in range(2):
        compare_once(count, program(), program(), TOKENS)
    assert count.times == 2 and "what was found of a program is not kept: no space left on device" in caplog.text


@pytest.mark.parametrize(
    "change", [lambda text: text[:-1], lambda text: text.replace("tru", "fals"), lambda text: "true", lambda text: ""]
)
def test_again_where_a_file_was_changed(change: Callable[[str], str], own_folder: Path) -> None:
    count = Counted()
    compare_once(count, program(), program(), TOKENS)
    (file,) = (own_folder / "kernels").glob("*.same")
    whole = file.read_text()
    file.write_text(change(whole))
    compare_once(count, program(), program(), TOKENS)
    assert count.times == 2 and file.read_text() == whole


def test_sizes_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, inputs = prompt_of("llama", 1)
    found = [sizes(at_one_token(gm, inputs, tokens)) for tokens in (1, 7)]
    monkeypatch.setattr(one_token, "_run", None)
    assert [sizes(at_one_token(gm, inputs, tokens)) for tokens in (1, 7)] == found
    assert found[0] != found[1]
    with pytest.raises(TypeError, match="not callable"):
        at_one_token(gm, inputs, 8)


def sizes(gm: GraphModule) -> list[Any]:
    values = [n.meta["val"] for n in gm.graph.nodes]
    return [(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, torch.Tensor) else x for x in values]
