"""A conversation: each turn goes on from what the cache holds of the turns before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from trilithon.errors import InputError
from trilithon.runtime.generate import run_to_end, without_outputs
from trilithon.runtime.memory import Memory, Tenant
from trilithon.runtime.prompts import check_ids
from trilithon.runtime.protocol import Decoder, Streamer
from trilithon.runtime.request import GenerateArguments, make_request
from trilithon.runtime.run import Generated, Run


class Conversation(Tenant):
    """One row of tokens that grows turn by turn. `Compiled.conversation` makes one.

    Many can be open: the tokens of one are in the decoder, those of the others are kept as copies.

    Attributes:
        tokens: `[1 n]` int64, all that was given and generated so far.
    """

    def __init__(self, memory: Memory, defaults: Mapping[str, Any]) -> None:
        self._memory, self._defaults = memory, defaults
        self.tokens = torch.zeros(1, 0, dtype=torch.int64, device=memory.decoder.device)
        self._held = 0  # how many of the tokens the cache holds: fewer than there are

    def __len__(self) -> int:
        return self.tokens.shape[1]

    def __repr__(self) -> str:
        return f"<Conversation of {len(self)} tokens, room for {self.room} more>"

    @property
    def room(self) -> int:
        """Tokens that can still be given or generated."""
        return self._memory.decoder.cache_tokens - len(self)

    @overload
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        streamer: Streamer | None = None,
        return_dict_in_generate: Literal[False] = False,
        **arguments: Unpack[GenerateArguments],
    ) -> Tensor: ...

    @overload
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        streamer: Streamer | None = None,
        return_dict_in_generate: Literal[True],
        **arguments: Unpack[GenerateArguments],
    ) -> Generated: ...

    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        streamer: Streamer | None = None,
        return_dict_in_generate: bool = False,
        **arguments: Unpack[GenerateArguments],
    ) -> Tensor | Generated:
        """Append tokens and go on, without computing again what the cache holds.

        Args:
            input_ids: `[1 s]`, the tokens of this turn only, without padding; None = go on from what there is.
            streamer: gets the tokens of this turn, then the new ones.
            return_dict_in_generate, arguments: as `trilithon.runtime.generate.generate` takes them, but for
                `attention_mask` and `num_return_sequences`. `max_length` counts the whole conversation.

        Returns:
            What `generate` gives for the whole conversation as its prompt: `[1 n]`, all tokens so far.

        Raises:
            InputError: an argument is wrong, or there is no token yet.
            CapacityExceeded: tokens and new tokens do not fit. The conversation stays as it was before the call, as it
                does when anything else is raised.
        """
        fresh = self._checked(input_ids, arguments)
        decoder = self._memory.decoder
        tokens = torch.cat([self.tokens, fresh], 1)
        given: Any = {**self._defaults, **arguments, "attention_mask": torch.ones_like(tokens)}
        held = self._held if self._memory.holds(self) else 0
        request = replace(make_request(decoder.cache_tokens, decoder.device, tokens, **given), held=held)
        if not return_dict_in_generate:
            request = without_outputs(request)
        try:
            with self._memory.turn(self) as decoder:
                run = run_to_end(decoder, request, streamer, shown=fresh)
                self._keep(run, decoder)
        except BaseException:
            self._memory.forget(self)
            raise
        return run.generated() if return_dict_in_generate else self.tokens

    def fork(self) -> Conversation:
        """A conversation that has the same tokens and goes its own way; what the cache holds is shared, not computed again."""
        other = Conversation(self._memory, self._defaults)
        other.tokens, other._held = self.tokens, self._held
        other.snapshot = self._memory.snapshot_of(self)
        return other

    def __copy__(self) -> Conversation:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> Conversation:
        return self.fork()

    def _checked(self, input_ids: Tensor | None, arguments: GenerateArguments) -> Tensor:
        for name, value in (("attention_mask", None), ("num_return_sequences", 1)):
            if arguments.get(name, value) is not value:
                raise InputError(
                    f"a conversation takes no {name}",
                    why="it is one row without padding",
                    todo="leave it out; open a conversation, or a fork, for each row",
                )
        if input_ids is None:
            if not len(self):
                raise InputError("the conversation has no token to go on from", todo="pass input_ids [1 s]")
            return self.tokens[:, :0]
        check_ids(input_ids, self._memory.decoder.device)
        if len(input_ids) != 1:
            raise InputError(
                f"a conversation takes one row, got {len(input_ids)}",
                why="its turns are appended to one row of the cache",
                todo="open a conversation for each row",
            )
        return input_ids.long()

    def _keep(self, run: Run, decoder: Decoder) -> None:
        """Note what was generated, and take back what the decoder holds behind it."""
        tokens = run.sequences()
        self._held = min(run.cached, tokens.shape[1] - 1)  # the last is taken in next time, for its logits
        if self._held < run.cached:
            decoder.rewind(torch.tensor([self._held], device=tokens.device))
        self.tokens = tokens
