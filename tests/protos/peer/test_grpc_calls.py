"""The decoding of the server's answers and failures."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from codistill.peer.grpc_calls import Broken, Damaged, decode_join_response, decode_reply, read_failure
from codistill.peer.steps import Failure
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.channel import PUSHBACK_KEY, SUPERSEDED_KEY
from codistill.wire.checksum import append_checksum


class Ended(grpc.RpcError):
    """A failure as gRPC raises it."""

    def __init__(self, code: grpc.StatusCode, details: str | None, trailing: Any = None) -> None:
        self.code = lambda: code
        self.details = lambda: details
        self.trailing_metadata = lambda: trailing
        super().__init__()


class TestReadFailure:
    def test_a_status_is_read_onto_one_line(self) -> None:
        read = read_failure(Ended(grpc.StatusCode.NOT_FOUND, "no,\n never"))
        assert read == Failure("NOT_FOUND", "no, never")

    @pytest.mark.parametrize("code", [grpc.StatusCode.ABORTED, grpc.StatusCode.UNAVAILABLE])
    def test_superseded_needs_the_trailing_key_and_its_status(self, code: grpc.StatusCode) -> None:
        read = read_failure(Ended(code, "x", ((SUPERSEDED_KEY, "1"),)))
        assert read.superseded is (code is grpc.StatusCode.ABORTED)
        assert not read_failure(Ended(code, "x")).superseded

    def test_a_pushback_is_temporary_and_no_damage(self) -> None:
        read = read_failure(Ended(grpc.StatusCode.RESOURCE_EXHAUSTED, "slower", ((PUSHBACK_KEY, "200"),)))
        assert (read.temporary, read.may_be_damage) == (True, False)
        read = read_failure(Ended(grpc.StatusCode.RESOURCE_EXHAUSTED, "too large"))
        assert (read.temporary, read.may_be_damage) == (False, True)

    def test_an_error_without_a_status_is_unknown(self) -> None:
        assert read_failure(grpc.RpcError("what")) == Failure("UNKNOWN", "what")

    def test_what_broke_here_is_temporary(self) -> None:
        assert read_failure(Broken("it ended")) == Failure("UNAVAILABLE", "it ended")
        assert read_failure(Damaged("reply", b"xyz")) == Failure(
            "UNAVAILABLE", "a reply of 3 bytes was damaged on the way: its checksum is missing or wrong", damaged=True
        )


class TestDecoding:
    def test_a_reply_needs_its_checksum(self) -> None:
        reply = pb.ExchangeResponse(targets=pb.Targets(round=3))
        raw = append_checksum(reply)
        assert decode_reply(raw).targets.round == 3
        for wrong in (reply.SerializeToString(), raw[1:], raw[:-1] + b"\0", b""):
            with pytest.raises(Damaged):
                decode_reply(wrong)

    def test_a_join_response_may_come_without_one(self) -> None:
        """A server that does not know the service answers without a checksum, and is refused by its status."""
        response = pb.JoinResponse(session_id=7, run="r")
        assert decode_join_response(response.SerializeToString()) == response
        raw = append_checksum(response)
        assert decode_join_response(raw).session_id == 7
        for wrong in (raw[:-4] + bytes(4), b"\xff"):
            with pytest.raises(Damaged, match=f"a JoinResponse of {len(wrong)} bytes was damaged"):
                decode_join_response(wrong)
