"""The text of what is added to attention scores by position: a float term over `h q k` that reads tables by number."""

from __future__ import annotations

import json
from collections.abc import Sequence

from trilithon.errors import InputError
from trilithon.spec import term as t
from trilithon.spec.codec import decode, encode
from trilithon.spec.term import Term
from trilithon.spec.traverse import children, free_vars, rebuild, walk

VARIABLES = frozenset("hqk")
BROKEN = (ValueError, TypeError, KeyError, AttributeError, IndexError, AssertionError)


def write_bias(term: Term, tables: Sequence[str]) -> str:
    """The canonical text of a float term over `h q k`; a read of `tables[i]` becomes one of table i.

    Equal terms that read equal tables have equal texts, so that layers can share one tensor.
    """
    numbers = {name: str(i) for i, name in enumerate(tables)}
    done: dict[Term, Term] = {}

    def numbered(x: Term) -> Term:
        if x not in done:
            kids = [numbered(kid) for kid in children(x)]
            same = rebuild(x, kids) if kids else x
            done[x] = t.read(numbers[same.args[0]], same.args[1:], same.sort) if same.op == "read" else same
        return done[x]

    return json.dumps(encode(numbered(term))["term"], separators=(",", ":"))


def parse_bias(text: str, tables: int) -> Term:
    """The term that `write_bias` was given, over tables "0", "1", ..., of which there are so many.

    Raises:
        InputError: the text is no float term over `h q k`, or reads a table that is not there.
    """
    try:
        term: Term = decode({"term": json.loads(text)}, {})
    except BROKEN as error:
        raise _refuse(text, "it is not the text of a term") from error
    if term.sort != "float":
        raise _refuse(text, f"its value is {term.sort}, not float")
    others = free_vars(term) - VARIABLES
    if others:
        raise _refuse(text, f"it depends on {', '.join(sorted(others))}, not on h, q and k alone")
    missing = {x.args[0] for x in walk([term]) if x.op == "read"} - {str(i) for i in range(tables)}
    if missing:
        raise _refuse(text, f"it reads table {', '.join(sorted(missing))} of {tables}")
    return term


def _refuse(text: str, why: str) -> InputError:
    return InputError(f"{text!r} names no bias", why=why, todo="use the text that trilithon.spec.bias_text.write_bias gives")
