"""A peer that another language could have: it has the generated stubs, protobuf's own library, and docs/protocol.md.

Of codistill this file imports :mod:`codistill.v1` alone. The other student beside the peer is codistill's own.
"""

from __future__ import annotations

import ast
import queue
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.protobuf.duration_pb2 import Duration

from codistill.v1 import distillation_pb2 as pb
from codistill.v1.distillation_pb2_grpc import DistillationServiceStub
from codistill_server.ensembles.kdcl import min_logit
from protos.peer import support

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "protocol.md").read_text(encoding="utf-8")
VERSION = int(re.findall(r"`protocol_version` in \[JoinRequest\]\(#joinrequest\) is (\d+) now\.", PAGE)[0])
SERVICE = pb.DESCRIPTOR.services_by_name["DistillationService"].full_name
NAME, OTHER = "cnn", "mlp"
BATCH, CLASSES, ROUNDS = 16, 10, 3
LABELS = np.arange(BATCH) % CLASSES
PATIENCE = 30.0


# --- the foreign peer


def crc32c_table() -> list[int]:
    """Return the remainder of each byte: Castagnoli's polynomial, bits reflected, one byte at a time."""
    table: list[int] = []
    for byte in range(256):
        remainder = byte
        for _ in range(8):
            remainder = remainder >> 1 ^ (0x82F63B78 if remainder & 1 else 0)
        table.append(remainder)
    return table


TABLE = crc32c_table()


def crc32c(content: bytes) -> int:
    remainder = 0xFFFFFFFF
    for byte in content:
        remainder = remainder >> 8 ^ TABLE[(remainder ^ byte) & 0xFF]
    return remainder ^ 0xFFFFFFFF


def with_checksum(message: Any, covered_first: str = "") -> bytes:
    """Return a message's bytes, then the tag of field 100 as a fixed32, then the CRC-32C."""
    raw: bytes = message.SerializeToString()
    return raw + b"\xa5\x06" + struct.pack("<I", crc32c(covered_first.encode() + raw))


def undamaged(raw: bytes) -> bytes:
    assert raw[-6:-4] == b"\xa5\x06"
    assert struct.unpack("<I", raw[-4:]) == (crc32c(raw[:-6]),)
    return raw


def tensor(values: np.ndarray[Any, Any], little_endian: str, dtype: pb.Dtype.ValueType) -> pb.Tensor:
    return pb.Tensor(dtype=dtype, shape=values.shape, data=values.astype(little_endian).tobytes())


