"""Storage that fails a run: why a file cannot be written, with its disk and the space left, and a folder that is gone.

A full disk or a deleted folder does not get better by a restart. So every process ends with its own exit code then.
"""

from __future__ import annotations

import errno
import os
import resource
import time
import weakref
from collections.abc import Iterable
from pathlib import Path

from codistill.process.exit_codes import ExitCode

__all__ = [
    "FolderGuard",
    "StorageError",
    "cause_behind",
    "describe_disk",
    "detail",
    "explain",
    "outlasts_restarts",
    "unwritable",
]

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
_LIMITS = {
    errno.EMFILE: (resource.RLIMIT_NOFILE, "files open", "ulimit -n"),
    errno.EFBIG: (resource.RLIMIT_FSIZE, "bytes in a file", "ulimit -f"),
}
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)
_DELETION_SECONDS = 0.2
_NEAR_LIMIT = 64 * 1024
_MUCH_SPACE = 256 * 1024**2
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


class StorageError(RuntimeError):
    """A run's folder cannot be written, or is gone; the text names it, says what is lost, and what to do."""

    code = ExitCode.STORAGE


def outlasts_restarts(error: OSError) -> bool:
    """Return whether an error comes from a lack of storage or of files, which a restart does not change."""
    return error.errno in (*_DISK, *_LIMITS, errno.ENFILE)


def explain(error: OSError, path: Path) -> str:
    """Return why a file cannot be written, as half a sentence: "No space left on device (/dev/sda1, mounted at /data, …)".

    Args:
        error: the system's error.
        path: the file, which need not exist.
    """
    return f"{error.strerror or error}{detail(error, path)}"


def cause_behind(files: Iterable[Path]) -> OSError | None:
    """Return the system's error that a library left out when it could not write, as far as that can be seen.

    SQLite says "disk I/O error" for a file that has come to this process's limit, and "full" for a quota.

    Args:
        files: those that it writes; they need not exist, and lie on one disk.

    Returns:
        EFBIG with a file at the limit, or EDQUOT if the disk has much space left; None if the disk may be the cause.
    """
    listed = list(files)
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY:
        for file in listed:
            if file.exists() and file.stat().st_size + _NEAR_LIMIT > limit:
                return OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(file))
    try:
        disk = os.statvfs(listed[0].parent)
    except OSError:
        return None
    if (
        disk.f_flag & os.ST_RDONLY
        or disk.f_bavail * disk.f_frsize < _MUCH_SPACE
        or (disk.f_files and not disk.f_favail)
    ):
        return None
    return OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(listed[0]))


def detail(error: OSError, path: Path) -> str:
    """Return what the system's error leaves out: " (the disk and its space)", " (the limit)", or "" where it says all."""
    if error.errno in _DISK:
        return f" ({describe_disk(path)})"
    if error.errno in _LIMITS:
        limit, unit, setting = _LIMITS[error.errno]
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            return f" (this process may have {most} {unit}: {setting})"
    return ""


def unwritable(run_dir: Path, error: OSError) -> tuple[str, ExitCode]:
    """Return the message about a run's folder that cannot be written, and how the process ends."""
    file = Path(error.filename) if isinstance(error.filename, str) else run_dir
    where = f"{file}: " if run_dir in file.parents and run_dir.is_dir() else ""
    if outlasts_restarts(error):
        step = "raise the limit" if error.errno in _LIMITS else "make room, or give another --run-dir"
        code = ExitCode.STORAGE
    else:
        step, code = "make it writable, or give another --run-dir", ExitCode.CONFIGURATION
    return f"run folder {run_dir} cannot be written: {where}{explain(error, file)}; {step}", code


