"""The order of the layers, the one door of each optional package, the caps on size, the public names and the version."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import trilithon

SRC = Path(__file__).parent.parent / "src"
FILES = {path.relative_to(SRC).as_posix(): ast.parse(path.read_text()) for path in sorted(SRC.rglob("*.py"))}

ORDER = (
    "errors folders options passes stages | spec | capture | lift | prove | rewrite | lower | runtime"
    " | report | parallel | compiled artefact caching | compiler onnx_export | integrations batch | bench | cli | __main__"
)
LAYERS = {name: depth for depth, names in enumerate(ORDER.split("|")) for name in names.split()}
PUBLIC = LAYERS["compiler"]  # `import trilithon` runs __init__, which imports the compiler

DOORS = {
    "onnx": ("trilithon/lower/onnx/library.py",),
    "onnxruntime": ("trilithon/lower/onnx/library.py",),
    "onnxscript": ("trilithon/lower/onnx/library.py",),
    "ray": ("trilithon/batch/ray.py",),
    "z3": ("trilithon/prove/",),
    "tensorrt": ("trilithon/lower/tensorrt/",),
    "tensorrt_rtx": ("trilithon/lower/tensorrt/",),
    "torch_tensorrt": ("trilithon/bench/torch_tensorrt_row.py", "trilithon/integrations/torch_tensorrt.py"),
    "transformers": (
        "trilithon/capture/generation.py",
        "trilithon/capture/hf.py",
        "trilithon/capture/presets.py",
        "trilithon/integrations/",
    ),
}

FILE_LINES, FUNCTION_LINES, NESTING = 300, 40, 4

Function = ast.FunctionDef | ast.AsyncFunctionDef
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match, Function)


def imports(file: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that `file` imports, wherever in the file it does so."""
    package = Path(file).parent.parts
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parents = package[: len(package) - level + 1] if level else ()
                source = ".".join((*parents, *([module] if module else ())))
                yield from ((node.lineno, f"{source}.{alias.name}") for alias in names)
            case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(name)), *_]):
                if called in ("import_module", "__import__"):
                    yield node.lineno, name


def layer_of(module: str) -> int | None:
    """Place of `trilithon.x.y` in the order; None for modules of other packages."""
    package, *path = module.split(".")
    if package != "trilithon":
        return None
    return LAYERS.get(path[0], PUBLIC) if path else PUBLIC


def wrong_direction(file: str, tree: ast.AST) -> list[str]:
    here = LAYERS[Path(file).parts[1].removesuffix(".py")]
    found = ((line, module, layer_of(module)) for line, module in imports(file, tree))
    return [f"{file}:{line} imports {module}" for line, module, layer in found if layer is not None and layer > here]


def wrong_door(file: str, tree: ast.AST) -> list[str]:
    found = ((line, module, DOORS.get(module.split(".")[0])) for line, module in imports(file, tree))
    return [f"{file}:{line} imports {module}" for line, module, doors in found if doors and not file.startswith(doors)]


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def lines_of(function: Function) -> int:
    """Lines from `def` to the end, without the docstring."""
    assert function.end_lineno is not None
    total = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return total
    docstring = function.body[0]
    assert docstring.end_lineno is not None
    return total - (docstring.end_lineno - docstring.lineno + 1)


def nesting_of(node: ast.AST) -> int:
    """How many blocks stand inside each other below `node`; an `elif` stands beside its `if`, not inside it."""
    depths = [0]
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        depths.append(nesting_of(child) + (isinstance(child, BLOCKS) and not is_elif))
    return max(depths)


def test_every_file_has_a_layer():
    names = {Path(file).parts[1].removesuffix(".py") for file in FILES} - {"__init__"}
    assert names <= set(LAYERS), "each file and folder of the package stands in ORDER"


@pytest.mark.parametrize("file", [file for file in FILES if file != "trilithon/__init__.py"])
def test_imports_point_left(file):
    assert wrong_direction(file, FILES[file]) == []


