"""The promises of :class:`codistill.peer.base.Transport`, held against every transport there is.

A new transport is one more function in `ENDPOINTS`; a test fails where one is missing.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import codistill.peer
import codistill_deploy.launch
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

    def join(self, participant: str, first_round: int = 0) -> Transport:
        transport = self.connect()
        transport.join(request(self.experiment, participant, first_round))
        return transport

    def join_all(self) -> list[Transport]:
        return [self.join(name) for name in self.experiment.names]

    def events(self) -> list[tuple[str, str]]:
        found = records.read(self.layout.events_file)
        return [(record.what, record.participant) for record in found if isinstance(record, records.Happened)]

    def measured(self) -> set[tuple[str, int]]:
        found = records.read(self.layout.metrics_file)
        return {(record.participant, record.steps_trained) for record in found if isinstance(record, records.Measured)}


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


def defined_transports() -> set[type]:
    """Return every class of the packages that define transports which has all of a transport's methods."""
    methods = [name for name in vars(Transport) if not name.startswith("_")]
    found: set[type] = set()
    for package in (codistill.peer, codistill_deploy.launch):
        for each in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            classes = [item for item in vars(importlib.import_module(each.name)).values() if isinstance(item, type)]
            found.update(item for item in classes if all(hasattr(item, name) for name in methods))
    return found - {Transport}


def ended_by(call: Callable[[], object]) -> PeerError:
    """Repeat a call until it raises what ends the peer; a report may be sent before the transport knows."""
    raised: list[PeerError] = []

    def attempt() -> bool:
        try:
            call()
        except PeerError as error:
            raised.append(error)
        return bool(raised)

    wait_for(attempt, "the peer is ended")
    return raised[0]


def exchange_round(transports: list[Transport], round_number: int) -> list[bytes]:
    """Exchange one round; return the targets of each peer as bytes."""
    for seed, transport in enumerate(transports):
        transport.send(contribution(round_number, seed))
    received = [transport.receive(round_number) for transport in transports]
    return [targets.SerializeToString(deterministic=True) for targets in received]


def exchange_all(transports: list[Transport]) -> None:
    """Exchange all rounds of the run, as only then a participant has finished."""
    for round_number in range(9):
        exchange_round(transports, round_number)


def send_and_receive(transport: Transport, sent: pb.ExchangeRequest) -> pb.Targets:
    """Exchange a round; a transport may raise from either call what ends the peer."""
    transport.send(sent)
    return transport.receive(sent.round)


def least_logits(round_number: int) -> torch.Tensor:
    """Return the targets of the minimum-logit ensemble for what both students send."""
    sent = [decode(contribution(round_number, seed).batch.outputs["logits"]) for seed in (0, 1)]
    label = torch.arange(16)[:, None] % 10
    return torch.stack([logits - logits.gather(1, label) for logits in sent]).min(0).values


def test_every_transport_is_an_endpoint(tmp_path: Path) -> None:
    tried: set[type] = set()
    for name, start in ENDPOINTS.items():
        with start(build(), tmp_path / name) as made:
            tried.add(type(made.connect()))
    assert tried == defined_transports()


def test_join_returns_a_session_and_where_the_run_is(endpoint: Endpoint) -> None:
    first = endpoint.connect().join(request(endpoint.experiment, "cnn"))
    second = endpoint.connect().join(request(endpoint.experiment, "mlp"))
    assert (first.run, first.frontier) == (second.run, second.frontier) == ("tiny", 0)
    assert 0 < first.session_id < second.session_id
    assert endpoint.events() == [("joined", "cnn"), ("joined", "mlp")]


def test_a_join_that_is_refused_says_why(endpoint: Endpoint) -> None:
    with pytest.raises(PeerError, match="participant 'vit' is not one of this run's; allowed: cnn, mlp") as refused:
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
    with pytest.raises(PeerError, match=r"batch\.ids\.shape") as refused:
        send_and_receive(transport, wrong)
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
    [(pb.LEAVE_REASON_FINISHED, "finished"), (pb.LEAVE_REASON_STOPPED, "stopped"), (pb.LEAVE_REASON_FAILED, "failed")],
    ids=["finished", "stopped", "failed"],
)
def test_leave_is_known_to_the_run_when_it_returns(
    endpoint: Endpoint, reason: pb.LeaveReason.ValueType, event: str
) -> None:
    transports = endpoint.join_all()
    exchange_all(transports)
    transport = transports[0]
    transport.leave(reason, "a reason")
    assert endpoint.events()[-1] == (event, "cnn")
    transport.close()
    assert endpoint.events()[-1] == (event, "cnn"), "a session that is over cannot break"


def test_a_run_is_complete_when_all_have_finished(endpoint: Endpoint) -> None:
    transports = endpoint.join_all()
    exchange_all(transports)
    for transport in transports:
        transport.leave(pb.LEAVE_REASON_FINISHED, "")
    assert endpoint.events()[-1] == ("complete", "")


def test_one_that_cannot_have_finished_is_not_believed(endpoint: Endpoint) -> None:
    """The others would no longer wait for it."""
    transports = endpoint.join_all()
    exchange_round(transports, 0)
    with pytest.raises(PeerError, match="FINISHED is not allowed while 1 of 9 rounds are closed") as refused:
        transports[0].leave(pb.LEAVE_REASON_FINISHED, "")
    assert refused.value.code is ExitCode.REFUSED
    assert ("finished", "cnn") not in endpoint.events()