def describe_disk(path: Path) -> str:
    """Return the disk that a file is on, and the space and the inodes left there: "/dev/sda1, mounted at /data, has …"."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    mount = Path(os.path.realpath(place))
    while not mount.is_mount() and mount != mount.parent:
        mount = mount.parent
    device = _device(mount)
    named = f"{device}, mounted at {mount}," if device else f"the disk mounted at {mount}"
    try:
        disk = os.statvfs(place)
    except OSError as error:
        return f"{named} does not answer: {error.strerror}"
    space = f"{_size(disk.f_bavail * disk.f_frsize)} of {_size(disk.f_blocks * disk.f_frsize)} left"
    inodes = f" and {disk.f_favail} of {disk.f_files} inodes" if disk.f_files and not disk.f_favail else ""
    read_only = " and is read-only" if disk.f_flag & os.ST_RDONLY else ""
    return f"{named} has {space}{inodes}{read_only}"


class FolderGuard:
    """Notices that a folder, or what is in it, is no longer the one that a run began with.

    A process that has a file open goes on writing after the file was deleted or moved. So only a look at its name shows
    that what is written is lost.

    Args:
        title: the folder for people: "run folder".
        folder: the folder.
        holds: what is lost with it: "the journal".
        inside: files and folders in it, which somebody holds open or nobody replaces.

    Raises:
        OSError: one of them is not there.
    """

    def __init__(self, title: str, folder: Path, holds: str, inside: Iterable[Path] = ()) -> None:
        self._title = title
        self._folder = folder
        self._holds = holds
        # Some file systems number a folder anew once nobody has it open.
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        weakref.finalize(self, os.close, self._descriptor)
        self._place = os.path.realpath(folder)
        self._inside = {path: path.stat() for path in inside}

    def check(self) -> None:
        """Check that everything is where it was, and that the folder can be written.

        Raises:
            StorageError: it is not; the text says what happened and what is lost.
        """
        name = f"{self._title} {self._folder}"
        if not _is_at(self._folder, os.fstat(self._descriptor), name):
            raise StorageError(f"{name} {self._fate()}")
        lost = [path for path, began_as in self._inside.items() if not _is_at(path, began_as, name)]
        if lost:
            time.sleep(_DELETION_SECONDS)  # a folder that is being deleted loses its files first
            if not _is_at(self._folder, os.fstat(self._descriptor), name):
                raise StorageError(f"{name} {self._fate()}")
            raise StorageError(
                f"{name}: {lost[0]} was deleted, moved or replaced while the run was going on, and what is in it is lost; put "
                "it back and resume the run, or start the run anew in another folder"
            )
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise StorageError(
                f"{name} can no longer be written ({describe_disk(self._folder)}): from now on {self._holds} would be lost; "
                "make it writable, then resume the run"
            )

    def _fate(self) -> str:
        """Return what became of the folder, what is lost, and what to do."""
        lost = f"while the run was going on, and {self._holds} with it"
        try:
            place = str(Path(f"/proc/self/fd/{self._descriptor}").readlink())
        except OSError:  # not on Linux
            return f"was deleted, moved or replaced {lost}; put it back and resume the run, or start it anew"
        if os.fstat(self._descriptor).st_nlink == 0 or place.endswith(" (deleted)"):
            return f"was deleted {lost}; start the run anew"
        if place == self._place:
            return f"is on another file system, which was mounted or unmounted {lost}; mount its own and resume the run"
        return f"was moved to {place} {lost}; move it back and resume the run"


def _is_at(path: Path, began_as: os.stat_result, name: str) -> bool:
    """Return whether a file or folder is still at its path.

    Raises:
        StorageError: that cannot be known.
    """
    try:
        return os.path.samestat(began_as, path.stat())
    except OSError as error:
        if error.errno in _GONE:
            return False
        raise StorageError(
            f"{name} can no longer be reached: {path}: {explain(error, path)}; make it reachable, then resume the run"
        ) from error


def _device(mount: Path) -> str:
    """Return the device that is mounted at a folder; "" where the system does not say."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    escaped = str(mount).replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011").replace("\n", "\\012")
    return next((line.split(" ")[0] for line in reversed(lines) if line.split(" ")[1] == escaped), "")


def _size(count: float) -> str:
    """Return a number of bytes with its unit: "512 bytes", "1.5 GiB"."""
    unit = _UNITS[0]
    for unit in _UNITS:
        if count < 1024 or unit == _UNITS[-1]:
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == _UNITS[0] else f"{count:.1f} {unit}"
