"""Keeps callers from filling the log.

gRPC writes a traceback for each header that is not UTF-8, before any token counts, and for each caller that is gone before
its answer was sent.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Generator

__all__ = ["RareRecordFilter", "limit_grpc_log"]

_LOGGER = "grpc._cython.cygrpc"
_STRANGERS = {
    "Invalid encoding on": "a call has a header that is not UTF-8",
    'Failed "execute_batch"': "a caller was gone before its answer was sent",
}
_SECONDS = 10.0


class RareRecordFilter(logging.Filter):
    """Lets one of each kind of records that strangers cause through in 10 s, without its traceback, and every other record.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._told_at: dict[str, float] = {}
        self._untold: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is written."""
        said = record.getMessage()
        why = f"{said} {record.exc_info[1]}" if record.exc_info else said
        what = next((what for part, what in _STRANGERS.items() if part in why), None)
        if what is None:
            return True
        now = self._clock()
        if now - self._told_at.get(what, -_SECONDS) < _SECONDS:
            self._untold[what] += 1
            return False
        record.msg, record.args = f"{what} ({said:.100}); {self._untold.pop(what, 0)} more before it", ()
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.exc_info = record.exc_text = None
        self._told_at[what] = now
        return True


@contextlib.contextmanager
def limit_grpc_log() -> Generator[None, None, None]:
    """Has gRPC's own logger write such records seldom."""
    logger, seldom = logging.getLogger(_LOGGER), RareRecordFilter()
    logger.addFilter(seldom)
    try:
        yield
    finally:
        logger.removeFilter(seldom)
