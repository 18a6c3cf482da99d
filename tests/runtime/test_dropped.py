"""What nobody refers to is given up."""

from __future__ import annotations

import gc

from runtime.dropped import compiled_and_dropped, holders


def test_a_dropped_model_is_gone() -> None:
    refs = compiled_and_dropped("cpu")
    gc.collect()
    assert [x() for x in refs] == [None, None, None]


def test_who_holds_something_is_told() -> None:
    kept = {"here": [object()]}
    assert "list" in holders(kept["here"][0]) and "'here'" in holders(kept["here"][0])
