"""Lines of a batch: what is asked for, what was answered, and what is refused, with the reason."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from trilithon.runtime.request import GenerateArguments

Id = str | int
OF_THE_RUN = GenerateArguments.__annotations__.keys() - {"max_new_tokens"}  # settings that no line has for itself
LARGEST = 2**63 - 1  # of an int64


@dataclass(frozen=True)
class Job:
    """One line of the input.

    Attributes:
        line: its number, from 1.
        id: as given, else the number of the line.
        prompt: text, or token ids.
        max_new_tokens: of this line; None = as in the others.
    """

    line: int
    id: Id
    prompt: str | tuple[int, ...]
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Answer:
    """What one line of the output says.

    Attributes:
        tokens: new ones; with the one that stopped the text, if one did.
        text: of the tokens, without special ones; None where there is no tokenizer.
        finish: "stop" = an end-of-text token or a stop string; "length" = as many tokens as were asked for.
    """

    line: int
    id: Id
    tokens: tuple[int, ...]
    text: str | None
    finish: Literal["stop", "length"]

    def to_json(self) -> dict[str, Any]:
        text = {} if self.text is None else {"text": self.text}
        return {"id": self.id, **text, "tokens": list(self.tokens), "finish": self.finish}


@dataclass(frozen=True)
class Refusal:
    """A line of the input that cannot be answered.

    Attributes:
        id: None where it has none that could be read.
    """

    line: int
    id: Id | None
    reason: str

    def to_json(self) -> dict[str, Any]:
        named = {} if self.id is None else {"id": self.id}
        return {"line": self.line, **named, "reason": self.reason}


Result = Answer | Refusal


class BadLine(Exception):
    """Why a line cannot be read; caught once, and made a `Refusal`."""


def read_jobs(lines: Iterable[bytes], done: set[Id]) -> Iterator[Job | Refusal]:
    """The jobs that lines of JSON ask for, without those whose id is in `done`; each id once."""
    seen: set[Id] = set()
    for number, line in enumerate(lines, start=1):
        job = read_job(number, line)
        if isinstance(job, Refusal):
            yield job
        elif job.id in seen:
            yield Refusal(number, job.id, f"an earlier line has the id {json.dumps(job.id)} too")
        else:
            seen.add(job.id)
            if job.id not in done:
                yield job


def read_job(number: int, line: bytes) -> Job | Refusal:
    """The job of one line, or why there is none."""
    named: Id | None = None
    try:
        data = _object(line)
        named = _id(data, number)
        _refuse_settings(data)
        return Job(number, named, _prompt(data), _max_new_tokens(data))
    except BadLine as bad:
        return Refusal(number, named, str(bad))


def _object(line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise BadLine("it is empty")
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:  # of the JSON, or of its bytes
        raise BadLine(f"it is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise BadLine(f"it is no JSON object but {type(data).__name__}")
    return data


def _id(data: dict[str, Any], number: int) -> Id:
    found = data.get("id")
    if found is None:
        return number
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise BadLine(f"its id is {type(found).__name__}, neither a string nor a whole number")
    if isinstance(found, str):
        _check_text("id", found)
    return found


def _refuse_settings(data: dict[str, Any]) -> None:
    found = sorted(OF_THE_RUN & data.keys())
    if found:
        raise BadLine(f"it sets {', '.join(found)}, which is set for the whole run")


def _prompt(data: dict[str, Any]) -> str | tuple[int, ...]:
    prompt, ids = data.get("prompt"), data.get("input_ids")
    if (prompt is None) == (ids is None):
        raise BadLine("it has neither prompt nor input_ids" if prompt is None else "it has both prompt and input_ids")
    if prompt is not None:
        if not isinstance(prompt, str):
            raise BadLine(f"its prompt is {type(prompt).__name__}, no string")
        _check_text("prompt", prompt)
        return prompt
    if not isinstance(ids, list) or not ids:
        raise BadLine("its input_ids is no list of at least one token id")
    wrong = next((x for x in ids if isinstance(x, bool) or not isinstance(x, int) or not 0 <= x <= LARGEST), None)
    if wrong is not None or None in ids:
        raise BadLine(f"its input_ids holds {json.dumps(wrong)}, which is no token id")
    return tuple(ids)


def _check_text(name: str, text: str) -> None:
    """JSON can name half of a character, which no tokenizer knows and no file of text can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadLine(f"its {name} is no text: {error.reason} at character {error.start}") from error


def _max_new_tokens(data: dict[str, Any]) -> int | None:
    found = data.get("max_new_tokens")
    if found is not None and (isinstance(found, bool) or not isinstance(found, int) or found < 1):
        raise BadLine(f"its max_new_tokens is {json.dumps(found)}, no whole number of at least 1")
    return found