def logits_of(number: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng([number, 5]).standard_normal((BATCH, CLASSES)).astype(np.float32)


def contribution(number: int) -> pb.ExchangeRequest:
    samples = pb.SampleOutputs(
        ids=tensor(np.arange(BATCH) + number, "<i8", pb.DTYPE_INT64),
        labels=tensor(LABELS, "<i8", pb.DTYPE_INT64),
        outputs={"logits": tensor(logits_of(number), "<f4", pb.DTYPE_FLOAT32)},
    )
    return pb.ExchangeRequest(round=number, batch=samples)


class Foreigner:
    """A peer with one stream at a time. Bytes go in and out as they are.

    Args:
        address: the server's.
        worker_id: what tells its process from others.
    """

    def __init__(self, address: str, worker_id: int = 11) -> None:
        self.channel = grpc.insecure_channel(address)
        self.stub = DistillationServiceStub(self.channel)
        self.experiment_sha256 = self.stub.GetRun(pb.GetRunRequest(), timeout=PATIENCE).run.experiment_sha256
        self.worker_id = worker_id
        self.session_id = 0
        self.waited_for: list[str] = []
        self.outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.stream: Any = None

    def call(self, name: str, raw: bytes) -> bytes:
        answer: bytes = self.channel.unary_unary(f"/{SERVICE}/{name}", None, None)(raw, timeout=PATIENCE)
        return answer

    def join_request(self, first_round: int = 0, **changes: Any) -> pb.JoinRequest:
        fields: dict[str, Any] = {
            "protocol_version": VERSION,
            "participant": NAME,
            "experiment_sha256": self.experiment_sha256,
            "data": pb.DataFingerprint(data_sha256=bytes(32), train_samples=48, classes=CLASSES),
            "outputs": {"logits": pb.Shape(dims=[CLASSES])},
            "first_round": first_round,
            "total_rounds": ROUNDS,
            "steps_trained": first_round,
            "total_steps": ROUNDS,
            "parameters": 1234,
            "device": "an abacus",
            "worker_id": self.worker_id,
            "session_id": self.session_id,
        }
        return pb.JoinRequest(**{**fields, **changes})

    def join(self, first_round: int = 0, **changes: Any) -> pb.JoinResponse:
        answer = self.call("Join", with_checksum(self.join_request(first_round, **changes)))
        response = pb.JoinResponse.FromString(undamaged(answer))
        assert response.session_id > self.session_id
        self.session_id = response.session_id
        return response

    def open(self, metadata: str | None = None) -> None:
        decimal = str(self.session_id)
        value = f"{decimal}-{crc32c(decimal.encode()):08x}" if metadata is None else metadata
        self.outgoing = queue.SimpleQueue()
        self.stream = self.channel.stream_stream(f"/{SERVICE}/Exchange", None, None)(
            iter(self.outgoing.get, None), metadata=(("codistill-session", value),), timeout=PATIENCE
        )

    def send(self, number: int) -> None:
        self.outgoing.put(with_checksum(contribution(number), str(self.session_id)))

    def read(self) -> pb.ExchangeResponse:
        """Return the next message of the stream."""
        return pb.ExchangeResponse.FromString(undamaged(next(self.stream)))

    def receive(self) -> bytes:
        """Return the next targets as they came."""
        for raw in self.stream:
            reply = pb.ExchangeResponse.FromString(undamaged(raw))
            if reply.WhichOneof("kind") == "targets":
                return bytes(raw)
            self.waited_for = list(reply.waiting.participants)
        raise AssertionError("the stream ended")

    def end_stream(self) -> None:
        self.outgoing.put(None)

    def ending(self) -> tuple[grpc.StatusCode, str, dict[str, Any]]:
        """Return how the stream ends."""
        return failure(self.receive)

    def close(self) -> None:
        self.end_stream()
        self.channel.close()


def failure(call: Callable[[], object]) -> tuple[grpc.StatusCode, str, dict[str, Any]]:
    """Return the status of a call that fails, its text and its trailing metadata."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code(), error.details(), dict(error.trailing_metadata() or ())


# --- a run of it and one of codistill's students


class Run:
    """A real server, the foreign peer, and beside it codistill's own transport for the other student."""

    def __init__(self, server: Any, experiment: Any, other: Any) -> None:
        self.server = server
        self.other = other
        self.peers: list[Foreigner] = []
        other.join(support.request(experiment, OTHER, total_rounds=ROUNDS, total_steps=ROUNDS))

    def peer(self, **settings: Any) -> Foreigner:
        self.peers.append(Foreigner(self.server.address, **settings))
        return self.peers[-1]

    def expected(self, number: int) -> bytes:
        """Return the ensemble of both students' logits, in the experiment's order."""
        others = support.contribution(number, 1).batch.outputs["logits"].data
        other = np.frombuffer(others, "<f4").reshape(BATCH, CLASSES)
        logits = torch.from_numpy(np.stack([logits_of(number), other]))
        target = min_logit(logits, torch.from_numpy(LABELS))
        return target.numpy().astype("<f4").tobytes()

    def close_round(self, number: int) -> bytes:
        """Have the other student contribute too, and return the targets that it gets."""
        self.other.send(support.contribution(number, 1))
        targets: pb.Targets = self.other.receive(number)
        return targets.targets["logits"].data


@pytest.fixture
def run(tiny: Any, serving: Any, connect: Any) -> Iterator[Run]:
    experiment = tiny(training__epochs=1, distillation={"method": "kdcl", "ensemble": "min_logit"})
    server = serving(experiment)
    made = Run(server, experiment, connect(server.address))
    yield made
    for peer in made.peers:
        peer.close()


def logits_in(raw: bytes, number: int) -> bytes:
    targets = pb.ExchangeResponse.FromString(raw).targets
    assert targets.round == number
    array = targets.targets["logits"]
    assert (array.dtype, list(array.shape)) == (pb.DTYPE_FLOAT32, [BATCH, CLASSES])
    return array.data


def test_this_file_imports_nothing_else_of_codistill() -> None:
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert {name for name in modules if name.split(".")[0] == "codistill"} == {
        "codistill.v1",
        "codistill.v1.distillation_pb2_grpc",
    }


def test_the_crc_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value that catalogues of CRCs give


def test_a_whole_run_with_a_reconnection_in_the_middle(run: Run) -> None:
    peer = run.peer()
    response = peer.join()
    assert (response.run, response.frontier) == ("tiny", 0)
    peer.open()

    peer.send(0)
    assert run.close_round(0) == run.expected(0)
    assert logits_in(peer.receive(), 0) == run.expected(0)

    # The stream breaks after the answer, and the peer does not know whether it came.
    peer.send(1)
    assert run.close_round(1) == run.expected(1)
    before = peer.receive()
    peer.stream.cancel()
    peer.end_stream()
    assert peer.join(first_round=1).frontier == 2
    peer.open()
    peer.send(1)
    assert peer.receive() == before
    assert logits_in(before, 1) == run.expected(1)

    # The stream breaks before the answer, while the round is open.
    peer.send(2)
    while peer.read().waiting.participants != [OTHER]:
        pass
    peer.stream.cancel()
    peer.end_stream()
    assert peer.join(first_round=2).frontier == 2
    peer.open()
    peer.send(2)
    while peer.read().waiting.participants != [OTHER]:
        pass
    assert run.close_round(2) == run.expected(2)
    assert logits_in(peer.receive(), 2) == run.expected(2)

    measured = pb.Measurement(split=pb.SPLIT_TEST, steps_trained=ROUNDS, accuracy=0.75, loss=1.5)
    report = pb.ReportRequest(
        session_id=peer.session_id,
        steps_trained=ROUNDS,
        epochs_trained=1,
        round=ROUNDS,
        durable_round=ROUNDS,
        measurements=[measured],
        step_time=Duration(nanos=250_000_000),
    )
    peer.call("Report", with_checksum(report))
    state = peer.stub.GetRun(pb.GetRunRequest(), timeout=PATIENCE).run
    assert (state.frontier, state.total_rounds, state.steps_trained, state.total_steps) == (ROUNDS,) * 4
    status = {each.name: each for each in state.participants}[NAME]
    assert (status.state, status.round, status.joins) == (pb.PARTICIPANT_STATE_CONNECTED, ROUNDS, 3)
    assert (status.steps_trained, status.epochs_trained, status.step_time.nanos) == (ROUNDS, 1, 250_000_000)
    assert not status.HasField("wait_time")
    assert list(status.measurements) == [measured]
    leave = pb.LeaveRequest(session_id=peer.session_id, reason=pb.LEAVE_REASON_FINISHED, message="done")
    peer.call("Leave", with_checksum(leave))
    peer.end_stream()
    run.other.leave(pb.LEAVE_REASON_FINISHED, "done")
    run.server.wait()
    assert run.server.ended == 0
    assert run.server.events()[-3:] == [("finished", NAME), ("finished", OTHER), ("complete", "")]
    assert [(each.participant, each.steps_trained, each.accuracy, each.loss) for each in run.server.measured()] == [
        (NAME, ROUNDS, 0.75, 1.5)
    ]


def test_the_generated_stub_is_enough_where_fields_are_written_in_order(run: Run) -> None:
    peer = run.peer()
    request = peer.join_request()
    peer.session_id = peer.stub.Join(request, timeout=PATIENCE).session_id  # the checksum may be left out here
    message = contribution(0)
    message.checksum = crc32c(str(peer.session_id).encode() + message.SerializeToString())
    assert message.SerializeToString() == with_checksum(contribution(0), str(peer.session_id))
    decimal = str(peer.session_id)
    metadata = (("codistill-session", f"{decimal}-{crc32c(decimal.encode()):08x}"),)
    outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
    replies: Any = peer.stub.Exchange(iter(outgoing.get, None), metadata=metadata, timeout=PATIENCE)
    outgoing.put(message)
    run.close_round(0)
    reply = next(each for each in replies if each.HasField("targets"))
    assert reply.targets.targets["logits"].data == run.expected(0)
    peer.stub.Leave(pb.LeaveRequest(session_id=peer.session_id, reason=pb.LEAVE_REASON_STOPPED), timeout=PATIENCE)
    outgoing.put(None)


def test_the_bytes_on_the_page_are_those_of_the_wire() -> None:
    rows = [bytes.fromhex(row) for row in re.findall(r"\| `((?:[0-9a-f]{2} )+[0-9a-f]{2})` \|", PAGE)]
    assert rows == [
        with_checksum(pb.LeaveRequest(session_id=7, reason=pb.LEAVE_REASON_FINISHED)),
        with_checksum(pb.ExchangeRequest(round=3), "7"),
    ]
    assert f'"7-{crc32c(b"7"):08x}"' in PAGE


# --- refusals that it must understand


@pytest.mark.parametrize("version", [0, VERSION - 1, VERSION + 1])
def test_another_version_is_refused_and_both_are_named(version: int, run: Run) -> None:
    peer = run.peer()
    code, details, trailing = failure(lambda: peer.join(protocol_version=version))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert f"protocol_version: the server speaks {VERSION}, this worker {version};" in details
    assert "codistill-superseded" not in trailing
    assert peer.join().frontier == 0  # nothing has changed


def test_a_flipped_bit_ends_the_session_and_nothing_of_it_is_believed(run: Run) -> None:
    peer = run.peer()
    peer.join()
    peer.open()
    raw = bytearray(with_checksum(contribution(0), str(peer.session_id)))
    raw[raw.index(logits_of(0).tobytes()) + 6] ^= 0x04  # in a logit: the message parses as before
    assert pb.ExchangeRequest.FromString(bytes(raw)).round == 0
    peer.outgoing.put(bytes(raw))
    code, details, trailing = peer.ending()
    assert code is grpc.StatusCode.ABORTED
    assert "join again" in details
    assert "codistill-superseded" not in trailing
    peer.end_stream()
    peer.join()
    peer.open()
    peer.send(0)
    assert run.close_round(0) == run.expected(0)
    assert logits_in(peer.receive(), 0) == run.expected(0)
    assert ("damaged", NAME) in run.server.events()


@pytest.mark.parametrize("covered", [None, "", "1"])
def test_a_contribution_needs_the_checksum_of_its_own_session(covered: str | None, run: Run) -> None:
    """None is no checksum at all, session 1 the other student's."""
    peer = run.peer()
    assert peer.join().session_id == 2
    peer.open()
    message = contribution(0)
    peer.outgoing.put(message.SerializeToString() if covered is None else with_checksum(message, covered))
    assert peer.ending()[0] is grpc.StatusCode.ABORTED


@pytest.mark.parametrize("value", ["2", "2-00000000", "1-83a56a17", "2-1ad5be0d", ""])
def test_a_stream_must_name_its_session(value: str, run: Run) -> None:
    """Also refused: the checksum of another session, and the CRC-32 of zlib."""
    peer = run.peer()
    peer.join()
    peer.open(value)
    code, details, _ = peer.ending()
    assert code is grpc.StatusCode.ABORTED
    assert "codistill-session" in details


def test_a_damaged_unary_call_is_to_be_sent_again(run: Run) -> None:
    peer = run.peer()
    raw = bytearray(with_checksum(peer.join_request()))
    raw[-1] ^= 0x80
    assert failure(lambda: peer.call("Join", bytes(raw)))[0] is grpc.StatusCode.UNAVAILABLE
    assert peer.join().session_id == 2


def test_the_older_of_two_peers_learns_that_it_must_end(run: Run) -> None:
    older, newer = run.peer(), run.peer(worker_id=12)
    older.join()
    older.open()
    next(iter(older.stream.initial_metadata()), None)  # the stream stands
    newer.join()
    for code, _, trailing in (older.ending(), failure(older.join)):
        assert code is grpc.StatusCode.ABORTED
        assert "codistill-superseded" in trailing


def test_what_is_wrong_in_a_contribution_is_named(run: Run) -> None:
    peer = run.peer()
    peer.join()
    peer.open()
    wrong = contribution(0)
    wrong.batch.outputs["logits"].shape[1] = CLASSES + 1
    peer.outgoing.put(with_checksum(wrong, str(peer.session_id)))
    code, details, _ = peer.ending()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert f"batch.outputs.logits.shape: [{BATCH}, {CLASSES + 1}] is not allowed" in details
