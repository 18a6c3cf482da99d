"""What ends a row besides its end-of-text token: strings, and the user's own criteria."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trilithon.errors import InputError
from trilithon.runtime.protocol import StoppingCriterion, Tokenizer

# Tokens decoded before those that a stop string can touch: the first bytes of a character may be cut off there, and some
# tokenizers drop the space before the first token.
MARGIN_TOKENS = 5


@dataclass(frozen=True)
class StopStrings:
    """Strings that finish a row when a token completes one of them, also in the middle of the token.

    Attributes:
        strings: at least one, none empty.
        tokenizer: what the ids are decoded with.
    """

    strings: tuple[str, ...]
    tokenizer: Tokenizer

    @property
    def tail_tokens(self) -> int:
        """How many of the last tokens decide: a token is a byte at least."""
        return max(len(s.encode()) for s in self.strings) + MARGIN_TOKENS

    def completed_by_last(self, tokens: Sequence[int]) -> bool:
        """Whether the last of a row's tokens completes a stop string; those that earlier tokens completed do not count."""
        tail = list(tokens[-self.tail_tokens :])
        before, text = self._text(tail[:-1]), self._text(tail)
        common = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), min(len(before), len(text)))
        return any(text.find(stop, max(0, common - len(stop) + 1)) >= 0 for stop in self.strings)

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class Stops:
    """All that the host asks after each token; asking waits for the device."""

    strings: StopStrings | None = None
    criteria: tuple[StoppingCriterion, ...] = ()

    def __bool__(self) -> bool:
        return self.strings is not None or bool(self.criteria)

    def finished(self, ids: Tensor, pad: Tensor, scores: Any) -> Tensor:
        """Which rows their last token finished.

        Args:
            ids: `[b n]`, left padded, up to the token just chosen.
            pad: `[b]`.
            scores: what was gathered of `output_scores`, or None; criteria may read it.

        Returns:
            `[b]` bool on the device of the ids.
        """
        done = self.finished_by_criteria(ids, scores)
        if self.strings is None:
            return done
        tail = min(self.strings.tail_tokens, ids.shape[1])
        rows, skipped = ids[:, -tail:].tolist(), (pad - (ids.shape[1] - tail)).clamp_min(0).tolist()
        ended = [self.strings.completed_by_last(row[skip:]) for row, skip in zip(rows, skipped, strict=True)]
        return done | torch.tensor(ended, device=ids.device)

    def finished_by_criteria(self, ids: Tensor, scores: Any) -> Tensor:
        """As `finished`, without stop strings."""
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for criterion in self.criteria:
            done = done | torch.as_tensor(criterion(ids, scores), device=ids.device)
        return done


def make_stops(stop_strings: str | Sequence[str] | None, tokenizer: Tokenizer | None, criteria: Any) -> Stops:
    """Check these arguments of `generate`.

    Raises:
        InputError: a stop string is empty or no string, there is no tokenizer, or a criterion cannot be called.
    """
    strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings or ())
    for string in strings:
        if not isinstance(string, str) or not string:
            raise InputError(
                f"stop_strings holds {string!r}",
                why="an empty string would stop every row at once" if string == "" else "it is no string",
                todo="pass a string, or a list of strings",
            )
    if strings and tokenizer is None:
        raise InputError(
            "stop_strings was given without tokenizer",
            why="ids are matched by their text",
            todo="pass tokenizer=, the one that the prompt was made with",
        )
    for criterion in criteria or ():
        if not callable(criterion):
            raise InputError(
                f"stopping_criteria holds a {type(criterion).__name__}, which cannot be called",
                todo="pass a list of callables (input_ids, scores) -> [b] bool, such as transformers' StoppingCriteria",
            )
    found = StopStrings(strings, tokenizer) if strings and tokenizer is not None else None
    return Stops(found, tuple(criteria or ()))
