"""Keeps callers from filling the log.

gRPC writes a traceback for each header that is not UTF-8, before any token is checked. It writes one, too, for each caller
that is gone before its answer was sent.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Generator

__all__ = ["RareRecordFilter", "limit_grpc_log"]

_LOGGER = "grpc._cython.cygrpc"
_CAUSED_BY_CALLERS = {
    "Invalid encoding on": "a call has a header that is not UTF-8",
    'Failed "execute_batch"': "a caller was gone before its answer was sent",
}
_INTERVAL_SECONDS = 10.0


class RareRecordFilter(logging.Filter):
    """Limits each kind of record that callers cause to one in 10 s, without its traceback; passes every other record.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._logged_at: dict[str, float] = {}
        self._dropped: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is written; shorten it if it is one of many."""
        message = record.getMessage()
        text = f"{message} {record.exc_info[1]}" if record.exc_info else message
        kind = next((kind for part, kind in _CAUSED_BY_CALLERS.items() if part in text), None)
        if kind is None:
            return True
        now = self._clock()
        if now - self._logged_at.get(kind, -_INTERVAL_SECONDS) < _INTERVAL_SECONDS:
            self._dropped[kind] += 1
            return False
        record.msg, record.args = f"{kind} ({message:.100}); {self._dropped.pop(kind, 0)} more before it", ()
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.exc_info = record.exc_text = None
        self._logged_at[kind] = now
        return True


@contextlib.contextmanager
def limit_grpc_log() -> Generator[None, None, None]:
    """Apply :class:`RareRecordFilter` to gRPC's own logger."""
    logger, rare = logging.getLogger(_LOGGER), RareRecordFilter()
    logger.addFilter(rare)
    try:
        yield
    finally:
        logger.removeFilter(rare)
