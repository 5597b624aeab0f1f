"""The transport over gRPC, against a real server."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import torch

from codistill.config.experiment import Experiment
from codistill.peer.errors import Interrupted, PeerError
from codistill.peer.steps import Failure
from codistill.process.exit_codes import ExitCode
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import decode, encode
from protos.peer.support import (
    BOUND,
    Connect,
    both,
    contribution,
    exchange_round,
    in_background,
    report,
    request,
    wait_for,
)

Tiny = Callable[..., Experiment]


# --- a real server


def test_rounds_are_exchanged(tiny: Tiny, serving: Any, connect: Connect) -> None:
    experiment = tiny()
    server = serving(experiment)
    first, second = connect(server.address), connect(server.address)
    response = first.join(request(experiment, "cnn"))
    assert (response.run, response.frontier) == ("tiny", 0)
    assert second.join(request(experiment, "mlp")).session_id > response.session_id
    for number in range(9):
        ours, theirs = exchange_round(number, [first, second])
        assert ours == theirs
        assert ours.round == number
        sent = [decode(contribution(number, seed).batch.outputs["logits"]) for seed in (0, 1)]
        label = torch.arange(16)[:, None] % 10
        least = torch.stack([logits - logits.gather(1, label) for logits in sent]).min(0).values
        assert torch.equal(decode(ours.targets["logits"]), least)
    for transport in (first, second):
        transport.leave(pb.LEAVE_REASON_FINISHED, "done")
    server.wait()
    assert server.ended is ExitCode.OK
    assert server.events()[-3:] == [("finished", "cnn"), ("finished", "mlp"), ("complete", "")]


def test_a_refused_join_says_why(tiny: Tiny, serving: Any, connect: Connect) -> None:
    experiment = tiny()
    server = serving(experiment)
    for wrong, text in (
        (request(experiment, "vit"), "participant 'vit' is not one of this run's; allowed: cnn, mlp"),
        (request(tiny(seed=4)), "experiment field seed: the run has 3, this worker has 4"),
        (request(experiment, protocol_version=99), "protocol_version"),
        (request(experiment, first=5), "journal ends at round 0"),
    ):
        with pytest.raises(PeerError) as refused:
            connect(server.address).join(wrong)
        assert refused.value.code is ExitCode.REFUSED
        assert str(refused.value).startswith(f"server {server.address} refused: ")
        assert text in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_refused_contribution_ends_the_worker(tiny: Tiny, serving: Any, connect: Connect) -> None:
    experiment = tiny()
    server = serving(experiment)
    for spoil, code, text in (
        (float("nan"), ExitCode.DIVERGED, "nan"),
        (None, ExitCode.REFUSED, "batch.ids.shape"),
    ):
        transport = connect(server.address)
        transport.join(request(experiment))
        wrong = contribution(0, 0)
        if spoil is None:
            wrong.batch.ids.CopyFrom(encode(torch.arange(3), "int64"))
        else:
            wrong.batch.outputs["logits"].CopyFrom(encode(torch.full((16, 10), spoil), "float32"))
        transport.send(wrong)
        with pytest.raises(PeerError, match=text) as ended:
            transport.receive(0)
        assert ended.value.code is code


@pytest.mark.parametrize("open_round", [False, True])
def test_a_server_that_comes_back_finds_the_workers_again(
    open_round: bool, tiny: Tiny, serving: Any, connect: Connect
) -> None:
    experiment = tiny()
    server = serving(experiment)
    first, second = both(experiment, server.address, connect)
    before = [exchange_round(number, [first, second])[0] for number in range(3)]
    if open_round:
        first.send(contribution(3, 0))  # the server takes it along
        wait_for(lambda: server.events()[-1] == ("joined", "mlp"), "both are there")
    server.stop()
    server.start()
    after = exchange_round(3, [first, second])
    assert after[0] == after[1]
    sent = [decode(contribution(3, seed).batch.outputs["logits"]) for seed in (0, 1)]
    label = torch.arange(16)[:, None] % 10
    least = torch.stack([logits - logits.gather(1, label) for logits in sent]).min(0).values
    assert torch.equal(decode(after[0].targets["logits"]), least)
    # A worker that resumes behind is answered what was decided before the restart, to the bit.
    again = connect(server.address)
    again.join(request(experiment, "mlp"))
    for number in range(3):
        again.send(contribution(number, 1))
        assert again.receive(number) == before[number]


def test_a_server_that_comes_back_elsewhere_is_found_there(
    tiny: Tiny, serving: Any, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = tiny()
    server = serving(experiment)
    old = server.address
    workers = both(experiment, old, connect, find=lambda: server.address)
    exchange_round(0, workers)
    server.stop()
    server.address = "127.0.0.1:0"
    server.start()
    assert server.address != old
    with caplog.at_level("INFO"):
        after = exchange_round(1, workers)
    assert after[0] == after[1]
    assert caplog.text.count(f"server {old} is now {server.address}") == 2


def test_reconnecting_asks_for_the_round_that_comes_next(tiny: Tiny, serving: Any, connect: Connect) -> None:
    """Not for the one it began with, which the journal need not hold any more."""
    experiment = tiny()
    server = serving(experiment)
    transports = both(experiment, server.address, connect)
    for number in range(6):
        exchange_round(number, transports)
    for transport in transports:
        transport.report(report(6, 5, durable=6))
    wait_for(lambda: not any(transport.undelivered() for transport in transports), "the reports arrive")
    server.stop()
    server.start()
    transports[0].report(report(6, 6))  # nothing is open: only the report finds out, and reconnects
    for number in range(6, 9):
        exchange_round(number, transports)
    for transport in transports:
        transport.leave(pb.LEAVE_REASON_FINISHED, "")
    server.wait()
    assert sorted((measured.participant, measured.steps_trained) for measured in server.measured()) == [
        ("cnn", 5),
        ("cnn", 6),
        ("mlp", 5),
    ]


def test_a_student_that_finished_leaves_at_a_server_that_came_back(tiny: Tiny, serving: Any, connect: Connect) -> None:
    experiment = tiny(training__epochs=1)
    server = serving(experiment)
    transports = both(experiment, server.address, connect)
    for number in range(3):
        exchange_round(number, transports)
    transports[0].report(report(3, 3))
    server.stop()
    server.start()
    transports[0].leave(pb.LEAVE_REASON_FINISHED, "")
    transports[1].leave(pb.LEAVE_REASON_FINISHED, "")
    server.wait()
    assert server.events()[-1] == ("complete", "")
    assert {(measured.participant, measured.steps_trained) for measured in server.measured()} == {("cnn", 3)}


def test_the_older_of_two_workers_ends(tiny: Tiny, serving: Any, connect: Connect) -> None:
    experiment = tiny()
    server = serving(experiment)
    older, newer = connect(server.address), connect(server.address)
    older.join(request(experiment))
    older.send(contribution(0, 0))
    newer.join(request(experiment))
    with pytest.raises(
        PeerError, match="a newer worker of participant 'cnn' has joined; this one must not go on"
    ) as ended:
        older.receive(0)
    assert ended.value.code is ExitCode.SUPERSEDED
    newer.send(contribution(0, 0))
    other = connect(server.address)
    other.join(request(experiment, "mlp"))
    other.send(contribution(0, 1))
    assert newer.receive(0) == other.receive(0)


@pytest.mark.parametrize("call", ["report", "leave"])
def test_a_worker_that_was_superseded_unnoticed_does_not_take_the_participant_back(
    call: str, tiny: Tiny, serving: Any, connect: Connect
) -> None:
    experiment = tiny()
    server = serving(experiment)
    older, newer = connect(server.address), connect(server.address)
    older.join(request(experiment))
    newer.join(request(experiment))
    wait_for(lambda: not older._connected, "the older one's stream ends")
    calls = {"report": lambda: older.report(report(9, 9)), "leave": lambda: older.leave(pb.LEAVE_REASON_FINISHED, "")}
    with pytest.raises(PeerError) as ended:
        calls[call]()
    assert ended.value.code is ExitCode.SUPERSEDED
    assert server.events().count(("joined", "cnn")) == 2
    assert newer._connected


def test_a_worker_whose_connection_was_lost_meanwhile_does_not_either(
    tiny: Tiny, serving: Any, connect: Connect
) -> None:
    """Nobody could tell it: the server that did so was gone before it could be heard."""
    experiment = tiny()
    server = serving(experiment)
    older, newer = connect(server.address), connect(server.address)
    older.join(request(experiment))
    newer.join(request(experiment))
    server.stop()
    server.start()
    wait_for(lambda: not older._connected and not newer._connected, "both lose the server")
    assert older._stream is not None
    older._stream.cancel()
    older._stream = None  # what the old server said last is lost
    older._session.broke(Failure("UNAVAILABLE", "lost"), time.monotonic())
    with pytest.raises(PeerError, match="a newer worker of participant 'cnn' has joined") as ended:
        older.report(report(0))
    assert ended.value.code is ExitCode.SUPERSEDED
    newer.report(report(0))
    assert newer._connected


def test_giving_up_names_who_was_waited_for(tiny: Tiny, serving: Any, connect: Connect) -> None:
    experiment = tiny()
    server = serving(experiment)
    transport = connect(server.address, give_up_after=1.5)
    transport.join(request(experiment))
    transport.send(contribution(0, 0))
    started = time.monotonic()
    with pytest.raises(PeerError) as ended:
        transport.receive(0)
    assert 1.5 <= time.monotonic() - started < BOUND
    assert ended.value.code is ExitCode.GAVE_UP
    assert str(ended.value).startswith("gave up after 2 s: round 0 still waits for mlp; ")
    assert "exchange.give_up_after" in str(ended.value)
    transport.leave(pb.LEAVE_REASON_FAILED, str(ended.value))
    assert server.events()[-1] == ("failed", "cnn")


def test_a_stop_interrupts_the_wait_and_the_session_stays_open_for_leave(
    tiny: Tiny, serving: Any, connect: Connect
) -> None:
    experiment = tiny()
    server = serving(experiment)
    stop = threading.Event()
    transport = connect(server.address, stop, give_up_after=1000)
    transport.join(request(experiment))
    transport.send(contribution(0, 0))
    thread, outcome = in_background(lambda: transport.receive(0))
    wait_for(lambda: server.events() == [("joined", "cnn")], "it has joined")
    started = time.monotonic()
    stop.set()
    thread.join(30)
    assert time.monotonic() - started < BOUND
    assert isinstance(outcome[0], Interrupted)
    transport.report(report(3, 3))
    transport.leave(pb.LEAVE_REASON_STOPPED, "Ctrl-C")
    assert transport.undelivered() == []
    assert [measured.steps_trained for measured in server.measured()] == [3]
    assert server.events()[-1] == ("stopped", "cnn")


@pytest.mark.parametrize("waits_in", ["receive", "nothing"])
def test_a_stop_while_the_server_is_away_is_no_error(waits_in: str, tiny: Tiny, serving: Any, connect: Connect) -> None:
    experiment = tiny()
    server = serving(experiment)
    stop = threading.Event()
    transport = connect(server.address, stop, give_up_after=1000)
    transport.join(request(experiment))
    transport.send(contribution(0, 0))
    server.stop()
    wait_for(lambda: not transport._connected, "the stream ends")
    if waits_in == "receive":
        thread, outcome = in_background(lambda: transport.receive(0))
        wait_for(lambda: transport._stream is None, "it tries to reach the server")
        started = time.monotonic()
        stop.set()
        thread.join(30)
        assert isinstance(outcome[0], Interrupted)
    else:
        started = time.monotonic()
        stop.set()
    transport.report(report(3, 3))
    transport.leave(pb.LEAVE_REASON_STOPPED, "Ctrl-C")
    assert time.monotonic() - started < BOUND
    assert [measured.steps_trained for measured in transport.undelivered()] == [3]


def test_a_stop_ends_the_search_for_a_server(connect: Connect) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        stop = threading.Event()
        transport = connect(f"127.0.0.1:{nobody.getsockname()[1]}", stop, connect_timeout=1000)
        thread, outcome = in_background(lambda: transport.join(pb.JoinRequest()))
        started = time.monotonic()
        stop.set()
        thread.join(30)
        assert time.monotonic() - started < BOUND
        assert isinstance(outcome[0], Interrupted)


def test_measurements_made_while_the_server_is_away_arrive_later_each_once(
    tiny: Tiny, serving: Any, connect: Connect
) -> None:
    experiment = tiny(distillation={"method": "independent"})
    server = serving(experiment)
    transport = connect(server.address)
    transport.join(request(experiment, outputs={}))
    expected: list[int] = []

    def report_step(number: int) -> None:
        expected.append(number)
        made = report(number, number)
        made.round = 0  # nothing is exchanged
        transport.report(made)

    for number in range(1, 4):
        report_step(number)
    server.stop()
    wait_for(lambda: not transport._connected, "the connection breaks")
    # The first of these finds the connection broken and waits for the server, in a thread for this test's sake.
    thread, _ = in_background(lambda: [report_step(number) for number in range(4, 8)])
    wait_for(lambda: transport._stream is None, "it noticed")
    server.start()
    thread.join(30)
    for number in range(8, 10):
        report_step(number)
    transport.leave(pb.LEAVE_REASON_STOPPED, "")
    assert transport.undelivered() == []
    found = [(measured.participant, measured.split, measured.steps_trained) for measured in server.measured()]
    assert set(found) == {("cnn", "test", number) for number in expected}
    assert expected == list(range(1, 10))
    # The reader lets a later line stand for an earlier one; what was on its way when the server went may be there twice.
    assert len(found) <= len(expected) + 3
    assert {measured.loss == measured.steps_trained for measured in server.measured()} == {True}, "each its own values"


# --- servers that cannot be reached, or are none


def test_a_server_that_is_not_there(connect: Connect) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, not listening: nobody else takes the port
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(PeerError) as ended:
            connect(address, connect_timeout=0.5).join(pb.JoinRequest())
    assert time.monotonic() - started < BOUND
    assert ended.value.code is ExitCode.UNREACHABLE
    assert str(ended.value).startswith(f"server {address} cannot be reached within 0.5 s: ")
    assert "check that `codistill serve` runs there" in str(ended.value)


def test_a_server_that_takes_connections_and_says_nothing(connect: Connect) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        started = time.monotonic()
        with pytest.raises(PeerError) as ended:
            connect(f"127.0.0.1:{silent.getsockname()[1]}", connect_timeout=1).join(pb.JoinRequest())
        assert time.monotonic() - started < BOUND
        assert ended.value.code is ExitCode.UNREACHABLE


def test_a_server_that_went_away_for_good(tiny: Tiny, serving: Any, connect: Connect) -> None:
    experiment = tiny()
    server = serving(experiment)
    transport = connect(server.address, give_up_after=1)
    transport.join(request(experiment))
    transport.send(contribution(0, 0))
    server.stop()
    started = time.monotonic()
    with pytest.raises(PeerError, match="went away and did not come back within 1 s") as ended:
        transport.receive(0)
    assert time.monotonic() - started < BOUND
    assert ended.value.code is ExitCode.UNREACHABLE


def test_another_grpc_server_is_no_aggregation_server(connect: Connect) -> None:
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with pytest.raises(PeerError) as ended:
            connect(f"127.0.0.1:{port}").join(pb.JoinRequest())
        server.stop(0).wait()
    assert ended.value.code is ExitCode.REFUSED
    assert f"server 127.0.0.1:{port} does not answer as an aggregation server (UNIMPLEMENTED" in str(ended.value)
    assert "check the address" in str(ended.value)


def test_join_comes_first(connect: Connect) -> None:
    transport = connect("127.0.0.1:1")
    transport.send(contribution(0, 0))
    with pytest.raises(RuntimeError, match="send and receive come after join"):
        transport.receive(0)
