"""Write an artefact such that a reader finds the old one whole or the new one whole, whatever happens in between.

Files are written beside the old ones under names that hold a part of their hash, and reach the disk before the manifest
takes the place of the old one in one step. Only then are the files that the old manifest listed, and the new does not,
removed; who has mapped one keeps its contents.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trilithon.artefact.digest import Digest
from trilithon.artefact.manifest import MANIFEST, NAME, render
from trilithon.errors import InputError
from trilithon.folders import remove_file

Chunks = Iterable[bytes | memoryview]
FRESH = ".new-"
HASHED = 16  # digits of a hash in a name
ORPHAN = re.compile(rf"[\w-]+-[0-9a-f]{{{HASHED}}}\.(plan|json|safetensors)")  # as a process leaves it that is ended midway


class Writer:
    """Files on their way into a folder, which is locked against other writers; made by `writing`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.listed = folder, dict[str, dict[str, Any]]()
        self._old = _listed(folder)

    def add(self, name: str, chunks: Chunks) -> None:
        """Write one file.

        Args:
            name: what the manifest calls it, e.g. "prefill.plan".
        """
        digest, size, fresh = Digest(), 0, self.folder / f"{FRESH}{os.getpid()}-{name}"
        with _created(fresh) as file:
            for chunk in chunks:
                digest.update(chunk)
                size += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        stem, dot, end = name.partition(".")
        self._take(name, f"{stem}-{digest.hexdigest()[:HASHED]}{dot}{end}", fresh, size, digest.hexdigest())

    def add_folder(self, name: str, files: Mapping[str, bytes]) -> None:
        """Write files that must keep their names, into a folder of their own."""
        together = hashlib.sha256()
        for own, content in sorted(files.items()):
            together.update(f"{own} {len(content)} ".encode() + content)
        inner = f"{name}-{together.hexdigest()[:HASHED]}"
        (self.folder / inner).mkdir(exist_ok=True)
        for own, content in files.items():
            fresh = self.folder / f"{FRESH}{os.getpid()}-{own}"
            with _created(fresh) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            digest = Digest()
            digest.update(content)
            self._take(f"{name}/{own}", f"{inner}/{own}", fresh, len(content), digest.hexdigest())

    def _take(self, name: str, file: str, fresh: Path, size: int, digest: str) -> None:
        assert NAME.fullmatch(file), file
        os.replace(fresh, self.folder / file)
        self.listed[name] = {"file": file, "bytes": size, "sha256": digest}

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Make the new artefact the one that readers find, and remove what only the old one had."""
        text = render({**manifest, "files": self.listed}).encode()
        fresh = self.folder / f"{FRESH}{os.getpid()}-{MANIFEST}"
        with _created(fresh) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _sync(self.folder)
        os.replace(fresh, self.folder / MANIFEST)
        _sync(self.folder)
        orphans = {path.name for path in self.folder.iterdir() if ORPHAN.fullmatch(path.name)}
        self._remove((self._old | orphans) - self._names)

    def give_up(self) -> None:
        """Remove what was written, save what the manifest lists that readers find now: the old one, or already the new."""
        self._remove(self._names - _listed(self.folder))

    @property
    def _names(self) -> set[str]:
        return {about["file"] for about in self.listed.values()}

    def _remove(self, names: set[str]) -> None:
        """These files, and what is half written."""
        for path in [*(self.folder / name for name in names), *self.folder.glob(f"{FRESH}*")]:
            remove_file(path)
        for parent in {(self.folder / name).parent for name in names} - {self.folder}:
            _quietly(parent.rmdir)


@contextmanager
def writing(folder: Path) -> Iterator[Writer]:
    """A writer into `folder`, which is made where it is not there; if anything fails the old artefact stays as it was.

    Raises:
        InputError: another process is writing into it, or it cannot be written to.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder)
    except OSError as error:
        raise InputError(f"cannot save into {folder}", why=error.strerror or str(error), todo="name another folder") from error
    writer = Writer(folder)
    try:
        yield writer
    except BaseException:
        writer.give_up()
        if made:
            _quietly(folder.rmdir)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _listed(folder: Path) -> set[str]:
    """Names of the files that the manifest there lists; none where it cannot be read, whatever the reason."""
    try:
        listed = json.loads((folder / MANIFEST).read_bytes())["files"].values()
        names = [about["file"] for about in listed]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return set()
    return {name for name in names if isinstance(name, str) and NAME.fullmatch(name) and ".." not in name}


@contextmanager
def _created(path: Path) -> Iterator[Any]:
    """A new file that others may read as the user's settings say."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
        yield file


def _locked(folder: Path) -> int | None:
    """A handle that holds a lock on the folder until it is closed; None where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        why = "another process, or another thread, is saving into it"
        raise InputError(f"cannot save into {folder}", why=why, todo="wait until it is done, or name another folder") from None
    except OSError:  # a file system without locks
        os.close(handle)
        return None
    return handle


def _sync(folder: Path) -> None:
    """Let renames reach the disk, where the system can do that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    _quietly(lambda: os.fsync(handle))
    os.close(handle)


def _quietly(act: Callable[[], Any]) -> None:
    with suppress(OSError):
        act()
