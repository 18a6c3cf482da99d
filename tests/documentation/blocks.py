"""Run the code blocks of a Markdown file: Python in one namespace a file, shell lines through Trilithon's own parser.

A Python block below `<!-- not run: why -->` is compiled, its imports are run, and each name in it must be known.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import typer
from sybil import Example
from sybil.document import Document
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

from trilithon import cli

ROOT = Path(__file__).parents[2]
NOT_RUN = re.compile(r"<!-- not run: .+ -->\s*\Z")
NOT_HERE = ("torch_tensorrt",)  # packages that need a GPU to be imported
CHEAP = ("doctor", "inspect artefact", "inspect engines", "generate artefact")  # commands that are run, on what a page saved
RUN_IN = ("quickstart.md", "air-gapped.md")  # elsewhere they are parsed


def blocks(path: Path, namespace: dict[str, Any]) -> Iterator[Example]:
    """The blocks of a file, in order; `evaluate` runs one."""
    python, shell = CodeBlockParser("python", run_python), CodeBlockParser("bash", run_shell)
    document = Document.parse(str(path), python, shell)
    document.namespace.update(namespace)
    return document.examples()


# ------------------------------------------------------------ Python


def run_python(example: Example) -> None:
    before = example.document.text[: example.region.start]
    if NOT_RUN.search(before) is None:
        PythonEvaluator()(example)
    else:
        check(example.parsed, example.namespace)


def check(source: str, namespace: dict[str, Any]) -> None:
    """Compile, run the imports, and look up every name, and every attribute of a module."""
    tree = ast.parse(source)
    known = dict(namespace)
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            import_node(node, known)
    walked = list(ast.walk(tree))
    made = {x.id for x in walked if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
    used = {x.id for x in walked if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load)}
    assert used <= made | known.keys() | vars(builtins).keys(), f"unknown names in\n{source}"
    for node in walked:
        if isinstance(node, ast.Attribute) and ast.unparse(node).split(".")[0] in known.keys() - made:
            look_up(ast.unparse(node), known)


def import_node(node: ast.Import | ast.ImportFrom, known: dict[str, Any]) -> None:
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
    if any(str(module).split(".")[0] in NOT_HERE for module in modules):
        known.update({(alias.asname or alias.name).split(".")[0]: MagicMock() for alias in node.names})
    else:
        exec(compile(ast.Module([node], []), "<imports>", "exec"), known)


def look_up(dotted: str, known: dict[str, Any]) -> None:
    """`a.b.c`; calls on the way, whose result nobody knows, end the search."""
    value: Any = known[dotted.split(".")[0]]
    for name in dotted.split(".")[1:]:
        if not name.isidentifier():
            return
        value = getattr(value, name)


# ------------------------------------------------------------ shell


def run_shell(example: Example) -> None:
    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            COMMANDS[words[0]](words)
        if words[:1] == ["trilithon"] and Path(example.path).name in RUN_IN and is_cheap(words):
            typer.main.get_command(cli.app).main(words[1:], standalone_mode=False)


def check_trilithon(words: list[str]) -> None:
    """Parse the command line."""
    group = typer.main.get_command(cli.app)
    context = group.make_context("trilithon", words[1:])
    name, command, rest = group.resolve_command(context, words[1:])
    command.make_context(name, list(rest), parent=context)


def is_cheap(words: list[str]) -> bool:
    return " ".join(words[1:3]).startswith(CHEAP)


def check_make(words: list[str]) -> None:
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"make has no {words[1]}"


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.findall(r"trilithon\[([\w,]+)\]", " ".join(words))
    assert any(word.startswith("trilithon") for word in words) and {x for a in asked for x in a.split(",")} <= extras.keys()


def check_python(words: list[str]) -> None:
    assert (ROOT / words[1]).exists(), words[1]


def check_export(words: list[str]) -> None:
    constants = importlib.import_module("huggingface_hub.constants")
    assert all(hasattr(constants, word.partition("=")[0]) for word in words[1:])


COMMANDS = {
    "trilithon": check_trilithon,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "export": check_export,
}
