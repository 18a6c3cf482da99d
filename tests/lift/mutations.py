"""The mistakes that `mutants` makes: for each node of a function's syntax tree, what it may be mistaken for.

`CLASSIC` are those that a handler table must never let through: a wrong axis, an edge off by one, an argument that is
ignored, an obligation that is dropped.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator

Change = tuple[str, ast.AST | None]  # the kind, and what stands there instead (None: nothing does)
CLASSIC = ("wrong axis", "off by one", "ignored argument", "dropped obligation")

OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
NAMES = {
    "ONE": "ZERO",
    "ZERO": "ONE",
    "TRUE": "FALSE",
    "FALSE": "TRUE",
    "conj": "disj",
    "disj": "conj",
    "minimum": "maximum",
    "maximum": "minimum",
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "floor_div": "mod",
    "mod": "floor_div",
    "_less": "_at_most",
    "_at_most": "_less",
}
TEXTS = {
    "add": "sub",
    "sub": "add",
    "mul": "div",
    "div": "mul",
    "min": "max",
    "max": "min",
    "eq": "le",
    "le": "lt",
    "lt": "le",
    "floor": "trunc",
    "trunc": "floor",
    "remainder": "floor",
    "int": "bool",
    "bool": "int",
}
COMMUTE = {"conj", "disj", "eq", "mul", "minimum", "maximum", "min", "max", "_equal", "_differ", "_times", "result_type"}
PASSES_ON = {"in_range": 0, "positive": 1, "convert": 1, "reversed": 0, "sorted": 0, "negate": 0, "wrap": 0}
AXES = {"d", "dim", "a", "b"}


def changes(tree: ast.FunctionDef | ast.Lambda) -> Iterator[tuple[str, str, ast.FunctionDef | ast.Lambda]]:
    """Kind, text and definition of every mutant of a function."""
    for name, default in _defaults(tree):
        changed = copy.deepcopy(tree)
        assert isinstance(changed, ast.FunctionDef)
        first = 1 if ast.get_docstring(changed) else 0
        changed.body.insert(first, ast.Assign([ast.Name(name, ast.Store())], copy.deepcopy(default), lineno=0))
        yield "ignored argument", f"{name} = {ast.unparse(default)}", changed
    for path, node in _nodes(tree, ()):
        if path[:2] == ("args", "defaults") and tree.decorator_list:  # type: ignore[union-attr]
            continue  # a handler is called with every argument
        for kind, other in _replacements(node):
            if other is not None and ast.unparse(other) == ast.unparse(node):
                continue
            changed = _replaced(tree, path, other)
            yield kind, f"{_brief(node)}  ->  {_brief(other)}", changed


def _brief(node: ast.AST | None) -> str:
    text = "" if node is None else ast.unparse(node)
    return text.splitlines()[0] + " .." if "\n" in text else text


def _defaults(tree: ast.FunctionDef | ast.Lambda) -> Iterator[tuple[str, ast.expr]]:
    """The parameters with a default that the body reads."""
    if isinstance(tree, ast.FunctionDef):
        read = {n.id for x in tree.body for n in ast.walk(x) if isinstance(n, ast.Name)}
        plain = tree.args.args[len(tree.args.args) - len(tree.args.defaults) :]
        yield from ((a.arg, default) for a, default in zip(plain, tree.args.defaults, strict=True) if a.arg in read)


Path = tuple[str | int, ...]


def _nodes(node: ast.AST, path: Path) -> Iterator[tuple[Path, ast.AST]]:
    """Every node that means something when it runs: no text, annotation, message or assertion."""
    if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr)):
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    yield path, node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_comment"):
            continue
        if isinstance(value, ast.AST):
            yield from _nodes(value, (*path, field))
        elif isinstance(value, list):
            for n, item in enumerate(value):
                if isinstance(item, ast.AST):
                    yield from _nodes(item, (*path, field, n))


def _replaced(tree: ast.FunctionDef | ast.Lambda, path: Path, other: ast.AST | None) -> ast.FunctionDef | ast.Lambda:
    changed = copy.deepcopy(tree)
    holder: object = changed
    for step in path[:-1]:
        holder = holder[step] if isinstance(step, int) else getattr(holder, step)  # type: ignore[index]
    new = ast.Pass() if other is None else copy.deepcopy(other)
    if isinstance(path[-1], int):
        holder[path[-1]] = new  # type: ignore[index]
    else:
        setattr(holder, path[-1], new)
    return changed


def _replacements(node: ast.AST) -> Iterator[Change]:
    for kind in type(node).__mro__:
        yield from _OF.get(kind, lambda _: iter(()))(node)


def _constant(node: ast.Constant) -> Iterator[Change]:
    value = node.value
    if isinstance(value, bool):
        yield "constant", ast.Constant(not value)
    elif isinstance(value, int):
        yield "off by one", ast.Constant(value + 1)
        yield "off by one", ast.Constant(value - 1)
    elif isinstance(value, float):
        yield "constant", ast.Constant(value + 1.0)
    elif value in TEXTS:
        yield "constant", ast.Constant(TEXTS[value])


def _binary(node: ast.BinOp) -> Iterator[Change]:
    other = OPERATORS.get(type(node.op))
    if other is not None:
        yield "operator", ast.BinOp(node.left, other(), node.right)
    if isinstance(node.op, (ast.Sub, ast.FloorDiv, ast.Mod)):
        yield "swapped", ast.BinOp(node.right, node.op, node.left)


def _compare(node: ast.Compare) -> Iterator[Change]:
    for n, op in enumerate(node.ops):
        other = OPERATORS.get(type(op))
        if other is not None:
            yield "comparison", ast.Compare(node.left, [*node.ops[:n], other(), *node.ops[n + 1 :]], node.comparators)
    if len(node.ops) == 1 and isinstance(node.ops[0], (ast.Lt, ast.LtE, ast.Gt, ast.GtE)):
        yield "swapped", ast.Compare(node.comparators[0], node.ops, [node.left])


def _logic(node: ast.BoolOp) -> Iterator[Change]:
    yield "operator", ast.BoolOp(OPERATORS[type(node.op)](), node.values)
    for n in range(len(node.values)):
        rest = [*node.values[:n], *node.values[n + 1 :]]
        yield "dropped condition", rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)


def _unary(node: ast.UnaryOp) -> Iterator[Change]:
    yield "negation", node.operand


def _choice(node: ast.IfExp) -> Iterator[Change]:
    yield "negation", ast.IfExp(node.test, node.orelse, node.body)
    yield "dropped condition", node.body
    yield "dropped condition", node.orelse


def _if(node: ast.If) -> Iterator[Change]:
    negated = ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    yield "negation", negated
    if isinstance(node.body[-1], ast.Raise):
        yield "dropped refusal", None
    elif not node.orelse:
        yield "dropped condition", None


def _comprehension(node: ast.comprehension) -> Iterator[Change]:
    for n in range(len(node.ifs)):
        yield (
            "dropped condition",
            ast.comprehension(node.target, node.iter, [*node.ifs[:n], *node.ifs[n + 1 :]], node.is_async),
        )


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _call(node: ast.Call) -> Iterator[Change]:
    name = _called(node)
    if name in PASSES_ON and len(node.args) > PASSES_ON[name]:
        kind = "dropped obligation" if name in ("in_range", "positive") else "dropped step"
        yield kind, node.args[PASSES_ON[name]]
    if name == "dim" and len(node.args) == 1:
        yield "wrong axis", ast.Constant(0)
        yield "wrong axis", ast.Call(node.func, [ast.Constant(-1)], [])
    for n in range(len(node.keywords)):
        yield "ignored argument", ast.Call(node.func, node.args, [*node.keywords[:n], *node.keywords[n + 1 :]])
    if any(isinstance(a, ast.Starred) for a in node.args) or name in ("isinstance", "getattr"):
        return
    if len(node.args) > 1:
        yield "ignored argument", ast.Call(node.func, node.args[:-1], node.keywords)
    for n in range(len(node.args) - 1 if name not in COMMUTE else 0):
        swapped = [*node.args[:n], node.args[n + 1], node.args[n], *node.args[n + 2 :]]
        yield "swapped", ast.Call(node.func, swapped, node.keywords)


def _statement(node: ast.Expr) -> Iterator[Change]:
    if isinstance(node.value, ast.Call):
        yield "dropped obligation" if _called(node.value) == "require" else "dropped step", None


def _attribute(node: ast.Attribute) -> Iterator[Change]:
    if node.attr in NAMES:
        yield "operator", ast.Attribute(node.value, NAMES[node.attr], node.ctx)


def _name(node: ast.Name) -> Iterator[Change]:
    if node.id in NAMES and isinstance(node.ctx, ast.Load) and node.id not in ("min", "max"):
        yield "operator", ast.Name(NAMES[node.id], node.ctx)


def _subscript(node: ast.Subscript) -> Iterator[Change]:
    where = node.slice
    if isinstance(where, ast.Name) and where.id in AXES:
        for n in (0, -1):
            yield "wrong axis", ast.Subscript(node.value, ast.Constant(n), node.ctx)
    if isinstance(where, ast.Slice):
        for field in ("lower", "upper"):
            edge = getattr(where, field)
            if isinstance(edge, ast.Name):
                moved = ast.Slice(where.lower, where.upper, where.step)
                setattr(moved, field, ast.BinOp(edge, ast.Add(), ast.Constant(1)))
                yield "off by one", ast.Subscript(node.value, moved, node.ctx)


def _augmented(node: ast.AugAssign) -> Iterator[Change]:
    yield "operator", ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value)


_OF: dict[type, Callable[..., Iterator[Change]]] = {
    ast.Constant: _constant,
    ast.BinOp: _binary,
    ast.Compare: _compare,
    ast.BoolOp: _logic,
    ast.UnaryOp: _unary,
    ast.IfExp: _choice,
    ast.If: _if,
    ast.comprehension: _comprehension,
    ast.Call: _call,
    ast.Expr: _statement,
    ast.Attribute: _attribute,
    ast.Name: _name,
    ast.Subscript: _subscript,
    ast.AugAssign: _augmented,
}
