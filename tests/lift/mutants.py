"""Small mistakes put into our own code: each function's source with one node changed, swapped in while checks run.

A mutant that no check notices says that the checks are blind to such a mistake, or that it makes no difference.
"""

from __future__ import annotations
import __future__

import ast
import copy
import importlib
import inspect
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import pytest

from lift.mutations import changes

SECONDS = 10.0  # of processor time in one check; a mutant that needs longer is noticed


@dataclass(frozen=True)
class Mutant:
    """One change of one function.

    Attributes:
        module, function: where; a method is `Class.name`, a function in a table `TABLE[key]`.
        kind: what sort of mistake it is.
        text: the changed code before and after.
        tree: the changed definition.
    """

    module: str
    function: str
    kind: str
    text: str
    tree: ast.FunctionDef | ast.Lambda

    @property
    def name(self) -> str:
        return f"{self.module.removeprefix('trilithon.')}.{self.function}: {self.text}"

    @property
    def place(self) -> tuple[str, str]:
        return self.module, self.function


def definitions(module: ModuleType) -> Iterator[tuple[str, ast.FunctionDef | ast.Lambda]]:
    """Every function of a module, method of its classes, and lambda in its tables."""
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{f.name}", f) for f in node.body if isinstance(f, ast.FunctionDef))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict) and isinstance(node.target, ast.Name):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Lambda):
                    yield f"{node.target.id}[{key.value}]", value


def mutants(module_name: str) -> Iterator[Mutant]:
    """All mutants of a module, in order of their place."""
    module = importlib.import_module(module_name)
    for function, tree in definitions(module):
        seen: dict[str, int] = {}
        for kind, text, changed in changes(tree):
            seen[text] = seen.get(text, 0) + 1
            numbered = text if seen[text] == 1 else f"{text}  #{seen[text]}"
            yield Mutant(module_name, function, kind, numbered, changed)


def target(module_name: str, function: str) -> FunctionType:
    """The function object that the rest of the program calls; what decorators put around it is taken off."""
    found: Any = importlib.import_module(module_name)
    name, _, key = function.partition("[")
    for part in name.split("."):
        found = inspect.getattr_static(found, part) if inspect.isclass(found) else getattr(found, part)
    found = found[key.rstrip("]")] if key else found
    found = getattr(found, "fget", None) or getattr(found, "__func__", None) or getattr(found, "func", None) or found
    while hasattr(found, "__wrapped__"):
        found = found.__wrapped__
    assert isinstance(found, FunctionType), function
    return found


def compiled(mutant: Mutant, scope: dict[str, Any]) -> FunctionType:
    tree = copy.deepcopy(mutant.tree)
    flags = __future__.annotations.compiler_flag
    if isinstance(tree, ast.Lambda):
        body = ast.fix_missing_locations(ast.Expression(tree))
        made = eval(compile(body, f"<{mutant.function}>", "eval", flags), dict(scope))
    else:
        tree.decorator_list = []
        own = dict(scope)
        exec(compile(ast.fix_missing_locations(ast.Module([tree], [])), f"<{mutant.function}>", "exec", flags), own)
        made = own[tree.name]
    assert isinstance(made, FunctionType)
    return made


def forget() -> None:
    """Empty the caches that remember what functions gave."""
    from trilithon.spec import float_term

    for value in vars(float_term).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


@contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    """Within the context the function is the mutant, for everyone who holds it."""
    function = target(*mutant.place)
    made = compiled(mutant, function.__globals__)
    before = function.__code__, function.__defaults__, function.__kwdefaults__
    forget()
    try:
        function.__code__, function.__defaults__, function.__kwdefaults__ = (
            made.__code__,
            made.__defaults__,
            made.__kwdefaults__,
        )
        yield
    finally:
        function.__code__, function.__defaults__, function.__kwdefaults__ = before
        forget()


class TooLong(Exception):
    pass


def _stop(signum: int, frame: object) -> None:
    raise TooLong


def notices(check: Callable[[], None]) -> bool:
    """Does the check fail, in whatever way?"""
    before = signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        check()
    except (Exception, pytest.fail.Exception):  # a mutant may break in any way
        return True
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    return False


def killer(mutant: Mutant, checks: Sequence[tuple[str, Callable[[], None]]]) -> str | None:
    """The first check that notices the mutant, or None: it survives."""
    with applied(mutant):
        return next((name for name, check in checks if notices(check)), None)
