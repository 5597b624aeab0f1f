"""What :class:`codistill.peer.base.Transport` promises, held against every transport there is.

A new transport is one more function in `ENDPOINTS`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity
from codistill.peer.base import Transport
from codistill.peer.errors import PeerError
from codistill.peer.grpc import GrpcTransport
from codistill.process.exit_codes import ExitCode
from codistill.rundir import records
from codistill.rundir.layout import RunLayout
from codistill.rundir.writer import RecordWriter
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import decode, encode
from codistill_deploy.launch.in_process import InProcessTransport
from codistill_server.coordinator import Coordinator
from codistill_server.observability.state import RunState
from codistill_server.storage.journal import Journal
from protos.peer.support import contribution, report, request, wait_for
from worker.support import build
from worker.support_server import Server


@dataclass
class Endpoint:
    """A run that transports connect to."""

    experiment: Experiment
    layout: RunLayout
    connect: Callable[[], Transport]

    def join(self, student: str, first_round: int = 0) -> Transport:
        transport = self.connect()
        transport.join(request(self.experiment, student, first_round))
        return transport

    def join_all(self) -> list[Transport]:
        return [self.join(name) for name in self.experiment.names]

    def events(self) -> list[tuple[str, str]]:
        found = records.read(self.layout.events_file)
        return [(record.what, record.student) for record in found if isinstance(record, records.Happened)]

    def measured(self) -> set[tuple[str, int]]:
        found = records.read(self.layout.metrics_file)
        return {(record.student, record.round) for record in found if isinstance(record, records.Measured)}


@contextlib.contextmanager
def over_grpc(experiment: Experiment, folder: Path) -> Generator[Endpoint, None, None]:
    server = Server(experiment, folder)
    server.start()
    made: list[Transport] = []

    def connect() -> Transport:
        made.append(GrpcTransport(server.address, connect_timeout=20, give_up_after=20, stop=threading.Event()))
        return made[-1]

    try:
        yield Endpoint(experiment, RunLayout(folder), connect)
    finally:
        for transport in made:
            transport.close()
        server.stop()


@contextlib.contextmanager
def in_process(experiment: Experiment, folder: Path) -> Generator[Endpoint, None, None]:
    layout = RunLayout(folder)
    writer = RecordWriter(layout.events_file, layout.metrics_file)
    coordinator = Coordinator(experiment, Journal(None, identity(experiment)), RunState(experiment, writer.write))
    try:
        yield Endpoint(experiment, layout, lambda: InProcessTransport(coordinator))
    finally:
        coordinator.close()
        writer.close()


ENDPOINTS: dict[str, Callable[[Experiment, Path], AbstractContextManager[Endpoint]]] = {
    "gRPC": over_grpc,
    "in process": in_process,
}


@pytest.fixture(params=ENDPOINTS)
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Endpoint, None, None]:
    with ENDPOINTS[request.param](build(), tmp_path / "run") as made:
        yield made


def exchange_round(transports: list[Transport], round_number: int) -> list[bytes]:
    """Exchange one round; return the targets of each peer as bytes."""
    for seed, transport in enumerate(transports):
        transport.send(contribution(round_number, seed))
    received = [transport.receive(round_number) for transport in transports]
    return [targets.SerializeToString(deterministic=True) for targets in received]


def least_logits(round_number: int) -> torch.Tensor:
    """Return the targets of the minimum-logit ensemble for what both students send."""
    sent = [decode(contribution(round_number, seed).batch.outputs["logits"]) for seed in (0, 1)]
    label = torch.arange(16)[:, None] % 10
    return torch.stack([logits - logits.gather(1, label) for logits in sent]).min(0).values


def test_join_returns_a_session_and_where_the_run_is(endpoint: Endpoint) -> None:
    first = endpoint.connect().join(request(endpoint.experiment, "cnn"))
    second = endpoint.connect().join(request(endpoint.experiment, "mlp"))
    assert (first.run, first.frontier) == (second.run, second.frontier) == ("tiny", 0)
    assert 0 < first.session < second.session
    assert endpoint.events() == [("joined", "cnn"), ("joined", "mlp")]


def test_a_join_that_is_refused_says_why(endpoint: Endpoint) -> None:
    with pytest.raises(PeerError, match="student 'vit' is not one of this run's; allowed: cnn, mlp") as refused:
        endpoint.join("vit")
    assert refused.value.code is ExitCode.REFUSED


def test_every_peer_receives_the_same_targets(endpoint: Endpoint) -> None:
    transports = endpoint.join_all()
    for round_number in range(3):
        ours, theirs = exchange_round(transports, round_number)
        assert ours == theirs
        targets = pb.Targets.FromString(ours)
        assert targets.round == round_number
        assert torch.equal(decode(targets.targets["logits"]), least_logits(round_number))


def test_a_contribution_to_a_closed_round_gets_the_same_bytes_again(endpoint: Endpoint) -> None:
    transports = endpoint.join_all()
    before = [exchange_round(transports, round_number)[1] for round_number in range(3)]
    again = endpoint.join("mlp")
    for round_number in range(3):
        again.send(contribution(round_number, 1))
        assert again.receive(round_number).SerializeToString(deterministic=True) == before[round_number]


def test_a_contribution_that_is_invalid_ends_the_peer(endpoint: Endpoint) -> None:
    transport = endpoint.join("cnn")
    wrong = contribution(0, 0)
    wrong.batch.ids.CopyFrom(encode(torch.arange(3), "int64"))

    def send_and_receive() -> None:
        transport.send(wrong)  # raises here, or where the answer is awaited
        transport.receive(0)

    with pytest.raises(PeerError, match=r"batch\.ids\.shape") as refused:
        send_and_receive()
    assert refused.value.code is ExitCode.REFUSED


def test_a_report_arrives_and_is_not_repeated(endpoint: Endpoint) -> None:
    transports = endpoint.join_all()
    exchange_round(transports, 0)
    transports[0].report(report(1, 1))
    wait_for(lambda: not transports[0].undelivered(), "the report arrives")
    transports[0].report(report(1, 2))
    transports[0].leave(pb.LEAVE_REASON_STOPPED, "")
    assert not transports[0].undelivered()
    assert endpoint.measured() == {("cnn", 1), ("cnn", 2)}


@pytest.mark.parametrize(
    ("reason", "event"),
    [(pb.LEAVE_REASON_FINISHED, "finished"), (pb.LEAVE_REASON_STOPPED, "left"), (pb.LEAVE_REASON_FAILED, "failed")],
    ids=["finished", "stopped", "failed"],
)
def test_leave_is_known_to_the_run_when_it_returns(
    endpoint: Endpoint, reason: pb.LeaveReason.ValueType, event: str
) -> None:
    transport, _ = endpoint.join_all()
    transport.leave(reason, "a reason")
    assert endpoint.events()[-1] == (event, "cnn")
    transport.close()
    assert endpoint.events()[-1] == (event, "cnn"), "a session that is over cannot break"


def test_a_run_is_complete_when_all_have_finished(endpoint: Endpoint) -> None:
    for transport in endpoint.join_all():
        transport.leave(pb.LEAVE_REASON_FINISHED, "")
    assert endpoint.events()[-1] == ("complete", "")


def test_close_breaks_an_open_session_and_may_be_repeated(endpoint: Endpoint) -> None:
    transport = endpoint.join("cnn")
    transport.close()
    transport.close()
    wait_for(lambda: endpoint.events()[-1] == ("disconnected", "cnn"), "the session breaks")
    again = endpoint.join("cnn")
    assert endpoint.events()[-1] == ("joined", "cnn")
    again.leave(pb.LEAVE_REASON_STOPPED, "")
