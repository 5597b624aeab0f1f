"""Writes the records of a run to its folder, as JSON lines."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import BinaryIO

from codistill.rundir.records import Happened, Record
from codistill.rundir.storage import explain

__all__ = ["RecordWriter"]

_log = logging.getLogger(__name__)


class RecordWriter:
    """Appends events to one file and everything else to another.

    A record that cannot be written, as on a full disk, is logged: once, until writing works again. Records describe the
    training and must not end it.

    Args:
        events: the file for events.
        metrics: the file for all other records; None drops them.

    Raises:
        OSError: a file cannot be opened.
    """

    def __init__(self, events: Path, metrics: Path | None = None) -> None:
        self._events, self._metrics = events, metrics
        self._files: dict[Path | None, BinaryIO] = {}
        self._failing = False
        try:
            for path in (metrics, events):
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._files[path] = _open(path)
        except OSError:
            self.close()
            raise

    def write(self, record: Record) -> None:
        """Append one record and hand it to the operating system."""
        file = self._files.get(self._events if isinstance(record, Happened) else self._metrics)
        if file is None:
            return
        try:
            _append(file, record.model_dump_json().encode() + b"\n")
        except OSError as error:
            if not self._failing:
                _log.error(
                    "%s cannot be written: %s; training goes on without records",
                    file.name,
                    explain(error, Path(file.name)),
                )
            self._failing = True
        else:
            self._failing = False

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files = {}


def _append(file: BinaryIO, line: bytes) -> None:
    """Write all of a line or nothing: a part of one would spoil the next line."""
    complete = os.fstat(file.fileno()).st_size
    try:
        while line:
            line = line[file.write(line) :]
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(complete)
        raise


def _open(path: Path) -> BinaryIO:
    """Open for appending, unbuffered, after cutting off an unfinished last line that a killed process left."""
    if path.exists():
        content = path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            with path.open("r+b") as file:
                file.truncate(complete)
    return path.open("ab", buffering=0)
