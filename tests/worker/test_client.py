"""The exchange over gRPC: against a real server, and against servers that misbehave by script."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import torch

from codistill import PROTOCOL_VERSION, SESSION_KEY, SUPERSEDED_KEY
from codistill.checksums import is_whole, seal, session_in
from codistill.exit_codes import ExitCode
from codistill.experiment import Experiment
from codistill.identity import identity
from codistill.tensors import decode, encode
from codistill.v1 import distillation_pb2 as pb
from codistill.v1.distillation_pb2_grpc import DistillationServicer, add_DistillationServicer_to_server
from codistill_worker.client import GrpcExchange
from codistill_worker.errors import Interrupted, WorkerError
from codistill_worker.session import Failure

BOUND = 10.0
"""Seconds far above what anything here takes, far below what it would take unbounded."""

Connect = Callable[..., GrpcExchange]
Tiny = Callable[..., Experiment]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes exchanges, closes them, and sees that no thread of theirs is left."""
    before = set(threading.enumerate())
    made: list[GrpcExchange] = []

    def make(
        address: str,
        stop: threading.Event | None = None,
        connect_timeout: float = 20,
        give_up_after: float = 20,
        silence_after: float = 20,
        find: Callable[[], str | None] = lambda: None,
    ) -> GrpcExchange:
        made.append(
            GrpcExchange(
                address,
                connect_timeout=connect_timeout,
                give_up_after=give_up_after,
                silence_after=silence_after,
                stop=stop or threading.Event(),
                find=find,
            )
        )
        return made[-1]

    yield make
    for exchange in made:
        exchange.close()
        exchange.close()  # a second time does nothing

    def left() -> list[str]:
        # gRPC names its threads after nobody; the server under test has one of its asyncio flavour's for the whole process.
        after = [each.name for each in set(threading.enumerate()) - before if "_poll_wrapper" not in each.name]
        return [name for name in after if name.startswith(("codistill-replies", "Thread-"))]

    wait_for(lambda: not left(), "the threads of a closed exchange end")


def wait_for(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.01)


def request(experiment: Experiment, student: str = "cnn", first: int = 0, **changes: Any) -> pb.JoinRequest:
    fields: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "student": student,
        "experiment": identity(experiment),
        "data": pb.DataFingerprint(digest="d", train_samples=48, classes=10),
        "outputs": {"logits": pb.Shape(dims=[10])},
        "first_round": first,
        "total_rounds": 9,
    }
    return pb.JoinRequest(**{**fields, **changes})


def contribution(number: int, seed: int) -> pb.Contribution:
    logits = torch.randn(16, 10, generator=torch.Generator().manual_seed(100 * seed + number))
    labels = torch.arange(16) % 10
    samples = pb.Samples(
        ids=encode(torch.arange(16) + number, "int64"),
        labels=encode(labels, "int64"),
        outputs={"logits": encode(logits, "float32")},
    )
    return pb.Contribution(round=number, batch=samples)


def report(number: int, *rounds: int, durable: int = 0) -> pb.ReportRequest:
    measurements = [pb.Measurement(split=pb.SPLIT_TEST, round=each, accuracy=0.5, loss=each) for each in rounds]
    return pb.ReportRequest(round=number, epoch=number / 3, durable_round=durable, measurements=measurements)


def exchange_round(number: int, exchanges: list[GrpcExchange]) -> list[pb.Targets]:
    """Exchanges one round, every student on a thread of its own, as it would be in a process of its own."""

    def take_part(seed: int) -> pb.Targets:
        exchanges[seed].send(contribution(number, seed))
        return exchanges[seed].receive(number)

    with ThreadPoolExecutor(len(exchanges)) as pool:
        return list(pool.map(take_part, range(len(exchanges))))


def both(experiment: Experiment, address: str, connect: Connect, **settings: Any) -> list[GrpcExchange]:
    exchanges = [connect(address, **settings) for _ in experiment.names]
    for name, each in zip(experiment.names, exchanges, strict=True):
        each.join(request(experiment, name))
    return exchanges


def in_background(work: Callable[[], object]) -> tuple[threading.Thread, list[BaseException | object]]:
    """Runs work beside; the list gets its result, or what it raised."""
    outcome: list[BaseException | object] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # noqa: BLE001 - handed to the test
            outcome.append(error)

    thread = threading.Thread(target=run, name="background")
    thread.start()
    return thread, outcome


