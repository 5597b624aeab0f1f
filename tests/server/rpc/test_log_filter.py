from __future__ import annotations

import logging

import pytest

from codistill_server.rpc.log_filter import RareRecordFilter, limit_grpc_log
from server.support import Clock


def record(message: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord("grpc", logging.ERROR, __file__, 1, message, args, None)


class TestRateLimitedRecords:
    def test_a_line_stands_for_many(self) -> None:
        clock = Clock()
        log_filter, written = RareRecordFilter(clock), list[str]()
        for number in range(250):
            told = record("Invalid encoding on %s", b"\xff" * (500 if number == 200 else 1))
            if log_filter.filter(told):
                assert (told.levelname, told.exc_info) == ("WARNING", None)
                written.append(told.getMessage())
            clock.now += 0.1
        assert written[0] == r"a call has a header that is not UTF-8 (Invalid encoding on b'\xff'); 0 more before it"
        assert [text.rpartition("; ")[2] for text in written] == ["0 more before it", *["99 more before it"] * 2]
        assert len(written[2]) < 180

    def test_each_kind_has_its_own(self) -> None:
        log_filter = RareRecordFilter(Clock())
        gone = "ExecuteBatchError raised in core by servicer method [/codistill.v1.DistillationService/WatchRun]"
        error = RuntimeError('Failed "execute_batch": (SendMessageOperation,)')
        told, again, other = record(gone), record(gone), record(gone)
        told.exc_info = again.exc_info = (RuntimeError, error, None)
        other.exc_info = (RuntimeError, RuntimeError("Failed grpc_call_start_batch: 8"), None)
        assert log_filter.filter(record("Invalid encoding on %s", b"\xff"))
        assert log_filter.filter(told)
        assert not log_filter.filter(again)
        assert log_filter.filter(other)
        assert other.levelname == "ERROR", "that one is ours"
        assert told.getMessage().startswith("a caller was gone before its answer was sent (ExecuteBatchError ")

    def test_everything_else_is_written_as_it_is(self) -> None:
        log_filter = RareRecordFilter(Clock())
        for _ in range(3):
            told = record("Unexpected %s raised", "KeyError")
            assert log_filter.filter(told)
            assert (told.getMessage(), told.levelname) == ("Unexpected KeyError raised", "ERROR")


def test_it_ends_with_the_server(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("grpc._cython.cygrpc")
    with limit_grpc_log():
        logger.error("Invalid encoding on %s", b"\xff")
        logger.error("Invalid encoding on %s", b"\xff")
    logger.error("Invalid encoding on %s", b"\xff")
    assert [each.levelname for each in caplog.records] == ["WARNING", "ERROR"]