def test_close_breaks_an_open_session_and_may_be_repeated(endpoint: Endpoint) -> None:
    transport = endpoint.join("cnn")
    transport.close()
    transport.close()
    wait_for(lambda: endpoint.events()[-1] == ("disconnected", "cnn"), "the session breaks")
    again = endpoint.join("cnn")
    assert endpoint.events()[-1] == ("joined", "cnn")
    again.leave(pb.LEAVE_REASON_STOPPED, "")


@pytest.mark.parametrize(
    "call",
    [
        lambda transport: transport.receive(0),
        lambda transport: transport.report(report(0)),
        lambda transport: transport.leave(pb.LEAVE_REASON_FINISHED, ""),
    ],
    ids=["receive", "report", "leave finished"],
)
def test_join_comes_first(endpoint: Endpoint, call: Callable[[Transport], object]) -> None:
    with pytest.raises(RuntimeError, match="come after join") as raised:
        call(endpoint.connect())
    assert not isinstance(raised.value, PeerError)


def test_a_peer_that_never_joined_may_leave_and_close(endpoint: Endpoint) -> None:
    transport = endpoint.connect()
    transport.leave(pb.LEAVE_REASON_FAILED, "")
    transport.close()
    assert not endpoint.events()


def test_join_publishes_what_was_sent_before(endpoint: Endpoint) -> None:
    early, other = endpoint.connect(), endpoint.join("mlp")
    early.send(contribution(0, 0))
    early.join(request(endpoint.experiment, "cnn"))
    other.send(contribution(0, 1))
    assert torch.equal(decode(early.receive(0).targets["logits"]), least_logits(0))


@pytest.mark.parametrize(
    "call",
    [
        lambda transport: send_and_receive(transport, contribution(0, 0)),
        lambda transport: transport.receive(0),
        lambda transport: transport.report(report(0, 0)),
        lambda transport: transport.leave(pb.LEAVE_REASON_FINISHED, ""),
    ],
    ids=["send and receive", "receive", "report", "leave finished"],
)
def test_a_newer_peer_of_the_participant_ends_the_older(
    endpoint: Endpoint, call: Callable[[Transport], object]
) -> None:
    older, newer = endpoint.join("cnn"), endpoint.join("cnn")
    ended = ended_by(lambda: call(older))
    assert ended.code is ExitCode.SUPERSEDED
    assert "a newer worker of participant 'cnn' has joined; this one must not go on" in str(ended)
    older.leave(pb.LEAVE_REASON_FAILED, str(ended))
    older.close()
    # A call of the older that arrives before it knows is refused, and recorded as such.
    happened = [what for what, _ in endpoint.events() if what != "refused"]
    assert happened == ["joined", "superseded", "joined"], "the newer goes on"
    newer.leave(pb.LEAVE_REASON_STOPPED, "")


def test_a_superseded_peer_cannot_join_again(endpoint: Endpoint) -> None:
    older, _ = endpoint.join("cnn"), endpoint.join("cnn")
    assert ended_by(lambda: older.report(report(0, 0))).code is ExitCode.SUPERSEDED
    with pytest.raises(PeerError, match="a newer worker") as ended:
        older.join(request(endpoint.experiment, "cnn"))
    assert ended.value.code is ExitCode.SUPERSEDED


def test_a_report_of_a_superseded_peer_stays_undelivered(endpoint: Endpoint) -> None:
    older, _ = endpoint.join("cnn"), endpoint.join("cnn")
    ended_by(lambda: older.report(report(0, 3)))
    assert {measurement.steps_trained for measurement in older.undelivered()} == {3}
    assert not endpoint.measured()


@pytest.mark.parametrize("reason", [pb.LEAVE_REASON_STOPPED, pb.LEAVE_REASON_FAILED], ids=["stopped", "failed"])
def test_a_superseded_peer_leaves_without_an_error(endpoint: Endpoint, reason: pb.LeaveReason.ValueType) -> None:
    older, _ = endpoint.join("cnn"), endpoint.join("cnn")
    older.leave(reason, "")
    assert [what for what, _ in endpoint.events() if what != "refused"] == ["joined", "superseded", "joined"]


def test_values_that_are_not_finite_end_the_peer_as_diverged(endpoint: Endpoint) -> None:
    transport = endpoint.join("cnn")
    wrong = contribution(0, 0)
    wrong.batch.outputs["logits"].CopyFrom(encode(torch.full((16, 10), torch.nan), "float32"))
    with pytest.raises(PeerError, match="diverged") as ended:
        send_and_receive(transport, wrong)
    assert ended.value.code is ExitCode.DIVERGED


def test_a_report_that_is_invalid_ends_a_peer_that_finishes(endpoint: Endpoint) -> None:
    transport = endpoint.join("cnn")

    def report_and_finish() -> None:
        transport.report(report(10, 1))  # raises here, or at the end of the session
        transport.leave(pb.LEAVE_REASON_FINISHED, "")

    with pytest.raises(PeerError, match="steps_trained: 10 is") as refused:
        report_and_finish()
    assert refused.value.code is ExitCode.REFUSED
    assert {measurement.steps_trained for measurement in transport.undelivered()} == {1}