# --- a real server


def test_rounds_are_exchanged(tiny: Tiny, serving: Any, connect: Connect) -> None:
    experiment = tiny()
    server = serving(experiment)
    first, second = connect(server.address), connect(server.address)
    response = first.join(request(experiment, "cnn"))
    assert (response.run, response.frontier) == ("tiny", 0)
    assert second.join(request(experiment, "mlp")).session > response.session
    for number in range(4):
        ours, theirs = exchange_round(number, [first, second])
        assert ours == theirs
        assert ours.round == number
        sent = [decode(contribution(number, seed).batch.outputs["logits"]) for seed in (0, 1)]
        label = torch.arange(16)[:, None] % 10
        least = torch.stack([each - each.gather(1, label) for each in sent]).min(0).values
        assert torch.equal(decode(ours.targets["logits"]), least)
    for each in (first, second):
        each.leave(pb.LEAVE_REASON_FINISHED, "done")
    server.wait()
    assert server.ended is ExitCode.OK
    assert server.events()[-3:] == [("finished", "cnn"), ("finished", "mlp"), ("complete", "")]


def test_a_refused_join_says_why(tiny: Tiny, serving: Any, connect: Connect) -> None:
    experiment = tiny()
    server = serving(experiment)
    for wrong, text in (
        (request(experiment, "vit"), "student 'vit' is not one of this run's; allowed: cnn, mlp"),
        (request(tiny(seed=4)), "experiment field seed: the run has 3, this worker has 4"),
        (request(experiment, protocol_version=99), "protocol_version"),
        (request(experiment, first=5), "journal ends at round 0"),
    ):
        with pytest.raises(WorkerError) as refused:
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
        exchange = connect(server.address)
        exchange.join(request(experiment))
        wrong = contribution(0, 0)
        if spoil is None:
            wrong.batch.ids.CopyFrom(encode(torch.arange(3), "int64"))
        else:
            wrong.batch.outputs["logits"].CopyFrom(encode(torch.full((16, 10), spoil), "float32"))
        exchange.send(wrong)
        with pytest.raises(WorkerError, match=text) as ended:
            exchange.receive(0)
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
    least = torch.stack([each - each.gather(1, label) for each in sent]).min(0).values
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
    exchanges = both(experiment, server.address, connect)
    for number in range(6):
        exchange_round(number, exchanges)
    for each in exchanges:
        each.report(report(6, 5, durable=6))
    wait_for(lambda: not any(each.undelivered() for each in exchanges), "the reports arrive")
    server.stop()
    server.start()
    exchanges[0].report(report(6, 6))  # nothing is open: only the report finds out, and mends
    exchange_round(6, exchanges)
    for each in exchanges:
        each.leave(pb.LEAVE_REASON_FINISHED, "")
    server.wait()
    assert sorted((each.student, each.round) for each in server.measured()) == [("cnn", 5), ("cnn", 6), ("mlp", 5)]


def test_a_student_that_finished_tells_a_server_that_came_back(tiny: Tiny, serving: Any, connect: Connect) -> None:
    experiment = tiny()
    server = serving(experiment)
    exchanges = both(experiment, server.address, connect)
    exchange_round(0, exchanges)
    exchanges[0].report(report(1, 1))
    server.stop()
    server.start()
    exchanges[0].leave(pb.LEAVE_REASON_FINISHED, "")
    exchanges[1].leave(pb.LEAVE_REASON_FINISHED, "")
    server.wait()
    assert server.events()[-1] == ("complete", "")
    assert {(each.student, each.round) for each in server.measured()} == {("cnn", 1)}


def test_the_older_of_two_workers_ends(tiny: Tiny, serving: Any, connect: Connect) -> None:
    experiment = tiny()
    server = serving(experiment)
    older, newer = connect(server.address), connect(server.address)
    older.join(request(experiment))
    older.send(contribution(0, 0))
    newer.join(request(experiment))
    with pytest.raises(
        WorkerError, match="a newer worker of student 'cnn' has joined; this one must not go on"
    ) as ended:
        older.receive(0)
    assert ended.value.code is ExitCode.SUPERSEDED
    newer.send(contribution(0, 0))
    other = connect(server.address)
    other.join(request(experiment, "mlp"))
    other.send(contribution(0, 1))
    assert newer.receive(0) == other.receive(0)