@pytest.mark.parametrize("file", FILES)
def test_optional_packages_have_one_door(file):
    assert wrong_door(file, FILES[file]) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("trilithon/spec/masks.py", "from trilithon.lift import lifter"),
        ("trilithon/spec/masks.py", "from trilithon import cli"),
        ("trilithon/spec/masks.py", "import trilithon"),
        ("trilithon/spec/masks.py", "from ..prove.solve import prove"),
        ("trilithon/errors.py", "def f():\n    import trilithon.spec.term"),
        ("trilithon/runtime/artefact.py", "from trilithon import compile"),
        ("trilithon/bench/rows.py", "importlib.import_module('trilithon.cli')"),
    ],
)
def test_a_rightward_import_is_found(file, line):
    assert wrong_direction(file, ast.parse(line))


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("trilithon/passes.py", "from trilithon.errors import PassBroke"),
        ("trilithon/lift/lifter.py", "from .registry import lifts"),
        ("trilithon/cli.py", "from trilithon import compile"),
        ("trilithon/spec/masks.py", "import torch"),
    ],
)
def test_a_leftward_import_is_not_found(file, line):
    assert wrong_direction(file, ast.parse(line)) == []


@pytest.mark.parametrize(
    ("file", "line", "count"),
    [
        ("trilithon/lift/lifter.py", "import z3", 1),
        ("trilithon/cli.py", "from transformers import AutoConfig", 1),
        ("trilithon/lower/eager.py", "import tensorrt_rtx as trt", 1),
        ("trilithon/capture/hf.py", "from transformers import AutoConfig", 0),
        ("trilithon/capture/presets.py", "import transformers", 0),
        ("trilithon/capture/sites.py", "import transformers", 1),
        ("trilithon/lower/tensorrt/engine.py", "import tensorrt_rtx as trt", 0),
        ("trilithon/bench/candidates.py", "importlib.import_module('torch_tensorrt')", 1),
        ("trilithon/bench/torch_tensorrt_row.py", "import torch_tensorrt", 0),
        ("trilithon/cli/batch.py", "import ray", 1),
        ("trilithon/lower/onnx/session.py", "import onnxruntime", 1),
        ("trilithon/onnx_export.py", "from trilithon.lower.onnx import library", 0),
    ],
)
def test_the_wrong_door_is_found(file, line, count):
    assert len(wrong_door(file, ast.parse(line))) == count


@pytest.mark.parametrize("file", FILES)
def test_caps(file):
    lines = len((SRC / file).read_text().splitlines())
    assert lines <= FILE_LINES, f"{file} has {lines} lines"
    long = {f.name: lines_of(f) for f in functions(FILES[file]) if lines_of(f) > FUNCTION_LINES}
    assert not long, f"{file}: functions of more than {FUNCTION_LINES} lines"
    deep = {f.name: nesting_of(f) for f in functions(FILES[file]) if nesting_of(f) > NESTING}
    assert not deep, f"{file}: functions nested more than {NESTING} deep"


def test_caps_measure_what_they_say():
    source = """
def f(x):
    '''Sentence.

    Second paragraph.'''
    if x:
        pass
    elif x > 1:
        for _ in x:
            pass
"""
    (function,) = functions(ast.parse(source))
    assert lines_of(function) == 6
    assert nesting_of(function) == 2


def test_total_lines_are_printed(capsys):
    total = sum(len((SRC / file).read_text().splitlines()) for file in FILES)
    with capsys.disabled():
        print(f"\nsrc: {total} lines in {len(FILES)} files")
    assert total


def test_public_names_match_all():
    names = trilithon.__all__
    assert len(set(names)) == len(names)
    imported = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in FILES["trilithon/__init__.py"].body
        if isinstance(node, ast.ImportFrom) and node.module and node.module != "__future__"
        for alias in node.names
    }
    assert {name for name in imported if not name.startswith("_")} <= set(names)
    for name in names:
        value = getattr(trilithon, name)
        if name in imported:
            module, attribute = imported[name]
            meant = getattr(importlib.import_module(module), attribute)
            assert value is meant, f"trilithon.{name} is not {module}.{attribute}: a folder of that name hides it"


def test_the_package_says_its_version():
    assert trilithon.__version__ == metadata.version("trilithon")
