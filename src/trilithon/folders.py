"""Files that outlive a process: where they are, and how they are written."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)


def users_cache() -> Path:
    """`trilithon` in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`).

    Raises:
        RuntimeError: the user has no home.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (caches if caches.is_absolute() else Path.home() / ".cache") / "trilithon"


def replace_file(path: Path, text: str) -> None:
    """Write at once: a reader sees all of the file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-", suffix=path.suffix)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        remove_file(Path(name))
        raise


def remove_file(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("cannot remove %s: %s", path, error)
