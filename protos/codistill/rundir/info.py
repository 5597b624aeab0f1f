"""``run.json``: the facts of a run that its experiment does not hold, of its first start and of each later one."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from codistill import __version__
from codistill.process import user_code
from codistill.process.plugins import command_arguments
from codistill.rundir.files import locked, write_atomically
from codistill.rundir.layout import RunLayout

__all__ = ["Mode", "RunInfo", "Start", "add_start", "differences", "record_code", "warn_of", "write_info"]

_log = logging.getLogger(__name__)

_PACKAGES = ("torch", "grpcio", "protobuf", "numpy", "torchvision", "timm", "pillow", "scikit-learn")
_OF_THE_NUMBERS = ("codistill", "python", "torch", "numpy", "torchvision", "timm", "pillow", "scikit-learn")
_MOST_RESUMES = 1000
_SHOWN_OF_A_DIGEST = 12
_LOCK_SECONDS = 15.0

Mode: TypeAlias = Literal["grpc", "in-process"]
"""How a run's students reach the coordinator."""


class Start(BaseModel):
    """The facts of one start of a run. Every field may be missing.

    Attributes:
        created: when.
        versions: of packages, by name.
        command: the command line.
        mode: how the students reach the coordinator.
        machine: the operating system, the processor and the number of its cores.
        code: SHA-256 of the user's own modules, by name; see :mod:`codistill.process.user_code`.
    """

    model_config = ConfigDict(frozen=True)

    created: datetime | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    command: tuple[str, ...] = ()
    mode: Mode | None = None
    machine: dict[str, Any] = Field(default_factory=dict)
    code: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def now(cls, mode: Mode) -> Start:
        """Return the facts of a start by this process."""
        versions = {"codistill": __version__, "python": platform.python_version()}
        for package in _PACKAGES:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                continue
        return cls(
            created=datetime.now(UTC).replace(microsecond=0),
            mode=mode,
            command=("codistill", *(_valid(argument) for argument in command_arguments())),
            versions=versions,
            machine={"system": platform.platform(), "processor": _processor(), "cpus": os.cpu_count() or 0},
            code=user_code.digests(),
        )


class RunInfo(Start):
    """The facts of a run that its experiment does not hold: those of its first start, and the later ones.

    Attributes:
        resumed: the later starts, oldest first.
    """

    resumed: tuple[Start, ...] = ()

    @classmethod
    def read(cls, path: Path) -> RunInfo:
        """Read a run's ``run.json``; all fields are missing where there is no such file.

        Raises:
            ValueError: the file is not of this form.
        """
        if not path.exists():
            return cls()
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from error

    @property
    def last(self) -> Start:
        """The facts of the last start; of its code also what only an earlier one has used."""
        last = self.resumed[-1] if self.resumed else self
        code = {name: digest for start in (self, *self.resumed) for name, digest in start.code.items()}
        return last.model_copy(update={"code": code})


def write_info(path: Path, start: Start) -> None:
    """Write the facts of a run that starts.

    Raises:
        OSError: it could not be written.
    """
    _write(path, RunInfo(**dict(start)))


def add_start(path: Path, start: Start) -> Start:
    """Add a later start to the facts of a run, and return those of the start before. The first ones stay.

    Of more than 1,000 later starts the last are kept.

    Raises:
        OSError: it could not be written.
        ValueError: the file is not of this form.
    """
    info = RunInfo.read(path)
    if info == RunInfo():
        write_info(path, start)
    else:
        _write(path, info.model_copy(update={"resumed": (*info.resumed, start)[-_MOST_RESUMES:]}))
    return info.last


def record_code(layout: RunLayout) -> None:
    """Record the user's own code that this process uses, and warn of each module that has changed since it was recorded.

    Call it once that code is loaded. What is new joins the facts of the last start. Where a module has changed, the facts of
    a later start are added, so that both digests stay. Without ``run.json`` nothing is recorded.
    """
    path = layout.info_file
    if not path.exists():
        return
    code = user_code.digests()
    try:
        with locked(layout.start_lock, _LOCK_SECONDS, keep_content=True):
            info = RunInfo.read(path)
            known = info.last
            if all(known.code.get(name) == digest for name, digest in code.items()):
                return
            now = Start.now(known.mode or "grpc")
            changed = [*_changed_modules(known, now)]
            if changed:
                add_start(path, now)
            elif info.resumed:
                last = info.resumed[-1]
                last = last.model_copy(update={"code": {**last.code, **code}})
                _write(path, info.model_copy(update={"resumed": (*info.resumed[:-1], last)}))
            else:
                _write(path, info.model_copy(update={"code": {**info.code, **code}}))
    except (OSError, ValueError) as error:
        _log.warning("%s: the code of your own that is used cannot be recorded: %s", path, error)
        return
    warn_of(changed)


def warn_of(changes: Iterable[str]) -> None:
    """Log a warning for each line of :func:`differences`."""
    for line in changes:
        _log.warning("%s; its numbers may differ from those of a run that was not interrupted", line)


def differences(before: Start, now: Start) -> Iterator[str]:
    """Yield a line for each fact of two starts that differs and decides numbers; it names both values."""
    for package in _OF_THE_NUMBERS:
        yield from _difference(package, before.versions, now.versions)
    yield from _difference("processor", before.machine, now.machine)
    yield from _changed_modules(before, now)


def _changed_modules(before: Start, now: Start) -> Iterator[str]:
    for module in sorted(before.code.keys() & now.code.keys()):
        old, new = before.code[module], now.code[module]
        if old != new:
            yield (
                f"module {module!r} has changed since the run was last started: its SHA-256 was "
                f"{old[:_SHOWN_OF_A_DIGEST]}… and is {new[:_SHOWN_OF_A_DIGEST]}…"
            )


def _difference(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    old, new = before.get(name), now.get(name)
    if old != new and old is not None:
        yield f"{name}: the run was last started with {old}, now with {new or 'none'}"


def _write(path: Path, info: RunInfo) -> None:
    write_atomically(path, info.model_dump_json(indent=2) + "\n")


def _valid(text: str) -> str:
    """Return a text without the surrogates of bytes that are no text, which JSON cannot hold."""
    return text.encode(errors="backslashreplace").decode()


def _processor() -> str:
    """Return the processor's name as the system gives it, else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip().lower() in ("model name", "cpu part"):
                return f"{value.strip()} ({platform.machine()})"
    return platform.processor() or platform.machine()
