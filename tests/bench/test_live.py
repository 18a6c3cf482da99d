"""Tokens as text while they come, and their speed."""

from __future__ import annotations

import torch

from trilithon.bench.live import Speed, TokenText, print_tokens


class Bytes:
    """A tokenizer whose ids are bytes."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def test_a_character_of_several_bytes_is_printed_when_it_is_complete():
    text = TokenText(Bytes())
    assert [text.add(byte) for byte in "aé€b".encode()] == ["a", "", "é", "", "", "€", "b"]
    assert text.rest() == ""


def test_what_stays_incomplete_is_printed_at_the_end():
    text = TokenText(Bytes())
    pieces = [text.add(byte) for byte in b"ab\xe2\x82"]
    assert "".join(pieces) == "ab"
    assert text.rest() == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_print_nothing():
    text = TokenText(Bytes())
    assert [text.add(token) for token in (97, 256, 98)] == ["a", "", "b"]


def test_without_a_tokenizer_ids_are_printed():
    written: list[str] = []
    ids, speed = print_tokens(lambda: (torch.tensor([i]) for i in (5, 7)), None, written.append)
    assert ids == [5, 7]
    assert "".join(written) == "5 7 "
    assert speed.tokens == 2
    assert 0 < speed.first_seconds <= speed.seconds


def test_speed_in_words():
    assert str(Speed(5, 0.5, 1.0)) == "5 tokens in 1.00 s: the first after 500 ms, then 8.0 tokens/s"
    assert str(Speed(1, 0.5, 0.5)) == "1 token in 500 ms: the first after 500 ms"
