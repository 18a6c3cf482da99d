"""Proofs on disk: the same question is answered without z3, any other question is not found."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import make_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.export import Dim

import trilithon
from masks import NEVER, PROVED, Attend, export_case, inputs
from trilithon.lift.meaning import Meaning
from trilithon.prove import cache as cache_module
from trilithon.prove import program as program_module
from trilithon.prove.cache import ProofCache, Question, default_cache, default_folder
from trilithon.prove.program import Examined, examine_program
from trilithon.prove.prove import Finding, Ranges, examine
from trilithon.prove.solve import Prover
from trilithon.prove.verdict import Proof, Verdict
from trilithon.spec import codec
from trilithon.spec import term as t
from trilithon.spec.assumption import KINDS, Assumption, Kind, attention_mask, guard, position_ids
from trilithon.spec.codec import source_digest
from trilithon.spec.masks import B, Documents, Full, K, Q

S, ROWS = t.var("s70"), t.var("s44")
RANGES: Ranges = {"s70": (1, 64), "s44": (1, 8), "s5": (1, 3)}


def read(table: str, *indices: t.Term, sort: t.Sort = "int") -> t.Term:
    return t.read(table, indices, sort)


def meaning(**changes: Any) -> Meaning:
    """Causal, where keys are set and a constant table says so."""
    keep = (K <= Q) & ~read("flags", B, K).eq(0) & read("allowed", Q, sort="bool")
    made = Meaning(
        keep=keep,
        dims=(ROWS, t.integer(2), S, S),
        scale=0.5,
        drops=("-inf",),
        needs_key=False,
        obligations=(obligation(Q + K),),
        tables={"flags": (ROWS, S), "allowed": (t.integer(64),), "unread": (S,)},
        constants={"allowed": torch.ones(64, dtype=torch.bool), "unread": torch.zeros(3)},
    )
    return replace(made, **changes)


def obligation(term: t.Term, low: int = -(1 << 63), high: int = (1 << 63) - 1) -> Any:
    return SimpleNamespace(term=term, low=low, high=high, node=None)


def key(asked: Meaning, ranges: Ranges = RANGES, assume: tuple[Assumption, ...] = ()) -> str:
    question = Question.of(asked, ranges, assume)
    assert question is not None
    return question.key


def no_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    def valid(*_: Any, **__: Any) -> None:
        raise AssertionError("z3 was asked")

    monkeypatch.setattr(Prover, "valid", valid)


# ---------------------------------------------------------------- what is the same question


def test_the_same_question_has_the_same_key() -> None:
    assert key(meaning()) == key(meaning())
    assert key(meaning()) == key(meaning(), {**RANGES, "s999": (3, 4)})  # a size that does not occur
    other_data = {**meaning().constants, "unread": torch.ones(3)}
    assert key(meaning()) == key(meaning(constants=other_data))


def test_names_of_sizes_do_not_matter() -> None:
    def named(length: str, rows: str) -> str:
        s, b = t.var(length), t.var(rows)
        keep = (K <= Q + s - b) & ~read("flags", B, K).eq(0)
        tables = {"flags": (b, s)}
        asked = meaning(keep=keep, dims=(b, t.integer(2), s, s), tables=tables, obligations=())
        return key(asked, {length: (1, 64), rows: (2, 8)})

    assert named("s70", "s44") == named("s3", "s99") == named("s44", "s70")
    assert named("s70", "s44") != named("s70", "u44")


OTHER_MEANINGS: dict[str, dict[str, Any]] = {
    "keep": {"keep": (K < Q) & ~read("flags", B, K).eq(0) & read("allowed", Q, sort="bool")},
    "dims": {"dims": (ROWS, t.integer(3), S, S)},
    "rectangular": {"dims": (ROWS, t.integer(2), S, t.var("s5"))},
    "scale": {"scale": 0.25},
    "drops": {"drops": ("-3e38",)},
    "needs_key": {"needs_key": True},
    "no obligation": {"obligations": ()},
    "obligation": {"obligations": (obligation(Q - K),)},
    "range of an obligation": {"obligations": (obligation(Q + K, 0, 127),)},
    "shape of a table": {"tables": {**meaning().tables, "flags": (t.ONE, S)}},
    "another table": {"tables": {**meaning().tables, "more": (S,)}},
    "constant": {"constants": {"allowed": torch.tensor([False] + [True] * 63)}},
    "dtype of a constant": {"constants": {"allowed": torch.ones(64, dtype=torch.int64)}},
    "no constant": {"constants": {}},
}


@pytest.mark.parametrize("name", OTHER_MEANINGS)
def test_another_mask_is_another_question(name: str) -> None:
    assert key(meaning(**OTHER_MEANINGS[name])) != key(meaning())


def test_a_field_that_is_added_to_a_meaning_is_in_the_key() -> None:
    """Of a field whose content is not known, nothing is cached."""
    more = make_dataclass("Meaning", [("extra", Any, None)], bases=(Meaning,), frozen=True)
    one, two, unknown = (more(**vars(meaning()), extra=x) for x in (1, 2, object()))
    assert len({key(meaning()), key(one), key(two)}) == 3
    assert Question.of(unknown, RANGES, ()) is None


@pytest.mark.parametrize(
    "ranges",
    [{**RANGES, "s70": (1, 65)}, {**RANGES, "s70": (2, 64)}, {**RANGES, "s70": (1, None)}, {"s44": (1, 8)}],
    ids=["high", "low", "open", "none"],
)
def test_another_range_is_another_question(ranges: Ranges) -> None:
    assert key(meaning(), ranges) != key(meaning())


@pytest.mark.parametrize(
    "assume",
    [
        (attention_mask.all_ones(),),
        (attention_mask.left_padded(),),
        (position_ids.consecutive(),),
        (guard("attention_mask", "all_ones"),),
        (attention_mask.all_ones(), position_ids.consecutive()),
    ],
    ids=lambda assume: " ".join(map(str, assume)),
)
def test_other_assumptions_are_another_question(assume: tuple[Assumption, ...]) -> None:
    keys = {key(meaning()), key(meaning(), assume=assume), key(meaning(), assume=(attention_mask.right_padded(),))}
    assert len(keys) == 3


@pytest.mark.parametrize("part", range(4), ids=["format", "z3", "torch", "source"])
def test_another_prover_is_another_question(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(meaning())
    changed = tuple("other" if i == part else x for i, x in enumerate(cache_module.PROVER))
    monkeypatch.setattr(cache_module, "PROVER", changed)
    assert key(meaning()) != before


def test_the_digest_covers_the_source_of_the_prover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("spec", "lift/handlers", "prove"):
        (tmp_path / part).mkdir(parents=True)
        (tmp_path / part / "a.py").write_text("1")
    parts = ("spec", "lift", "prove")
    monkeypatch.setattr(codec, "__file__", str(tmp_path / "spec" / "codec.py"))
    digests = [source_digest(*parts)]
    for part in ("spec", "lift/handlers", "prove"):
        (tmp_path / part / "a.py").write_text("2")
        digests.append(source_digest(*parts))
    (tmp_path / "spec" / "a.py").rename(tmp_path / "spec" / "b.py")
    digests.append(source_digest(*parts))
    assert len(set(digests)) == 5
    monkeypatch.setattr(codec, "__file__", str(tmp_path / "nowhere" / "spec" / "codec.py"))
    assert source_digest(*parts) is None


def test_without_source_nothing_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "PROVER", (*cache_module.PROVER[:-1], None))
    assert Question.of(meaning(), RANGES, ()) is None


def test_a_kind_of_assumption_from_elsewhere_is_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    own = KINDS["all_ones"]
    monkeypatch.setitem(KINDS, "all_ones", Kind(own.text, lambda e: t.TRUE, own.holds, own.sample))
    assert Question.of(meaning(), RANGES, (attention_mask.all_ones(),)) is None
    assert Question.of(meaning(), RANGES, ()) is not None


def test_a_field_without_fingerprint_is_not_cached() -> None:
    assert Question.of(meaning(drops=(object(),)), RANGES, ()) is None


# ---------------------------------------------------------------- store and load


def provable() -> Meaning:
    return meaning(keep=(K <= Q) & ~read("flags", B, K).eq(0))


def stored(cache: ProofCache, asked: Meaning | None = None, ranges: Ranges = RANGES) -> tuple[Question, Finding]:
    asked = provable() if asked is None else asked
    question = Question.of(asked, ranges, ())
    assert question is not None
    finding = examine(asked, ranges)
    assert finding.proof.verdict is Verdict.PROVED
    cache.store(question, finding)
    return question, finding


@pytest.fixture
def cache(tmp_path: Path) -> ProofCache:
    return ProofCache(tmp_path / "deep" / "proofs")


def entries(cache: ProofCache) -> list[Path]:
    return sorted(cache.folder.iterdir()) if cache.folder.exists() else []


def test_what_was_stored_is_loaded(cache: ProofCache) -> None:
    question, finding = stored(cache)
    assert cache.load(question, provable()) == finding
    assert [path.name for path in entries(cache)] == [f"{question.key}.json"]


def test_sizes_are_renamed_back(cache: ProofCache) -> None:
    def of(length: str) -> tuple[Meaning, Ranges]:
        s = t.var(length)
        keep = (K <= Q) & (K > Q - 100)
        return meaning(keep=keep, dims=(t.ONE, t.ONE, s, s), tables={}, constants={}, obligations=()), {length: (1, 64)}

    asked, ranges = of("s70")
    _, finding = stored(cache, asked, ranges)
    assert [a.text for a in finding.proof.assumptions] == ["s70 <= 64"]
    asked, ranges = of("s12")
    question = Question.of(asked, ranges, ())
    assert question is not None
    loaded = cache.load(question, asked)
    assert loaded is not None and loaded.formula is asked.keep
    (used,) = loaded.proof.assumptions
    assert used == Assumption("s12", "range", "export range", "s12 <= 64")


def test_sizes_inside_a_mask_are_renamed_back(cache: ProofCache) -> None:
    segment = read("segments", B, Q + S)
    question = Question.of(meaning(), RANGES, ())
    assert question is not None and question.names == {"s44": "$s0", "s70": "$s1"}
    finding = Finding(Proof(Documents(segment), Verdict.PROVED), (), t.TRUE)
    cache.store(question, finding)
    text = entries(cache)[0].read_text()
    assert "s70" not in text and "$s1" in text
    loaded = cache.load(question, meaning())
    assert loaded is not None and loaded.proof.mask == Documents(segment)


@pytest.mark.parametrize("verdict", [Verdict.UNKNOWN, Verdict.VACUOUS])
def test_other_verdicts_are_not_kept(cache: ProofCache, verdict: Verdict) -> None:
    question = Question.of(meaning(), RANGES, ())
    assert question is not None
    cache.store(question, Finding(Proof(Full(), verdict), (), meaning().keep))
    assert entries(cache) == []


def damage(text: str) -> Iterator[str]:
    entry = json.loads(text)
    yield ""
    yield text[: len(text) // 2]
    yield text.replace("attention", "attenti0n").replace("flags", "flag5")
    yield text.replace(entry["key"], "0" * 64)
    yield json.dumps([1, 2, 3])
    yield json.dumps({**entry, "finding": {"class": "Path", "fields": {}}})
    yield "[" * 100_000
    yield "\x00\xff"


@pytest.mark.parametrize("n", range(8))
def test_a_damaged_entry_is_removed_with_a_warning(n: int, cache: ProofCache, caplog: pytest.LogCaptureFixture) -> None:
    question, _ = stored(cache)
    (path,) = entries(cache)
    damaged = list(damage(path.read_text()))[n]
    assert damaged != path.read_text()
    path.write_text(damaged, encoding="latin-1" if n == 7 else "utf-8")
    with caplog.at_level(logging.WARNING, "trilithon"):
        assert cache.load(question, meaning()) is None
    assert "broken entry of the proof cache" in caplog.text
    assert entries(cache) == []
    assert cache.load(question, meaning()) is None  # and the second time it is just not there


def test_a_right_checksum_of_a_wrong_value_is_refused(cache: ProofCache) -> None:
    question, _ = stored(cache)
    (path,) = entries(cache)
    for value in ({"class": "Causal", "fields": {"align": "upper_left"}}, {"class": "Proof", "fields": {}}, 3):
        body = json.dumps(value)
        text = {"key": question.key, "checksum": cache_module._checksum(body), "finding": value}
        path.write_text(json.dumps(text))
        assert cache.load(question, meaning()) is None
        assert not path.exists()


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder")
    blocked = ProofCache(tmp_path / "file" / "proofs")
    with caplog.at_level(logging.WARNING, "trilithon"):
        question, _ = stored(blocked)
        assert blocked.load(question, meaning()) is None
    assert "a proof was not cached" in caplog.text


def test_many_writers_and_readers(cache: ProofCache) -> None:
    question, finding = stored(cache)

    def work(n: int) -> bool:
        if n % 2:
            cache.store(question, finding)
        return cache.load(question, provable()) == finding

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))
    assert len(entries(cache)) == 1  # no temporary file is left


def test_a_failed_write_leaves_nothing(cache: ProofCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    stored(cache)
    assert entries(cache) == []


# ---------------------------------------------------------------- programs


def found_in(name: str, cache: ProofCache | None, **options: Any) -> Examined:
    (found,) = examine_program(PROGRAMS[name], cache=cache, **options)
    return found


PROGRAMS: dict[str, Any] = {}


@pytest.fixture(scope="module", autouse=True)
def programs() -> None:
    for name in ("window_4", "packed_positions", "causal_padding"):
        PROGRAMS[name] = export_case(PROVED[name]).program
    PROGRAMS["one_more"] = export_case(NEVER["one_more"]).program


@pytest.mark.parametrize("name", ["window_4", "packed_positions", "causal_padding", "one_more"])
def test_the_second_run_does_not_ask_z3(name: str, cache: ProofCache, monkeypatch: pytest.MonkeyPatch) -> None:
    first = found_in(name, cache)
    no_solver(monkeypatch)
    second = found_in(name, cache)
    assert second.finding == first.finding
    assert (first.cached, second.cached) == (False, True)
    assert second.validated == first.validated  # a proof that was read is compared with the program all the same
    with pytest.raises(AssertionError, match="z3 was asked"):
        found_in(name, None)


def test_a_wrong_entry_is_caught_by_the_program_itself(cache: ProofCache) -> None:
    """The checksum is no signature: whoever can write the folder can lie, and the comparison sees it."""
    first = found_in("window_4", cache)
    assert first.finding is not None and first.meaning is not None
    (path,) = entries(cache)
    body = json.loads(path.read_text())
    lie = json.dumps(body["finding"]).replace('"window_keys": 4', '"window_keys": 5')
    path.write_text(json.dumps({**body, "finding": json.loads(lie), "checksum": cache_module._checksum(lie)}))
    second = found_in("window_4", cache)
    assert second.cached and second.proof is not None
    assert second.proof.verdict is Verdict.UNKNOWN and "disagree" in second.proof.reason


def test_a_finding_near_the_budget_is_not_kept(cache: ProofCache, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.1])
    monkeypatch.setattr(program_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert not found_in("window_4", cache).cached
    assert entries(cache) == []


def explain(options: trilithon.Options) -> trilithon.Report:
    case = PROVED["packed_positions"]
    b, s = Dim("b", min=1, max=64), Dim("s", min=1, max=4096)
    shapes = {name: {0: b, 2: s} for name in "qkv"} | {"position_ids": {0: b, 1: s}}
    return trilithon.explain(Attend(case).eval(), inputs(case, 2, 6, 6), shapes, options=options)


def test_options_decide(proof_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    off, on = trilithon.Options(proof_cache=False), trilithon.Options()
    assert on.proof_cache
    explain(off)
    assert not proof_folder.exists()
    (site,) = explain(on).sites
    assert len(list(proof_folder.iterdir())) == 1
    real = Question.of
    asked: list[Question | None] = []
    monkeypatch.setattr(Question, "of", lambda *given: asked.append(real(*given)) or asked[-1])
    (again,) = explain(on).sites
    assert (again.mask, again.assumptions, again.solver_seconds) == (site.mask, site.assumptions, site.solver_seconds)
    assert [path.stem for path in proof_folder.iterdir()] == [q.key for q in asked if q is not None]


def test_the_key_is_the_same_in_another_process(proof_folder: Path) -> None:
    """Another export, other hash seeds, another order of creation."""
    code = """
