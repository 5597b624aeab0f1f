from __future__ import annotations

from collections.abc import Callable, Mapping

import grpc
import grpc.aio
import pytest
import torch

from codistill import PROTOCOL_VERSION
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.channel import SUPERSEDED_KEY
from codistill.wire.checksum import append_checksum
from codistill.wire.tensors import encode
from codistill_server.admission.contributions import receive_limit
from codistill_server.rounds.actions import Status
from server.rpc.support import Participant, drive, error_of, serving, trailing, until
from server.support import BATCH, CLASSES, contribution, join_request


def _field(number: int, content: bytes) -> bytes:
    """Return a field of bytes as it is on the wire."""
    return bytes([number << 3 | 2, len(content)]) + content


def _others(request: pb.JoinRequest) -> pb.JoinRequest:
    """Return a join in which everything else is wrong too."""
    wrong = pb.JoinRequest(participant="cow", experiment_json="no JSON", first_round=2**63, total_rounds=2**62)
    wrong.lanes.append(pb.LANE_SHARED_MEMORY)
    wrong.outputs["more"].dims.append(9)
    wrong.protocol_version = request.protocol_version
    return wrong


# What a join of another version may be like, as bytes.
ANOTHER_VERSION: Mapping[str, Callable[[pb.JoinRequest], bytes]] = {
    "all else is right": append_checksum,
    "no checksum": lambda request: request.SerializeToString(),
    "all else is wrong": lambda request: append_checksum(_others(request)),
    "all else is missing": lambda request: bytes([1 << 3, request.protocol_version]),
    "unknown fields": lambda request: request.SerializeToString() + b"\xa2\x1f\x03abc" + b"\xc0\x3e\x07",
    "another checksum": lambda request: request.SerializeToString() + b"\x7d\x01\x02\x03\x04",
    "a field of another type": lambda request: request.SerializeToString() + b"\x20\x07",
}


class TestStatus:
    def test_a_join_that_differs(self) -> None:
        async def test() -> None:
            async with serving() as served:
                for changes in ({"protocol_version": 9}, {"participant": "cow"}, {"participant": "😀" * 8_000}):
                    error = await error_of(served.stub.Join(join_request(served.experiment, "ant", **changes)))
                    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
                    assert SUPERSEDED_KEY not in trailing(error)

        drive(test)

    @pytest.mark.parametrize("change", ANOTHER_VERSION, ids=str)
    def test_a_join_of_another_version_is_told_both_versions(self, change: str) -> None:
        """Whatever else is wrong with it, missing in it, or unknown to this version."""

        async def test() -> None:
            async with serving() as served:
                request = join_request(served.experiment, "ant", protocol_version=PROTOCOL_VERSION - 1)
                raw = ANOTHER_VERSION[change](request)
                join = served.channel.unary_unary("/codistill.v1.DistillationService/Join")
                error = await error_of(join(raw))
                assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
                assert error.details() == (
                    f"protocol_version: the server speaks {PROTOCOL_VERSION}, this worker {PROTOCOL_VERSION - 1}; "
                    "install the same codistill on both sides"
                )
                assert SUPERSEDED_KEY not in trailing(error)
                run = served.coordinator.snapshot()
                assert [event.kind for event in run.events] == [pb.EVENT_KIND_REFUSED]
                assert (run.total_steps, served.states["ant"]) == (0, "expected"), "nothing of the run has changed"

        drive(test)

    def test_a_join_of_this_version_that_is_no_message_is_told_so(self) -> None:
        async def test() -> None:
            async with serving() as served:
                raw = pb.JoinRequest(protocol_version=PROTOCOL_VERSION).SerializeToString() + _field(4, b"\x80")
                error = await error_of(served.channel.unary_unary("/codistill.v1.DistillationService/Join")(raw))
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert "are not a codistill.v1.JoinRequest" in (error.details() or "")

        drive(test)

    def test_contributions_that_are_wrong(self) -> None:
        async def test() -> None:
            async with serving() as served:
                broken = contribution(served.experiment, "ant", 0)
                broken.batch.outputs["logits"].CopyFrom(encode(torch.full((BATCH, CLASSES), torch.nan), "float32"))
                future = contribution(served.experiment, "ant", 5)
                other = contribution(served.experiment, "ant", 0, first=7)
                bee = Participant(served, "bee")
                await bee.start()
                await bee.send(0)
                for message, code, part in (
                    (broken, grpc.StatusCode.INVALID_ARGUMENT, "batch.outputs.logits[0, 0] is nan"),
                    (future, grpc.StatusCode.ABORTED, "expected round 0"),
                    (other, grpc.StatusCode.FAILED_PRECONDITION, "participant 'ant' has at position 0 sample 7"),
                ):
                    ant = Participant(served, "ant")
                    await ant.start()
                    await ant.contribute(message)
                    error = await ant.ending()
                    assert error.code() is code
                    assert part in (error.details() or "")
                    assert SUPERSEDED_KEY not in trailing(error)
                    assert served.states == {"ant": "disconnected", "bee": "connected"}
                ant = Participant(served, "ant")
                await ant.start()
                await ant.send(0)
                assert await ant.answer() == await bee.answer()
                assert served.coordinator.run_state.rejected == {
                    Status.ABORTED: 1,
                    Status.FAILED_PRECONDITION: 1,
                    Status.INVALID_ARGUMENT: 1,
                }

        drive(test)

    def test_the_older_worker_is_told_that_it_is_superseded(self) -> None:
        async def test() -> None:
            async with serving() as served:
                older, newer = Participant(served, "ant"), Participant(served, "ant")
                await older.start()
                await newer.start()
                error = await older.ending()
                assert error.code() is grpc.StatusCode.ABORTED
                assert trailing(error)[SUPERSEDED_KEY] == "1"
                assert "newer worker" in (error.details() or "")
                assert served.states["ant"] == "connected"
                late = await error_of(served.stub.Report(pb.ReportRequest(session_id=older.session_id)))
                assert late.code() is grpc.StatusCode.ABORTED

        drive(test)

    def test_calls_on_a_session_that_is_over(self) -> None:
        async def test() -> None:
            async with serving() as served:
                calls = (
                    served.stub.Report(pb.ReportRequest(session_id=3)),
                    served.stub.Leave(pb.LeaveRequest(session_id=3, reason=pb.LEAVE_REASON_STOPPED)),
                )
                for call in calls:
                    error = await error_of(call)
                    assert error.code() is grpc.StatusCode.ABORTED
                    assert "session 3" in (error.details() or "")
                    assert "join again" in (error.details() or "")
                unknown = await error_of(served.stub.Leave(pb.LeaveRequest(session_id=3)))
                assert unknown.code() is grpc.StatusCode.INVALID_ARGUMENT

        drive(test)

    def test_messages_larger_than_the_run_can_need(self) -> None:
        async def test() -> None:
            async with serving() as served:
                raw = bytes(receive_limit(served.experiment) + 1)
                error = await error_of(served.channel.unary_unary("/codistill.v1.DistillationService/Join")(raw))
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                ant, _ = await served.participants()
                await ant.write(raw)
                assert (await ant.ending()).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                await until(lambda: served.states == {"ant": "disconnected", "bee": "connected"})

        drive(test)
