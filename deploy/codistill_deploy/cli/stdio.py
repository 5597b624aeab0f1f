"""Standard output and error that may go away, and the command does not."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import Any, TextIO, cast

__all__ = ["LossyStream", "flush_or_drop", "tolerate_lost_stderr", "tolerate_lost_stdout"]

_log = logging.getLogger("codistill")


class LossyStream:
    """A stream that loses what it cannot write; the first loss is logged, where that goes elsewhere."""

    def __init__(self, stream: TextIO, name: str = "") -> None:
        self._stream = stream
        self._untold = name

    def write(self, text: str) -> int:
        """Writes what can be written."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._tell(error)
        return len(text)

    def flush(self) -> None:
        """Flushes what can be flushed."""
        try:
            self._stream.flush()
        except OSError as error:
            self._tell(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _tell(self, error: OSError) -> None:
        name, self._untold = self._untold, ""
        if name:
            _log.warning("%s cannot be written: %s; the run goes on without it", name, error.strerror)


def tolerate_lost_stdout() -> None:
    """Lets this process go on when nobody reads what it shows any more, or there is no room for it."""
    if sys.stdout is not None:  # as it is where it was closed from the start
        sys.stdout = cast("TextIO", LossyStream(sys.stdout, "standard output"))


def tolerate_lost_stderr() -> None:
    """Does the same for what it logs; before anything holds the stream."""
    if sys.stderr is not None:
        sys.stderr = cast("TextIO", LossyStream(sys.stderr))


def flush_or_drop() -> None:
    """Flushes what was printed; what cannot be is dropped, so that the interpreter's own flush at its end succeeds."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        under = cast("TextIO", getattr(stream, "_stream", stream))
        try:
            under.flush()
        except OSError:
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, under.fileno())
                os.close(nowhere)
