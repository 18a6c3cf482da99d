"""Proofs kept on disk: what was proved or refuted once is read back when the very same question is asked again.

The key holds all that a verdict depends on: the lifted mask and its obligations, the sizes and their ranges, the data
of constant tables, the assumptions, and the prover itself (z3, torch, and this package's own source). So a stale entry
is never found, and nothing needs to be invalidated. Of the value nothing is trusted but its checksum.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import z3

from trilithon.folders import remove_file, replace_file, users_cache
from trilithon.lift.meaning import Meaning
from trilithon.prove.prove import Finding, Ranges
from trilithon.prove.verdict import Proof, Verdict
from trilithon.spec import term as t
from trilithon.spec.assumption import KINDS, Assumption
from trilithon.spec.codec import (
    CANONICAL,
    canonical_names,
    decode,
    encode,
    fingerprint,
    readable_classes,
    rename,
    source_digest,
)
from trilithon.spec.term import Term
from trilithon.spec.traverse import free_vars, tables

FORMAT = 1
KEPT = (Verdict.PROVED, Verdict.REFUTED)  # UNKNOWN and VACUOUS are found anew each time
BROKEN = (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, AssertionError, RecursionError)
log = logging.getLogger(__name__)


PROVER = (FORMAT, z3.get_full_version(), torch.__version__, source_digest("spec", "lift", "prove"))


def default_folder() -> Path:
    """`$TRILITHON_CACHE`, or `trilithon/proofs` in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`).

    Raises:
        RuntimeError: the user has no home.
    """
    own = os.environ.get("TRILITHON_CACHE")
    if own:
        return Path(own).expanduser()
    return users_cache() / "proofs"


def default_cache() -> ProofCache | None:
    """The cache in the default folder, or None where there is no such folder."""
    try:
        return ProofCache(default_folder())
    except RuntimeError as error:
        log.warning("proofs are not cached: %s", error)
        return None


@dataclass(frozen=True)
class Question:
    """What was asked: its key, and the names that size symbols have in the key and in the entry."""

    key: str
    names: Mapping[str, str]

    @classmethod
    def of(cls, meaning: Meaning, ranges: Ranges, assume: tuple[Assumption, ...]) -> Question | None:
        """The question that `examine` answers, or None where its content has no fingerprint."""
        if PROVER[-1] is None or not all(_is_own(a) for a in assume):
            return None
        held = {f.name: getattr(meaning, f.name) for f in fields(meaning)}
        held["obligations"] = tuple((o.term, o.low, o.high) for o in meaning.obligations)
        terms = list(_terms([*meaning.dims, sorted(meaning.tables.items()), held]))
        read = frozenset().union(*map(tables, terms))
        held["constants"] = {name: data for name, data in meaning.constants.items() if name in read}
        symbols = frozenset().union(*map(free_vars, terms))
        names = canonical_names(terms)
        known = {name: ranges[name] for name in symbols if name in ranges}
        try:
            return cls(fingerprint((PROVER, held, known, assume), names), names)
        except TypeError as error:
            log.warning("a proof is not cached: %s", error)
            return None


def _is_own(assumption: Assumption) -> bool:
    """Is what the assumption means part of the source that the key holds?"""
    kind = KINDS.get(assumption.kind)
    return kind is not None and all(getattr(kind, f).__module__.startswith("trilithon.") for f in ("fact", "holds", "sample"))


def _terms(value: Any) -> Iterable[Term]:
    """Every term in a nest of containers and dataclasses."""
    if isinstance(value, Term):
        yield value
    elif isinstance(value, Mapping):
        yield from _terms(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for x in value:
            yield from _terms(x)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _terms([getattr(value, f.name) for f in fields(value)])


@dataclass(frozen=True)
class ProofCache:
    """One file an answer; writers and readers may be many processes.

    A file that cannot be read is removed with a warning, and a folder that cannot be written to is left alone: the
    cache never makes a proof fail.
    """

    folder: Path

    def load(self, question: Question, meaning: Meaning) -> Finding | None:
        """The finding about `meaning` that was stored under this question, or None."""
        path = self._path(question)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("cannot read the proof cache: %s", error)
            return None
        try:
            return replace(_read(data.decode(), question), formula=meaning.keep)
        except BROKEN as error:
            log.warning("removed a broken entry of the proof cache, %s: %s: %s", path, type(error).__name__, error)
            remove_file(path)
            return None

    def store(self, question: Question, finding: Finding) -> None:
        """Keep a finding, if its verdict is one that time cannot change and it can be read back as it is."""
        if finding.proof.verdict not in KEPT:
            return
        bare = replace(finding, formula=t.TRUE)  # it is the question's
        try:
            text = _write(bare, question)
            if _read(text, question) != bare:
                raise ValueError("it is read back otherwise")
            replace_file(self._path(question), text)
        except BROKEN as error:
            log.warning("a proof was not cached: %s: %s", type(error).__name__, error)

    def _path(self, question: Question) -> Path:
        return self.folder / f"{question.key}.json"


def _classes() -> dict[str, type]:
    return readable_classes(Finding, Proof, Verdict)


def _write(finding: Finding, question: Question) -> str:
    text = json.dumps(encode(finding), ensure_ascii=False)
    if "$" in text:
        raise ValueError("a name in it holds a $")
    text = rename(text, question.names)
    return json.dumps({"key": question.key, "checksum": _checksum(text), "finding": json.loads(text)}, ensure_ascii=False)


def _read(text: str, question: Question) -> Finding:
    entry = json.loads(text)
    body = json.dumps(entry["finding"], ensure_ascii=False)
    if entry["key"] != question.key or entry["checksum"] != _checksum(body):
        raise ValueError("its checksum is wrong")
    back = {short: name for name, short in question.names.items()}
    finding = decode(json.loads(rename(body, back, CANONICAL)), _classes())
    if not isinstance(finding, Finding) or finding.proof.verdict not in KEPT:
        raise ValueError("it is no finding")
    return finding


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
