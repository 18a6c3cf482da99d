"""Terms, masks and facts as plain data for JSON and back, and fingerprints that do not depend on the order of creation.

The classes that can be read back are a closed set: the masks, biases and assumptions of this package and the classes
that the caller names. No code is stored, and none is run but their constructors.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilithon.spec import term as t
from trilithon.spec.assumption import Assumption
from trilithon.spec.bias import Bias
from trilithon.spec.masks import Mask
from trilithon.spec.term import Term
from trilithon.spec.traverse import children, rebuild

Classes = Mapping[str, type]
SYMBOL = re.compile(r"\b[su](?:0|[1-9]\d*)\b")  # how torch.export names sizes
CANONICAL = re.compile(r"\$[su]\d+\b")
PLAIN = (bool, int, str, type(None))
LEAVES = ("int", "bool", "float", "var", "read")  # operations that may have no subterm
UNORDERED = ("and", "or", "mul")  # their arguments stand in the order in which they were made


def readable_classes(*more: type) -> dict[str, type]:
    """The classes that `decode` makes, by name: those of this package, and `more`."""
    found = [*_family(Mask), *_family(Bias), Assumption, *more]
    names = {c.__name__: c for c in found}
    assert len(names) == len(set(found)), "two classes of one name"
    return names


def _family(base: type[Any]) -> Iterator[type]:
    if base.__module__.startswith("trilithon."):
        yield base
        for sub in base.__subclasses__():
            yield from _family(sub)


# ---------------------------------------------------------------- plain data


def encode(value: Any) -> Any:
    """`value` as numbers, texts, lists and dicts.

    Raises:
        TypeError: it holds something else than terms, dataclasses, enums, tuples, dicts with text keys and plain data.
    """
    if isinstance(value, Term):
        return {"term": _encode_term(value)}
    if isinstance(value, Enum):
        return {"enum": type(value).__name__, "value": value.value}
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, tuple):
        return [encode(x) for x in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(x) for key, x in value.items()}}
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__name__, "fields": {f.name: encode(getattr(value, f.name)) for f in fields(value)}}
    raise TypeError(f"no plain form of a {type(value).__name__}")


def decode(data: Any, classes: Classes) -> Any:
    """What `encode` was given.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: `data` is not what `encode` gives, or names another class.
    """
    if isinstance(data, PLAIN):
        return data
    if isinstance(data, list):
        return tuple(decode(x, classes) for x in data)
    if "term" in data:
        return _decode_term(data["term"])
    if "float" in data:
        return float.fromhex(data["float"])
    if "dtype" in data:
        return _dtype(data["dtype"])
    if "dict" in data:
        return {key: decode(x, classes) for key, x in data["dict"].items()}
    if "enum" in data:
        return classes[data["enum"]](data["value"])
    return classes[data["class"]](**{name: decode(x, classes) for name, x in data["fields"].items()})


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name} is no data type")
    return found


def _encode_term(term: Term) -> list[Any]:
    """The distinct subterms, each before those that hold it: `[op, sort, arguments]`, a subterm as `{"#": its place}`."""
    order = list(_postorder(term))
    place = {x: i for i, x in enumerate(order)}

    def argument(value: Any) -> Any:
        if isinstance(value, Term):
            return {"#": place[value]}
        if isinstance(value, tuple):
            return [argument(x) for x in value]
        return encode(value)

    return [[x.op, x.sort, [argument(a) for a in x.args]] for x in order]


def _decode_term(nodes: list[Any]) -> Term:
    built: list[Term] = []

    def argument(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(argument(x) for x in value)
        if isinstance(value, dict) and "#" in value:
            return built[value["#"]]
        return decode(value, {})

    for op, sort, arguments in nodes:
        same = t.make(op, tuple(argument(a) for a in arguments), sort)
        kids = children(same)
        if not kids and op not in LEAVES:
            raise ValueError(f"{op} has no subterm")
        built.append(rebuild(same, kids) if kids else same)  # in this process's normal form
    return built[-1]


def _postorder(term: Term) -> Iterator[Term]:
    done: set[Term] = set()
    stack = [(term, False)]
    while stack:
        x, has_kids = stack.pop()
        if x in done:
            continue
        if has_kids:
            done.add(x)
            yield x
        else:
            stack.append((x, True))
            stack.extend((kid, False) for kid in children(x))


# ---------------------------------------------------------------- fingerprints


def canonical_names(terms: Iterable[Term]) -> dict[str, str]:
    """Size symbols in the order in which they first occur, each with a name that does not depend on the export."""
    found: dict[str, None] = {}
    for term in terms:
        names = {x.args[0] for x in _postorder(term) if x.op == "var"}
        found.update(dict.fromkeys(sorted(name for name in names if SYMBOL.fullmatch(name))))
    return {name: f"${name[0]}{i}" for i, name in enumerate(found)}


def rename(text: str, names: Mapping[str, str], pattern: re.Pattern[str] = SYMBOL) -> str:
    """`text` with every word that is a key of `names` replaced by its value."""
    return pattern.sub(lambda found: names.get(found[0], found[0]), text)


def fingerprint(value: Any, names: Mapping[str, str]) -> str:
    """A hash of `value` by its content. Size symbols are called as `names` says, in terms and in texts.

    Terms built in another order have the same hash: what conjunctions, disjunctions and sums hold is sorted.

    Raises:
        TypeError: it holds something whose content is not known.
    """
    return _Fingerprint(names)(value)


class _Fingerprint:
    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names
        self.done: dict[Term, str] = {}

    def __call__(self, value: Any) -> str:
        if isinstance(value, Term):
            return self.term(value)
        if isinstance(value, Enum):
            return _hash("enum", type(value).__name__, str(value.value))
        if isinstance(value, str):
            return _hash("text", rename(value, self.names))
        if isinstance(value, float):
            return _hash("float", value.hex())
        if isinstance(value, PLAIN):
            return _hash(type(value).__name__, str(value))
        if isinstance(value, (tuple, list)):
            return _hash("tuple", *map(self, value))
        if isinstance(value, frozenset):
            return _hash("set", *sorted(map(self, value)))
        if isinstance(value, Mapping):
            return _hash("dict", *sorted(self(item) for item in value.items()))
        if isinstance(value, Tensor):
            return _hash("tensor", str(value.dtype), str(tuple(value.shape)), data_hash(value))
        if is_dataclass(value) and not isinstance(value, type):
            return _hash(type(value).__name__, *(x for f in fields(value) for x in (f.name, self(getattr(value, f.name)))))
        raise TypeError(f"no fingerprint of a {type(value).__name__}")

    def term(self, term: Term) -> str:
        for x in _postorder(term):
            if x not in self.done:
                self.done[x] = self.node(x)
        return self.done[term]

    def node(self, x: Term) -> str:
        if x.op == "sum":
            return self.sum(x, 1)
        if x.op == "eq0" and x.args[0].op == "sum":  # `a - b == 0` or `b - a == 0`, whichever was made first
            return _hash("eq0", min(self.sum(x.args[0], 1), self.sum(x.args[0], -1)))
        arguments = [self(a) for a in x.args]
        return _hash("term", x.op, x.sort, *(sorted(arguments) if x.op in UNORDERED else arguments))

    def sum(self, x: Term, sign: int) -> str:
        parts = sorted(f"{self(part)} {sign * factor}" for part, factor in x.args[0])
        return _hash("sum", *parts, str(sign * x.args[1]))


def _hash(*parts: str) -> str:
    text = "".join(f"{len(part)}:{part}" for part in parts)  # lengths keep the parts apart
    return hashlib.sha256(text.encode()).hexdigest()


def source_digest(*folders: str) -> str | None:
    """A hash of the code in these folders of the package, as it was when it was imported; None where there is no source."""
    root = Path(__file__).parents[1]
    files = sorted(file for folder in folders for file in (root / folder).rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        data = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(data)} ".encode() + data)
    return digest.hexdigest() if files else None


def data_hash(tensor: Tensor) -> str:
    """A hash of the elements of a tensor."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
