"""The console of the commands, and standard streams of any encoding, which may be lost while the command goes on."""

from __future__ import annotations

import codecs
import contextlib
import io
import logging
import os
import sys
from typing import Any, TextIO, cast

from codistill_deploy.console.literal import make_console

__all__ = [
    "LossyStream",
    "console",
    "flush_or_drop",
    "print_in_any_encoding",
    "tolerate_lost_stderr",
    "tolerate_lost_stdout",
]

console = make_console()
_log = logging.getLogger("codistill")
_PLAIN = {"–": "-", "—": "-", "…": "...", "×": "x", "±": "+/-", "→": "->", "≥": ">=", "≤": "<=", "·": "."}
_ERRORS = "codistill-plain"


class LossyStream:
    """A stream that drops what it cannot write.

    Args:
        stream: the stream to write to.
        name: what the log calls it when the first write fails; "" logs nothing, for the stream that the log goes to.
    """

    def __init__(self, stream: TextIO, name: str = "") -> None:
        self._stream = stream
        self._unreported_name = name

    def write(self, text: str) -> int:
        """Write `text`, or drop it."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._log_first(error)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what cannot be."""
        try:
            self._stream.flush()
        except OSError as error:
            self._log_first(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _log_first(self, error: OSError) -> None:
        name, self._unreported_name = self._unreported_name, ""
        if name:
            _log.warning("%s cannot be written: %s; the run goes on without it", name, error.strerror)


def print_in_any_encoding() -> None:
    """Let standard streams write every character: those that their encoding lacks in plain letters, or as escapes.

    The locale or PYTHONIOENCODING may set an encoding as narrow as ASCII.
    """
    codecs.register_error(_ERRORS, _in_plain_letters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def _in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character) or ascii(character)[1:-1] for character in lacking), error.end


def tolerate_lost_stdout() -> None:
    """Let this process go on when nobody reads its output any more, or there is no room for it."""
    if sys.stdout is not None:  # as it is where it was closed from the start
        sys.stdout = cast("TextIO", LossyStream(sys.stdout, "standard output"))


def tolerate_lost_stderr() -> None:
    """Do the same for its log; call it before anything holds the stream."""
    if sys.stderr is not None:
        sys.stderr = cast("TextIO", LossyStream(sys.stderr))


def flush_or_drop() -> None:
    """Flush what was printed; drop what cannot be, so that the interpreter's own flush at its end succeeds."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        wrapped = cast("TextIO", getattr(stream, "_stream", stream))
        try:
            wrapped.flush()
        except OSError:
            with contextlib.suppress(OSError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, wrapped.fileno())
                os.close(null)
