"""Print tokens to a terminal while they are made, and time them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trilithon.bench.table import show_seconds

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # a decoder's sign for the first bytes of a character that is not complete


@dataclass(frozen=True)
class Speed:
    """How fast one generation was.

    Attributes:
        tokens: new tokens.
        first_seconds: from the start to the first token, prefill included.
        seconds: the whole generation.
    """

    tokens: int
    first_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None where there is none."""
        rest = self.seconds - self.first_seconds
        return (self.tokens - 1) / rest if self.tokens > 1 and rest > 0 else None

    def __str__(self) -> str:
        rate = "" if self.tokens_per_second is None else f", then {self.tokens_per_second:,.1f} tokens/s"
        count = "1 token" if self.tokens == 1 else f"{self.tokens} tokens"
        return f"{count} in {show_seconds(self.seconds)}: the first after {show_seconds(self.first_seconds)}{rate}"


@dataclass
class TokenText:
    """Turns a growing list of ids into the text that each new id adds.

    Args:
        tokenizer: Hugging Face's, or None: then the ids themselves are the text.
    """

    tokenizer: Any | None
    ids: list[int] = field(default_factory=list)
    shown: int = 0

    def add(self, token: int) -> str:
        """The text to print for one more token; "" while a character is not complete."""
        self.ids.append(token)
        if self.tokenizer is None:
            return f"{token} "
        text = self._text()
        return "" if text.endswith(UNFINISHED) else self._new(text)

    def rest(self) -> str:
        """What `add` held back."""
        return "" if self.tokenizer is None else self._new(self._text())

    def _text(self) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _new(self, text: str) -> str:
        new, self.shown = text[self.shown :], len(text)
        return new


class TokenPrinter:
    """A streamer that writes the tokens of a one-row generation as they come, and times them from when it is made.

    Args:
        tokenizer: as `TokenText` takes it.
        write: gets each piece of text; the prompt is not written.
    """

    def __init__(self, tokenizer: Any | None, write: Callable[[str], object]) -> None:
        self._text, self._write = TokenText(tokenizer), write
        self._prompt_came = False
        self._arrivals = [time.perf_counter()]

    def put(self, value: Tensor, /) -> None:
        """The prompt, then the tokens of each step."""
        if self._prompt_came:
            for token in value.flatten().tolist():
                self.add(token)
        self._prompt_came = True

    def add(self, token: int) -> None:
        self._arrivals.append(time.perf_counter())
        self._write(self._text.add(token))

    def end(self) -> None:
        self._write(self._text.rest())

    @property
    def ids(self) -> list[int]:
        """The new tokens."""
        return self._text.ids

    @property
    def speed(self) -> Speed:
        start, *rest = self._arrivals
        return Speed(len(rest), rest[0] - start, rest[-1] - start)


def print_tokens(
    steps: Callable[[], Iterable[Tensor]], tokenizer: Any | None, write: Callable[[str], object]
) -> tuple[list[int], Speed]:
    """Write each token of a one-row generation as it comes.

    Args:
        steps: starts the generation; yields its tokens `[1]`.
        write: gets each piece of text.

    Returns:
        The new tokens and their speed.
    """
    printer = TokenPrinter(tokenizer, write)
    for tokens in steps():
        printer.add(int(tokens[0]))  # waits for the device: the token is there
    printer.end()
    return printer.ids, printer.speed
