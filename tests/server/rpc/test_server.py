from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from codistill.process.exit_codes import ExitCode
from codistill.v1 import distillation_pb2 as pb
from codistill.v1.distillation_pb2_grpc import DistillationServiceStub
from codistill.wire.security import Security
from codistill_server.errors import ServerError
from server.support import make_experiment
from server.support_app import PATIENCE, SERVICE, serving, until
from support_certificates import TOKEN, WRONG_TOKEN, Certificates


class TestHealth:
    def test_serving_and_then_not(self, tmp_path: Path) -> None:
        with serving(tmp_path) as served, grpc.insecure_channel(served.address) as channel:
            health = cast("Any", health_pb2_grpc.HealthStub(channel))
            for name in ("", SERVICE):
                answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=PATIENCE)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=PATIENCE)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            served.stop.set()
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
            assert served.end() is ExitCode.OK

    @pytest.mark.parametrize("reflect", [True, False])
    def test_reflection_is_there_if_asked_for(self, tmp_path: Path, reflect: bool) -> None:
        with serving(tmp_path, reflect=reflect) as served, grpc.insecure_channel(served.address) as channel:
            stub = cast("Any", reflection_pb2_grpc.ServerReflectionStub(channel))
            asked = reflection_pb2.ServerReflectionRequest(list_services="")
            call = stub.ServerReflectionInfo(iter([asked]), timeout=PATIENCE)
            if reflect:
                (answer,) = call
                names = {service.name for service in answer.list_services_response.service}
                assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
            else:
                with pytest.raises(grpc.RpcError) as caught:
                    list(call)
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    @pytest.mark.parametrize(
        "path",
        [
            "/grpc.health.v1.Health/Check",
            "/grpc.health.v1.Health/Watch",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        ],
    )
    def test_bytes_that_are_no_message_to_grpcs_own_services(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, path: str
    ) -> None:
        with serving(tmp_path, reflect=True) as served, grpc.insecure_channel(served.address) as channel:
            call = cast("Any", channel.unary_stream(path))(b"\xff\xff\xff", timeout=PATIENCE)
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.details().startswith("3 bytes are not a grpc.")
        assert not [record for record in caplog.records if record.levelname == "ERROR"]


class TestListening:
    def test_a_path_that_is_not_utf8_ends_the_process_with_a_line_and_loses_no_round(self, tmp_path: Path) -> None:
        """It ends grpc.aio's own loop, whoever sends it: a server that nobody reaches must not stay."""
        experiment = make_experiment()
        with serving(tmp_path, experiment) as served:
            _call_raw(served.address, {b":path": b"/\xa4"}, _GOAWAY)
            ended = served.end()
        assert isinstance(ended, ServerError)
        assert ended.code is ExitCode.ERROR
        assert str(ended).startswith("gRPC stopped listening (UnicodeDecodeError")
        assert str(ended).endswith("start the server again: the journal is whole")
        with serving(tmp_path, experiment) as again:
            assert _answers(again.address)

    def test_headers_that_are_not_utf8_do_not_fill_the_log(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with serving(tmp_path) as served:
            for _ in range(20):
                _call_raw(served.address, {b"x-anything": b"\xff\xfe"}, _HEADERS)
            assert _answers(served.address)
        (record,) = (each for each in caplog.records if each.levelname != "INFO")
        assert record.getMessage() == (
            r"a call has a header that is not UTF-8 (Invalid encoding on b'\xff\xfe'); 0 more before it"
        )


_HEADERS, _GOAWAY = 1, 7


def _call_raw(address: str, changed: Mapping[bytes, bytes], until_frame: int) -> None:
    """Call GetRun with headers as no client would send, and wait for a frame of a kind or the connection's end."""

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    fields = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": f"/{SERVICE}/GetRun".encode(),
        b":authority": b"x",
        b"te": b"trailers",
        b"content-type": b"application/grpc",
        **changed,
    }
    block = b"".join(b"\0" + bytes([len(key)]) + key + bytes([len(value)]) + value for key, value in fields.items())
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as raw:
        raw.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, block) + frame(0, 1, 1, bytes(5))
        )
        with contextlib.suppress(ConnectionError):
            until(lambda: _comes(raw, until_frame), f"frame {until_frame} from the server")


def _comes(raw: socket.socket, kind: int) -> bool:
    """Whether the next frame is of this kind, or there is none."""
    head = raw.recv(9, socket.MSG_WAITALL)
    if len(head) == 9:
        raw.recv(int.from_bytes(head[:3], "big"), socket.MSG_WAITALL)
    return len(head) < 9 or head[3] == kind


def _answers(address: str) -> bool:
    with grpc.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        try:
            return DistillationServiceStub(channel).GetRun(pb.GetRunRequest(), timeout=PATIENCE).run.name == "small"
        except grpc.RpcError:
            return False


class TestToken:
    """The services behind the token, and those before it."""

    def test_health_is_open_and_nothing_else(self, tmp_path: Path, certificates: Certificates) -> None:
        security = certificates.of(None, None, TOKEN)
        with serving(tmp_path, reflect=True, security=security) as served:
            for ours, refused in (
                (Security(), True),
                (certificates.of(None, None, WRONG_TOKEN), True),
                (security, False),
            ):
                with ours.channel(served.address) as channel:
                    health = cast("Any", health_pb2_grpc.HealthStub(channel))
                    answer = health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=PATIENCE)
                    assert answer.status == health_pb2.HealthCheckResponse.SERVING
                    calls = [
                        *(
                            channel.unary_unary(f"/{SERVICE}/{name}")
                            for name in ("Join", "Report", "Leave", "GetRun", "No")
                        ),
                        channel.unary_stream(f"/{SERVICE}/WatchRun"),
                        channel.unary_stream("/grpc.health.v1.Health/Watch"),
                        channel.stream_stream(f"/{SERVICE}/Exchange"),
                        channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"),
                    ]
                    codes = {_code(call) for call in calls}
                    unauthenticated = {grpc.StatusCode.UNAUTHENTICATED}
                    assert codes == unauthenticated if refused else not codes & unauthenticated
        assert not (served.run_dir / "events.jsonl").read_bytes()

    def test_a_message_without_a_token_is_not_read(self, tmp_path: Path, certificates: Certificates) -> None:
        """Its size is no matter then: the largest is refused for the token, not for the size."""
        security = certificates.of(None, None, TOKEN)
        with serving(tmp_path, security=security) as served, grpc.insecure_channel(served.address) as channel:
            for _ in range(20):
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary(f"/{SERVICE}/Join")(b"\xff" * 2**20, timeout=PATIENCE)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def _code(call: Any) -> grpc.StatusCode:
    """Make a call with a message that is none, and return how it ends; a stream that stands is enough."""
    try:
        if isinstance(call, grpc.UnaryUnaryMultiCallable):
            call(b"\xff", timeout=PATIENCE)
        else:
            request = iter([b"\xff"]) if isinstance(call, grpc.StreamStreamMultiCallable) else b"\xff"
            stream = call(request, timeout=PATIENCE)
            next(stream, None)
            stream.cancel()
    except grpc.RpcError as error:
        return cast("Any", error).code()
    return grpc.StatusCode.OK
