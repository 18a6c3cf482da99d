"""What a line may say, and the reason for each that is refused."""

from __future__ import annotations

import json

import pytest

from trilithon.batch.jobs import Job, Refusal, read_jobs


@pytest.mark.parametrize(
    ("line", "job"),
    [
        ('{"prompt": "a"}', Job(1, 1, "a")),
        ('{"id": "x", "prompt": "a"}', Job(1, "x", "a")),
        ('{"id": 0, "input_ids": [0, 5]}', Job(1, 0, (0, 5))),
        ('{"id": null, "prompt": "", "max_new_tokens": 3, "note": {"any": 1}}', Job(1, 1, "", 3)),
        ('{"prompt": "\\u2028\\ud83d\\ude00"}', Job(1, 1, "\u2028\U0001f600")),
    ],
)
def test_what_is_read(line, job):
    assert list(read_jobs([line.encode()], set())) == [job]


@pytest.mark.parametrize(
    ("line", "id", "reason"),
    [
        (b"", None, "it is empty"),
        (b"  \n", None, "it is empty"),
        (b"{", None, "it is not JSON"),
        (b'{"prompt": "\xff"}', None, "it is not JSON"),
        (b"[" * 100_000, None, "it is not JSON"),
        (b'{"id": ' + b"9" * 5000 + b', "prompt": "a"}', None, "it is not JSON"),
        (b"[1]", None, "it is no JSON object but list"),
        (b'{"id": 1.5, "prompt": "a"}', None, "its id is float"),
        (b'{"id": true, "prompt": "a"}', None, "its id is bool"),
        (b'{"id": "\\ud800", "prompt": "a"}', None, "its id is no text"),
        (b'{"id": "x"}', "x", "it has neither prompt nor input_ids"),
        (b'{"prompt": "a", "input_ids": [1]}', 1, "it has both prompt and input_ids"),
        (b'{"prompt": 5}', 1, "its prompt is int, no string"),
        (b'{"prompt": "a\\udc00"}', 1, "its prompt is no text: surrogates not allowed at character 1"),
        (b'{"input_ids": []}', 1, "its input_ids is no list of at least one token id"),
        (b'{"input_ids": [1, -2]}', 1, "its input_ids holds -2, which is no token id"),
        (b'{"input_ids": [1, true]}', 1, "its input_ids holds true"),
        (b'{"input_ids": [null]}', 1, "its input_ids holds null"),
        (b'{"input_ids": [9223372036854775808]}', 1, "its input_ids holds 9223372036854775808"),
        (b'{"prompt": "a", "max_new_tokens": 0}', 1, "its max_new_tokens is 0"),
        (b'{"prompt": "a", "max_new_tokens": "3"}', 1, 'its max_new_tokens is "3"'),
        (b'{"prompt": "a", "temperature": 0.5}', 1, "it sets temperature, which is set for the whole run"),
    ],
)
def test_what_is_refused(line, id, reason):
    (refusal,) = read_jobs([line], set())
    assert isinstance(refusal, Refusal)
    assert (refusal.line, refusal.id) == (1, id) and refusal.reason.startswith(reason)
    json.dumps(refusal.to_json(), ensure_ascii=False).encode()


def test_an_id_is_answered_once():
    """A number that is a line's by default is an id as any other; a string of digits is another id."""
    lines = [b'{"id": 3, "prompt": "a"}', b'{"id": "3", "prompt": "b"}', b'{"prompt": "c"}', b'{"prompt": "d"}']
    first, second, twice, fourth = read_jobs(lines, set())
    assert [first.id, second.id, fourth.id] == [3, "3", 4]
    assert twice == Refusal(3, 3, "an earlier line has the id 3 too")


def test_what_is_done_is_left_out_and_still_counts():
    lines = [b'{"id": "a", "prompt": "a"}', b'{"id": "b", "prompt": "b"}', b'{"id": "a", "prompt": "c"}']
    assert [(type(x), x.line) for x in read_jobs(lines, {"a"})] == [(Job, 2), (Refusal, 3)]
