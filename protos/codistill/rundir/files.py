"""Locks, and files that are either wholly there or not at all: how everything in a run's folder is written.

Locks are the kernel's (flock): it releases them when their holder dies, in whatever way. A child that inherits the
descriptor holds the lock too.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO, Any

__all__ = [
    "is_locked",
    "locked",
    "remove_abandoned_parts",
    "staged",
    "sync_folder",
    "try_lock",
    "write_atomically",
]

_POLL_SECONDS = 0.05


def _do_nothing() -> None:
    """Do nothing: the default of `waiting`."""


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file if no other process holds its lock; return whether it could."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock on a file; there need be no such file."""
    try:
        with path.open() as file:
            return not try_lock(file)
    except OSError:
        return False


@contextlib.contextmanager
def locked(
    path: Path, seconds: float = math.inf, waiting: Callable[[], None] = _do_nothing, *, keep_content: bool = False
) -> Generator[IO[str], None, None]:
    """Hold the lock on a file, made if need be; yield the open file, whose descriptor a child may inherit.

    Args:
        path: the file.
        seconds: how long to wait for its holder to release it.
        waiting: called once if somebody else holds it.
        keep_content: leave what the file holds.

    Raises:
        TimeoutError: somebody else held it for so long.
        OSError: the file cannot be written.
    """
    with path.open("a+" if keep_content else "w") as file:
        deadline = time.monotonic() + seconds
        announced = False
        while not try_lock(file):
            if not announced:
                announced = True
                waiting()
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{path} is locked by another process")
            time.sleep(_POLL_SECONDS)
        yield file


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that is either wholly there or not at all, whatever dies meanwhile.

    Raises:
        OSError: it could not be written; what was there is still there.
    """
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


@contextlib.contextmanager
def staged(path: Path, content: bytes, writer: str) -> Generator[Path, None, None]:
    """Write a file beside its place, durable and locked, for the caller to rename; what is not renamed is removed.

    Two writers of the same place cannot mix what they write: each has a file of its own. A file of a writer that died
    has no lock, by which :func:`remove_abandoned_parts` knows it.

    Args:
        path: the place.
        content: what to write.
        writer: what tells this writer from others.

    Raises:
        OSError: it could not be written; what was there is still there.
    """
    part = path.with_name(f"{path.name}.{writer}.part")
    try:
        with part.open("wb") as file:
            with contextlib.suppress(OSError):  # a file system without locks; there nothing is removed either
                fcntl.flock(file, fcntl.LOCK_EX)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            yield part
    finally:
        part.unlink(missing_ok=True)  # of a full disk it would keep what is left


def remove_abandoned_parts(folder: Path) -> None:
    """Remove the files that dead writers of :func:`staged` left."""
    for part in folder.glob("*.part"):
        with contextlib.suppress(OSError), part.open("rb") as file:
            if try_lock(file):
                part.unlink()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; without it a power cut may bring back the old ones."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