import sys
sys.path.insert(0, "tests")
from masks import PROVED, export_case
from trilithon.prove.cache import default_cache
from trilithon.prove.program import examine_program
names = sys.argv[1:]
print([x.cached for name in names for x in examine_program(export_case(PROVED[name]).program, cache=default_cache())])
"""
    root = Path(__file__).parents[2]
    runs = [
        subprocess.run([sys.executable, "-c", code, *names], cwd=root, capture_output=True, text=True, check=True).stdout
        for names in (("window_4", "causal_padding"), ("causal_padding", "window_4"))
    ]
    assert [run.strip().splitlines()[-1] for run in runs] == ["[False, False]", "[True, True]"]
    assert len(list(proof_folder.iterdir())) == 2


# ---------------------------------------------------------------- where


def test_where_proofs_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert default_folder() == Path(os.environ["TRILITHON_CACHE"])
    monkeypatch.delenv("TRILITHON_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "trilithon" / "proofs"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "trilithon" / "proofs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == tmp_path / "home" / ".cache" / "trilithon" / "proofs"


def test_without_a_home_nothing_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TRILITHON_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert default_cache() is None


def test_tests_keep_away_from_the_users_proofs(proof_folder: Path) -> None:
    assert default_folder() == proof_folder
    assert Path.home() / ".cache" not in proof_folder.parents
    assert not proof_folder.exists()
