"""Reports under way: which is sent when, and what is kept, with calls made by hand."""

from __future__ import annotations

import grpc
import pytest

from codistill.peer.grpc_calls import Broken
from codistill.peer.grpc_reports import Reports
from codistill.v1 import distillation_pb2 as pb
from protos.peer.support import report


class Call:
    """A call under way that ends when a test says so."""

    def __init__(self, request: pb.ReportRequest) -> None:
        self.sent = [measurement.steps_trained for measurement in request.measurements]
        self.session_id = request.session_id
        self.error: grpc.RpcError | None = None
        self._done = False

    def end(self, error: grpc.RpcError | None = None) -> None:
        self.error, self._done = error, True

    def done(self) -> bool:
        return self._done

    def exception(self) -> grpc.RpcError | None:
        return self.error

    def result(self, timeout: float) -> None:
        del timeout
        self._done = True
        if self.error is not None:
            raise self.error


class Calls:
    def __init__(self) -> None:
        self.made: list[Call] = []
        self.arrived = 0
        self.reports = Reports(self._count)

    def _count(self) -> None:
        self.arrived += 1

    def __call__(self, request: pb.ReportRequest) -> Call:
        self.made.append(Call(request))
        return self.made[-1]

    def send(self, round_number: int, session_id: int = 1) -> None:
        self.reports.add(report(round_number, round_number))
        self.reports.send(session_id, self)

    def undelivered(self) -> list[int]:
        return [measurement.steps_trained for measurement in self.reports.undelivered()]


def test_reports_that_wait_are_merged_into_the_next() -> None:
    calls = Calls()
    for round_number in (1, 2, 3):
        calls.send(round_number)
    assert [call.sent for call in calls.made] == [[1]]
    assert calls.undelivered() == [1, 2, 3]
    calls.made[0].end()
    assert calls.undelivered() == [2, 3]
    assert calls.arrived == 1
    calls.send(4, session_id=9)
    assert [(call.session_id, call.sent) for call in calls.made] == [(1, [1]), (9, [2, 3, 4])]


def test_a_lost_report_goes_with_the_next_and_first() -> None:
    calls = Calls()
    calls.send(1)
    calls.send(2)
    calls.made[0].end(Broken("gone"))
    assert calls.undelivered() == [1, 2]
    calls.send(3)
    assert calls.made[1].sent == [1, 2, 3]
    assert calls.arrived == 0


def test_flush_waits_for_the_report_on_its_way_and_delivers_the_rest() -> None:
    calls = Calls()
    calls.send(1)
    calls.send(2)
    calls.reports.flush(5, calls)
    assert [(call.session_id, call.sent) for call in calls.made] == [(1, [1]), (5, [2])]
    assert calls.undelivered() == []
    assert calls.arrived == 2
    calls.reports.flush(5, calls)
    assert len(calls.made) == 2, "nothing is left"


def test_a_flush_that_fails_keeps_the_report() -> None:
    calls = Calls()
    calls.send(1)
    calls.made[0].error = Broken("gone")

    def fail(request: pb.ReportRequest) -> None:
        raise Broken(f"gone with {len(request.measurements)}")

    with pytest.raises(Broken, match="gone with 1"):
        calls.reports.flush(1, fail)
    assert calls.undelivered() == [1]
