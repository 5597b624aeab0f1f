"""Locks, private folders, and files that are either wholly there or not at all: how everything in a run's folder is written.

Locks are the kernel's (flock): it releases them when their holder dies, in whatever way. A child that inherits the
descriptor holds the lock too.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO, Any

__all__ = [
    "is_locked",
    "locked",
    "make_private_folder",
    "remove_abandoned_parts",
    "staged",
    "sync_folder",
    "try_lock",
    "write_atomically",
]

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_PART_SECONDS = 30.0  # for which another writer of the same part is awaited


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
            # Two processes that look at the same time must not take each other for the holder.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def make_private_folder(path: Path) -> None:
    """Make a folder that other users can neither read nor write; one that is there keeps its mode, and may get a warning.

    Who shares a folder between users makes it beforehand, with the mode that they need.

    Raises:
        OSError: it cannot be made.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = path.stat().st_mode & 0o777
    if mode & 0o007:
        _log.warning("folder %s can be used by other users (mode %03o); chmod 700 it", path, mode)


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


def write_atomically(
    path: Path, content: str | bytes, *, writer: str = "", previous: Path | None = None, private: bool = False
) -> None:
    """Write a file that is either wholly there or not at all, whatever dies meanwhile.

    Args:
        path: the file.
        content: what to write.
        writer: what tells this writer from others of the same file, who may write at the same time.
        previous: where the file that is replaced is kept; otherwise it is lost.
        private: let nobody but this user read it.

    Raises:
        OSError: it could not be written; what was there is still there, in its place or in `previous`.
    """
    with staged(path, content.encode() if isinstance(content, str) else content, writer, private=private) as part:
        if previous is not None and path.exists():
            path.replace(previous)
        part.replace(path)
    sync_folder(path.parent)


@contextlib.contextmanager
def staged(path: Path, content: bytes, writer: str = "", *, private: bool = False) -> Generator[Path, None, None]:
    """Write a file beside its place, durable and locked, for the caller to rename; what is not renamed is removed.

    Two writers of the same place cannot mix what they write: each has a file of its own. A file of a writer that died
    has no lock, by which :func:`remove_abandoned_parts` knows it.

    Args:
        path: the place.
        content: what to write.
        writer: what tells this writer from others.
        private: let nobody but this user read it.

    Raises:
        OSError: it could not be written; what was there is still there.
    """
    part = path.with_name(f"{path.name}.{writer}.part" if writer else f"{path.name}.part")
    with _locked_part(part) as file:
        try:
            if private:
                os.fchmod(file.fileno(), 0o600)
            file.truncate(0)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            yield part
        except OSError as error:
            if error.errno is not None and error.filename is None:  # a write says only what happened, not to which file
                error.filename = str(path)
            raise
        finally:
            if _has_name(file, part):  # of a full disk it would keep what is left
                part.unlink()


def _locked_part(part: Path) -> IO[bytes]:
    """Open a part and lock it.

    Raises:
        OSError: it cannot be opened, or another writer of the same name holds it for too long.
    """
    deadline = time.monotonic() + _PART_SECONDS
    while True:
        file = part.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{part} is being written by another process") from None
            time.sleep(_POLL_SECONDS)
            continue
        except OSError:  # a file system without locks; there nothing is removed either
            return file
        if _has_name(file, part):  # not if it was removed as abandoned between its opening and its locking
            return file
        file.close()


def remove_abandoned_parts(folder: Path) -> None:
    """Remove the files that dead writers of :func:`staged` left."""
    for part in folder.glob("*.part"):
        with contextlib.suppress(OSError), part.open("rb") as file:
            # The opened file may have been renamed since, and its writer have begun another part of this name.
            if try_lock(file) and _has_name(file, part):
                part.unlink()


def _has_name(file: IO[bytes], path: Path) -> bool:
    """Return whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; without it a power cut may bring back the old ones."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
