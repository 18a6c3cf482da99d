"""Which heads a rank holds."""

from __future__ import annotations

import pytest

from trilithon.errors import InputError
from trilithon.parallel.heads import heads_in_words, heads_of, part


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize(("h", "g"), [(14, 2), (16, 8), (32, 8), (12, 12), (9, 3), (8, 1)])
def test_each_query_head_is_held_once_with_the_key_and_value_head_that_it_reads(h, g, ranks):
    held = [heads_of(h, g, rank, ranks) for rank in range(ranks)]
    assert [head for own in held for head in own.queries] == list(range(h))
    for own in held:
        reads = [head // (h // g) for head in own.queries]
        assert reads == [head for head in own.kv for _ in range(own.group)]
    sizes = [len(own.queries) for own in held]
    assert max(sizes) - min(sizes) <= max(h // g, 1)


def test_heads_that_divide_are_dealt_out_evenly():
    assert heads_of(32, 8, 1, 4).queries == range(8, 16)
    assert heads_of(32, 8, 1, 4).kv == range(2, 4)


def test_fewer_key_value_heads_than_ranks_are_kept_by_several():
    held = [heads_of(14, 2, rank, 4) for rank in range(4)]
    assert [list(own.kv) for own in held] == [[0], [0], [1], [1]]
    assert [len(own.queries) for own in held] == [3, 4, 3, 4]
    assert heads_in_words(14, 2, 4) == (
        "14 query heads and 2 key/value heads over 4 ranks: each holds 3 to 4 and 1; "
        "each key/value head is kept by 2 ranks, since there are fewer than ranks"
    )
    assert heads_in_words(32, 8, 2) == "32 query heads and 8 key/value heads over 2 ranks: each holds 16 and 4"


def test_more_ranks_than_query_heads_are_refused():
    with pytest.raises(InputError) as refused:
        heads_of(4, 2, 0, 5)
    assert str(refused.value) == (
        "cannot share 4 query heads among 5 ranks\n  because a rank would hold none\n  start 4 ranks or fewer"
    )


def test_parts_differ_by_one_at_most():
    assert [len(part(10, rank, 4)) for rank in range(4)] == [2, 3, 2, 3]