@pytest.mark.parametrize("call", ["report", "leave"])
def test_a_worker_that_was_superseded_unnoticed_does_not_take_the_student_back(
    call: str, tiny: Tiny, serving: Any, connect: Connect
) -> None:
    experiment = tiny()
    server = serving(experiment)
    older, newer = connect(server.address), connect(server.address)
    older.join(request(experiment))
    newer.join(request(experiment))
    wait_for(lambda: not older._connected, "the older one's stream ends")
    calls = {"report": lambda: older.report(report(9, 9)), "leave": lambda: older.leave(pb.LEAVE_REASON_FINISHED, "")}
    with pytest.raises(WorkerError) as ended:
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
    older._session.standing = False
    with pytest.raises(WorkerError, match="a newer worker of student 'cnn' has joined") as ended:
        older.report(report(0))
    assert ended.value.code is ExitCode.SUPERSEDED
    newer.report(report(0))
    assert newer._connected


def test_giving_up_names_who_was_waited_for(tiny: Tiny, serving: Any, connect: Connect) -> None:
    experiment = tiny()
    server = serving(experiment)
    exchange = connect(server.address, give_up_after=1.5)
    exchange.join(request(experiment))
    exchange.send(contribution(0, 0))
    started = time.monotonic()
    with pytest.raises(WorkerError) as ended:
        exchange.receive(0)
    assert 1.5 <= time.monotonic() - started < BOUND
    assert ended.value.code is ExitCode.GAVE_UP
    assert str(ended.value).startswith("gave up after 2 s: round 0 still waits for mlp; ")
    assert "exchange.give_up_after" in str(ended.value)
    exchange.leave(pb.LEAVE_REASON_FAILED, str(ended.value))
    assert server.events()[-1] == ("failed", "cnn")


def test_a_stop_interrupts_the_wait_and_leaves_the_session_to_say_goodbye_on(
    tiny: Tiny, serving: Any, connect: Connect
) -> None:
    experiment = tiny()
    server = serving(experiment)
    stop = threading.Event()
    exchange = connect(server.address, stop, give_up_after=1000)
    exchange.join(request(experiment))
    exchange.send(contribution(0, 0))
    thread, outcome = in_background(lambda: exchange.receive(0))
    wait_for(lambda: server.events() == [("joined", "cnn")], "it has joined")
    started = time.monotonic()
    stop.set()
    thread.join(30)
    assert time.monotonic() - started < BOUND
    assert isinstance(outcome[0], Interrupted)
    exchange.report(report(3, 3))
    exchange.leave(pb.LEAVE_REASON_STOPPED, "Ctrl-C")
    assert exchange.undelivered() == []
    assert [each.round for each in server.measured()] == [3]
    assert server.events()[-1] == ("left", "cnn")


@pytest.mark.parametrize("waits_in", ["receive", "nothing"])
def test_a_stop_while_the_server_is_away_is_no_error(waits_in: str, tiny: Tiny, serving: Any, connect: Connect) -> None:
    experiment = tiny()
    server = serving(experiment)
    stop = threading.Event()
    exchange = connect(server.address, stop, give_up_after=1000)
    exchange.join(request(experiment))
    exchange.send(contribution(0, 0))
    server.stop()
    wait_for(lambda: not exchange._connected, "the stream ends")
    if waits_in == "receive":
        thread, outcome = in_background(lambda: exchange.receive(0))
        wait_for(lambda: exchange._stream is None, "it tries to reach the server")
        started = time.monotonic()
        stop.set()
        thread.join(30)
        assert isinstance(outcome[0], Interrupted)
    else:
        started = time.monotonic()
        stop.set()
    exchange.report(report(3, 3))
    exchange.leave(pb.LEAVE_REASON_STOPPED, "Ctrl-C")
    assert time.monotonic() - started < BOUND
    assert [each.round for each in exchange.undelivered()] == [3]


