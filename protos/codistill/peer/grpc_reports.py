"""Reports under way: one at a time, and no measurement is lost while the server is away or rejects it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from codistill.peer.steps import CALL_SECONDS
from codistill.v1 import distillation_pb2 as pb

__all__ = ["Reports"]


class Reports:
    """The report on its way, and what the next one will hold.

    Args:
        arrived: called when a report has arrived.
    """

    def __init__(self, arrived: Callable[[], None]) -> None:
        self._arrived = arrived
        self._pending: pb.ReportRequest | None = None
        self._sent: pb.ReportRequest | None = None
        self._call: Any = None

    def add(self, report: pb.ReportRequest) -> None:
        """Merge a report into the pending one: its progress replaces the older, its measurements follow."""
        if self._pending is not None:
            merged = [*self._pending.measurements, *report.measurements]
            del report.measurements[:]
            report.measurements.extend(merged)
        self._pending = report

    def send(self, session_id: int, call: Callable[[pb.ReportRequest], Any]) -> None:
        """Send the pending report without waiting, unless one is on its way.

        Args:
            session_id: the session it belongs to.
            call: starts the call and returns its future.
        """
        if self._call is not None and not self._call.done():
            return
        self._settle()
        if self._pending is not None:
            self._pending.session_id = session_id
            self._sent, self._pending = self._pending, None
            self._call = call(self._sent)

    def flush(self, session_id: int, call: Callable[[pb.ReportRequest], object]) -> None:
        """Wait for the report on its way, for at most `CALL_SECONDS`; then deliver the pending one.

        Args:
            session_id: the session it belongs to.
            call: makes the call and returns when it was answered.

        Raises:
            grpc.RpcError: the pending report did not arrive; it is kept.
        """
        if self._call is not None:
            with contextlib.suppress(grpc.RpcError, grpc.FutureTimeoutError):
                self._call.result(CALL_SECONDS)
            self._settle()
        if self._pending is not None:
            self._pending.session_id = session_id
            call(self._pending)
            self._pending = None
            self._arrived()

    def undelivered(self) -> Sequence[pb.Measurement]:
        """Return the measurements that are not known to have arrived."""
        if self._call is not None and self._call.done():
            self._settle()
        reports = [report for report in (self._sent, self._pending) if report is not None]
        return [measurement for report in reports for measurement in report.measurements]

    def _settle(self) -> None:
        """Settle a call that ended: if its report did not arrive, make it pending again."""
        if self._call is None:
            return
        failed = self._call.exception()
        if failed is None:
            self._arrived()
        elif self._sent is not None:
            lost, newer = self._sent, self._pending
            self._pending = lost
            if newer is not None:
                self.add(newer)
        self._call = self._sent = None
