"""Keeps strangers from filling the log: gRPC writes a traceback for each header that is not UTF-8, before any token counts."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Generator

__all__ = ["Seldom", "quiet"]

_LOGGER = "grpc._cython.cygrpc"
_STRANGERS = "Invalid encoding on"
_SECONDS = 10.0


class Seldom(logging.Filter):
    """Lets one of the records that strangers cause through in 10 s, without its traceback, and every other record.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._told_at: float | None = None
        self._untold = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is written."""
        if not str(record.msg).startswith(_STRANGERS):
            return True
        now = self._clock()
        if self._told_at is not None and now - self._told_at < _SECONDS:
            self._untold += 1
            return False
        header = repr(record.args[0] if isinstance(record.args, tuple) and record.args else record.msg)
        record.msg, record.args = (
            f"a call has a header that is not UTF-8: {header:.80}; {self._untold} more before it",
            (),
        )
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.exc_info = record.exc_text = None
        self._told_at, self._untold = now, 0
        return True


@contextlib.contextmanager
def quiet() -> Generator[None, None, None]:
    """Has gRPC's own logger write such records seldom."""
    logger, seldom = logging.getLogger(_LOGGER), Seldom()
    logger.addFilter(seldom)
    try:
        yield
    finally:
        logger.removeFilter(seldom)