def test_a_stop_ends_the_search_for_a_server(connect: Connect) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        stop = threading.Event()
        exchange = connect(f"127.0.0.1:{nobody.getsockname()[1]}", stop, connect_timeout=1000)
        thread, outcome = in_background(lambda: exchange.join(pb.JoinRequest()))
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
    exchange = connect(server.address)
    exchange.join(request(experiment, outputs={}))
    expected: list[int] = []

    def tell(number: int) -> None:
        expected.append(number)
        exchange.report(report(number, number))

    for number in range(1, 4):
        tell(number)
    server.stop()
    wait_for(lambda: not exchange._connected, "the connection breaks")
    # The first of these finds the connection broken and waits for the server, in a thread for this test's sake.
    thread, _ = in_background(lambda: [tell(number) for number in range(4, 8)])
    wait_for(lambda: exchange._stream is None, "it noticed")
    server.start()
    thread.join(30)
    for number in range(8, 10):
        tell(number)
    exchange.leave(pb.LEAVE_REASON_STOPPED, "")
    assert exchange.undelivered() == []
    measured = [(each.student, each.split, each.round) for each in server.measured()]
    assert set(measured) == {("cnn", "test", number) for number in expected}
    assert expected == list(range(1, 10))
    # The reader lets a later line stand for an earlier one; what was on its way when the server went may be there twice.
    assert len(measured) <= len(expected) + 3
    assert {each.loss == each.round for each in server.measured()} == {True}, "each its own values"


# --- servers that cannot be reached, or are none


def test_a_server_that_is_not_there(connect: Connect) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, not listening: nobody else takes the port
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(WorkerError) as ended:
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
        with pytest.raises(WorkerError) as ended:
            connect(f"127.0.0.1:{silent.getsockname()[1]}", connect_timeout=1).join(pb.JoinRequest())
        assert time.monotonic() - started < BOUND
        assert ended.value.code is ExitCode.UNREACHABLE


def test_a_server_that_went_away_for_good(tiny: Tiny, serving: Any, connect: Connect) -> None:
    experiment = tiny()
    server = serving(experiment)
    exchange = connect(server.address, give_up_after=1)
    exchange.join(request(experiment))
    exchange.send(contribution(0, 0))
    server.stop()
    started = time.monotonic()
    with pytest.raises(WorkerError, match="went away and did not come back within 1 s") as ended:
        exchange.receive(0)
    assert time.monotonic() - started < BOUND
    assert ended.value.code is ExitCode.UNREACHABLE


class Script(DistillationServicer):
    """A server that does what a test tells it; by default it answers every contribution with targets of its own."""

    def __init__(self) -> None:
        self.joins: list[pb.JoinRequest] = []
        self.sent: list[tuple[int, int]] = []
        self.contributions: list[pb.Contribution] = []
        self.reports: list[pb.ReportRequest] = []
        self.left: list[pb.LeaveRequest] = []
        self.answer: Callable[[int, int, Any], Iterator[pb.ExchangeReply]] = lambda _session, number, _context: iter(
            [reply(number)]
        )
        self.on_join: Callable[[int], pb.JoinResponse] = lambda number: pb.JoinResponse(session=number, run="script")
        self.on_report: Callable[[int, Any], None] = lambda _number, _context: None
        self.on_leave: Callable[[int, Any], None] = lambda _number, _context: None

    def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:  # noqa: N802 - the rpc's name
        del context
        taken = pb.JoinRequest()
        taken.CopyFrom(request)
        self.joins.append(taken)
        return self.on_join(len(self.joins))

    def Exchange(self, request_iterator: Any, context: Any) -> Iterator[pb.ExchangeReply]:  # noqa: N802
        session = session_in(dict(context.invocation_metadata())[SESSION_KEY])
        assert session is not None
        context.send_initial_metadata(())
        for each in request_iterator:
            self.sent.append((session, each.round))
            self.contributions.append(each)
            yield from self.answer(session, each.round, context)

    def Report(self, request: pb.ReportRequest, context: Any) -> pb.ReportResponse:  # noqa: N802
        self.reports.append(request)
        self.on_report(len(self.reports), context)
        return pb.ReportResponse()

    def Leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveResponse:  # noqa: N802
        self.left.append(request)
        self.on_leave(len(self.left), context)
        return pb.LeaveResponse()


