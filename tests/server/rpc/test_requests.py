from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
import pytest

from codistill.v1 import distillation_pb2 as pb
from codistill.wire.checksum import append_checksum, verify_checksum
from server.rpc.support import drive, error_of, serving, with_checksum
from server.support import join_request

UNARY = {"Join": pb.JoinRequest, "Report": pb.ReportRequest, "Leave": pb.LeaveRequest}


class TestRequests:
    @pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"\x0a\xff", bytes(range(256))])
    def test_bytes_that_are_no_message(self, raw: bytes) -> None:
        async def test() -> None:
            async with serving() as served:
                for name, message in UNARY.items():
                    error = await error_of(served.channel.unary_unary(f"/codistill.v1.DistillationService/{name}")(raw))
                    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                    assert f"{len(raw)} bytes are not a {message.DESCRIPTOR.full_name}" in (error.details() or "")
                watch = served.channel.unary_stream("/codistill.v1.DistillationService/WatchRun")(raw)
                assert (await error_of(watch.read())).code() is grpc.StatusCode.INVALID_ARGUMENT
                ant, _ = await served.participants()
                await ant.write(with_checksum(raw, ant.session_id))
                assert (await ant.ending()).code() is grpc.StatusCode.INVALID_ARGUMENT
                assert served.states == {"ant": "disconnected", "bee": "connected"}
                assert served.failures == []

        drive(test)

    @pytest.mark.parametrize("name", UNARY)
    def test_other_damaged_calls_are_to_be_tried_again(self, name: str) -> None:
        """Wherever the bit is, and whether the bytes still parse or not; nothing is done of what they say."""

        async def test() -> None:
            async with serving() as served:
                ant, bee = await served.participants()
                await served.close_rounds((ant, bee))
                request: Any = {
                    "Join": join_request(served.experiment, "ant"),
                    "Report": pb.ReportRequest(session_id=ant.session_id, round=3, durable_round=2),
                    "Leave": pb.LeaveRequest(
                        session_id=ant.session_id, reason=pb.LEAVE_REASON_FINISHED, message="done"
                    ),
                }[name]
                raw = append_checksum(request)
                call = served.channel.unary_unary(f"/codistill.v1.DistillationService/{name}")
                for position in range(0, len(raw) - 6, max(1, len(raw) // 30)):
                    damaged = bytearray(raw)
                    damaged[position] ^= 2
                    error = await error_of(call(bytes(damaged)))
                    assert error.code() is grpc.StatusCode.UNAVAILABLE, (position, error.details())
                    assert "damaged on the way" in (error.details() or "")
                assert served.states == {"ant": "connected", "bee": "connected"}
                assert served.coordinator.run_state.participants["ant"].durable_round == 0
                await call(request.SerializeToString())  # without a checksum, as other programs may
                answer = await (call(raw) if name != "Leave" else error_of(call(raw)))
                if name == "Join":
                    assert verify_checksum(answer), "the response has a checksum too"

        drive(test)