def reply(number: int) -> pb.ExchangeReply:
    values = {"logits": encode(torch.full((1, 1), float(number)), "float32")}
    return sealed(pb.ExchangeReply(targets=pb.Targets(round=number, targets=values)))


def sealed(message: pb.ExchangeReply) -> pb.ExchangeReply:
    return pb.ExchangeReply.FromString(seal(message))


@pytest.fixture
def script() -> Iterator[tuple[Script, str]]:
    made = Script()
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        add_DistillationServicer_to_server(made, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield made, f"127.0.0.1:{port}"
        server.stop(0).wait()


def value(targets: pb.Targets) -> float:
    return decode(targets.targets["logits"]).item()


def test_a_lost_reply_is_asked_for_again(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script

    def lose_it(session: int, number: int, context: Any) -> Iterator[pb.ExchangeReply]:
        if session == 1 and number == 6:
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        yield reply(number)

    server.answer = lose_it
    exchange = connect(address)
    exchange.join(pb.JoinRequest(first_round=4))
    for number in (4, 5, 6, 7):
        exchange.send(contribution(number, 0))
        assert value(exchange.receive(number)) == number
    assert server.sent == [(1, 4), (1, 5), (1, 6), (2, 6), (2, 7)], "what is open is sent again, in a new session"
    assert [each.first_round for each in server.joins] == [4, 6], "rounds before it are not asked for"


def test_duplicated_and_late_replies_are_passed_over(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script

    def stutter(session: int, number: int, context: Any) -> Iterator[pb.ExchangeReply]:
        if number:
            yield reply(number - 1)
        yield sealed(pb.ExchangeReply(waiting=pb.Waiting(round=number, students=["mlp"], seconds=1)))
        yield reply(number)
        yield reply(number)

    server.answer = stutter
    exchange = connect(address)
    exchange.join(pb.JoinRequest())
    for number in range(5):
        exchange.send(contribution(number, 0))
        assert value(exchange.receive(number)) == number
    assert len(server.joins) == 1


@pytest.mark.parametrize("how", ["aborted", "ended"])
def test_a_stream_that_ends_without_being_superseded_is_opened_again(
    how: str, script: tuple[Script, str], connect: Connect
) -> None:
    server, address = script

    def once(session: int, number: int, context: Any) -> Iterator[pb.ExchangeReply]:
        if session == 1 and how == "aborted":
            context.abort(grpc.StatusCode.ABORTED, "evicted; join again")
        if session == 1:
            context.cancel()
        yield reply(number)

    server.answer = once
    exchange = connect(address)
    exchange.join(pb.JoinRequest())
    exchange.send(contribution(0, 0))
    assert value(exchange.receive(0)) == 0
    assert len(server.joins) == 2


def test_a_damaged_reply_is_never_used_and_asked_for_again(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script

    def damage(session: int, number: int, context: Any) -> Iterator[pb.ExchangeReply]:
        answer = reply(number)
        if session == 1:
            answer.targets.targets["logits"].CopyFrom(encode(torch.full((1, 1), 99.0), "float32"))
        elif session == 2:
            answer.ClearField("checksum")
        yield answer

    server.answer = damage
    exchange = connect(address)
    exchange.join(pb.JoinRequest(student="cnn"))
    exchange.send(contribution(3, 0))
    assert value(exchange.receive(3)) == 3.0
    assert server.sent == [(1, 3), (2, 3), (3, 3)]


def test_a_stream_that_stands_but_lost_the_contribution_is_left(script: tuple[Script, str], connect: Connect) -> None:
    """A damaged header can have the other side drop a message; no status tells, and pings are answered."""
    server, address = script
    server.answer = lambda session, number, _: iter([reply(number)] if session == 3 else [])
    exchange = connect(address, silence_after=0.5)
    exchange.join(pb.JoinRequest(student="cnn"))
    exchange.send(contribution(3, 0))
    started = time.monotonic()
    assert value(exchange.receive(3)) == 3.0
    assert 1.0 <= time.monotonic() - started < BOUND
    assert server.sent == [(1, 3), (2, 3), (3, 3)]


def test_a_server_that_sends_notices_is_not_left(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script

    def notices(session: int, number: int, context: Any) -> Iterator[pb.ExchangeReply]:
        for _ in range(10):
            time.sleep(0.1)
            yield sealed(pb.ExchangeReply(waiting=pb.Waiting(round=number, students=["mlp"], seconds=1)))
        yield reply(number)

    server.answer = notices
    exchange = connect(address, silence_after=0.6)
    exchange.join(pb.JoinRequest(student="cnn"))
    exchange.send(contribution(3, 0))
    assert value(exchange.receive(3)) == 3.0
    assert server.sent == [(1, 3)]


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.RESOURCE_EXHAUSTED]
)
def test_what_grpc_makes_of_damaged_bytes_passes(
    code: grpc.StatusCode, script: tuple[Script, str], connect: Connect
) -> None:
    server, address = script
    strange = {1, 2, 4, 5}

    def damage(session: int, number: int, context: Any) -> Iterator[pb.ExchangeReply]:
        if session in strange:
            context.abort(code, "frame of unknown type")
        yield reply(number)

    server.answer = damage
    exchange = connect(address)
    exchange.join(pb.JoinRequest(student="cnn"))
    for number in (3, 4):
        exchange.send(contribution(number, 0))
        assert value(exchange.receive(number)) == number
        if exchange._stream is not None:
            exchange._stream.cancel()
    exchange.close()
    strange |= set(range(100))
    again = connect(address)
    again.join(pb.JoinRequest(student="cnn"))
    again.send(contribution(5, 0))
    with pytest.raises(WorkerError, match="frame of unknown type") as ended:
        again.receive(5)
    assert ended.value.code is ExitCode.REFUSED, "but not for ever"


def test_what_is_sent_is_sealed(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script
    exchange = connect(address)
    exchange.join(pb.JoinRequest(student="cnn"))
    sent = contribution(3, 0)
    exchange.send(sent)
    exchange.receive(3)
    exchange.report(report(4, 4))
    exchange.leave(pb.LEAVE_REASON_FINISHED, "done")
    assert [each.checksum for each in server.contributions] == [
        pb.Contribution.FromString(seal(sent, "1")).checksum,
    ]
    for each in (*server.joins, *server.reports, *server.left):
        assert is_whole(each.SerializeToString())


def test_a_damaged_response_to_a_join_opens_no_session(script: tuple[Script, str], connect: Connect) -> None:
    """Another's session in it would have this student take the other's place."""
    server, address = script
    server.on_join = lambda number: pb.JoinResponse(session=number, run="script", checksum=1 if number == 1 else None)
    exchange = connect(address)
    assert exchange.join(pb.JoinRequest(student="cnn")).session == 2


def test_superseded_is_told_by_the_trailing_metadata(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script

    def supersede(session: int, number: int, context: Any) -> Iterator[pb.ExchangeReply]:
        context.set_trailing_metadata(((SUPERSEDED_KEY, "1"),))
        context.abort(grpc.StatusCode.ABORTED, "a newer worker is here")
        yield reply(number)

    server.answer = supersede
    exchange = connect(address)
    exchange.join(pb.JoinRequest())
    exchange.send(contribution(0, 0))
    with pytest.raises(WorkerError, match="a newer worker is here") as ended:
        exchange.receive(0)
    assert ended.value.code is ExitCode.SUPERSEDED
    assert len(server.joins) == 1


def test_a_server_that_breaks_every_stream_is_given_up(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script

    def never(session: int, number: int, context: Any) -> Iterator[pb.ExchangeReply]:
        context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        yield reply(number)

    server.answer = never
    exchange = connect(address, give_up_after=2)
    exchange.join(pb.JoinRequest())
    exchange.send(contribution(0, 0))
    started = time.monotonic()
    with pytest.raises(WorkerError, match="gave up after") as ended:
        exchange.receive(0)
    assert time.monotonic() - started < BOUND
    assert ended.value.code is ExitCode.GAVE_UP
    assert len(server.joins) < 12, "it paused between its attempts"


def test_a_server_that_never_answers_a_round_is_given_up(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script
    server.answer = lambda _session, _number, _context: iter(())
    exchange = connect(address, give_up_after=1)
    exchange.join(pb.JoinRequest())
    exchange.send(contribution(7, 0))
    started = time.monotonic()
    with pytest.raises(WorkerError, match="gave up after 1 s: round 7 still waits for the server"):
        exchange.receive(7)
    assert time.monotonic() - started < BOUND


def test_a_report_that_fails_goes_with_the_next(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script

    def fail_first(number: int, context: Any) -> None:
        if number == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "lost")

    server.on_report = fail_first
    exchange = connect(address)
    exchange.join(pb.JoinRequest())
    exchange.report(report(1, 1))
    wait_for(lambda: server.reports, "the first report")
    assert [each.round for each in exchange.undelivered()] == [1]
    exchange.leave(pb.LEAVE_REASON_STOPPED, "")
    assert exchange.undelivered() == []
    assert [[each.round for each in one.measurements] for one in server.reports] == [[1], [1]]
    assert [each.reason for each in server.left] == [pb.LEAVE_REASON_STOPPED]


def test_a_session_that_exchanges_nothing_outlives_what_grpc_makes_of_damage(
    script: tuple[Script, str], connect: Connect
) -> None:
    """Only its reports tell that the server is well in between."""
    server, address = script
    exchange = connect(address)
    exchange.join(pb.JoinRequest())
    for number in range(1, 9):
        exchange.report(report(number, number))
        wait_for(exchange._reports._call.done, "it has arrived")
        assert exchange._stream is not None
        exchange._stream.cancel()
        exchange._session.broke(Failure("INTERNAL", "frame of unknown type"), time.monotonic())
    exchange.leave(pb.LEAVE_REASON_FINISHED, "")
    assert len(server.left) == 1


def test_one_report_is_under_way_at_a_time_and_none_waits(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script
    go_on = threading.Event()
    server.on_report = lambda number, _: None if number > 1 else (go_on.wait(30), None)[1]
    exchange = connect(address)
    exchange.join(pb.JoinRequest())
    for number in range(1, 6):
        exchange.report(report(number, number, 10 + number))
    assert sorted(each.round for each in exchange.undelivered()) == [1, 2, 3, 4, 5, 11, 12, 13, 14, 15]
    go_on.set()
    exchange.leave(pb.LEAVE_REASON_FINISHED, "")
    assert [[each.round for each in one.measurements] for one in server.reports] == [
        [1, 11],
        [2, 12, 3, 13, 4, 14, 5, 15],
    ]
    assert server.reports[-1].round == 5, "of the state, the newest counts"


def test_a_goodbye_that_fails_is_said_again_in_a_new_session(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script

    def not_yet(number: int, context: Any) -> None:
        if number < 3:
            context.abort(grpc.StatusCode.UNAVAILABLE if number == 1 else grpc.StatusCode.ABORTED, "no")

    server.on_leave = not_yet
    exchange = connect(address)
    exchange.join(pb.JoinRequest())
    exchange.report(report(9, 9))
    exchange.leave(pb.LEAVE_REASON_FINISHED, "done")
    assert [each.session for each in server.left] == [1, 2, 3]
    assert [each.first_round for each in server.joins] == [0, 9, 9]
    assert len(server.reports) == 1


def test_a_goodbye_that_is_refused(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script
    server.on_leave = lambda _, context: context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no,\nnever")
    exchange = connect(address)
    exchange.join(pb.JoinRequest())
    with pytest.raises(WorkerError, match="refused: no, never") as ended:
        exchange.leave(pb.LEAVE_REASON_FINISHED, "")
    assert ended.value.code is ExitCode.REFUSED
    exchange.leave(pb.LEAVE_REASON_FAILED, "")  # logs, as there is nothing more to do


def test_another_grpc_server_is_not_taken_for_an_aggregation_server(connect: Connect) -> None:
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with pytest.raises(WorkerError) as ended:
            connect(f"127.0.0.1:{port}").join(pb.JoinRequest())
        server.stop(0).wait()
    assert ended.value.code is ExitCode.REFUSED
    assert f"server 127.0.0.1:{port} does not answer as an aggregation server (UNIMPLEMENTED" in str(ended.value)
    assert "check the address" in str(ended.value)


def test_join_comes_first(connect: Connect) -> None:
    exchange = connect("127.0.0.1:1")
    exchange.send(contribution(0, 0))
    with pytest.raises(RuntimeError, match="send and receive come after join"):
        exchange.receive(0)
