"""The server's process: the real coordinator on the real journal, and around them what the gRPC service does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from codistill.peer.steps import Failure
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.checksum import verify_checksum
from codistill_server.coordinator import Coordinator
from codistill_server.errors import RequestRejected
from codistill_server.observability.state import RunState
from codistill_server.rounds.actions import Decide, Status
from codistill_server.rounds.events import ParticipantRecord
from codistill_server.rounds.machine import ParticipantState
from codistill_server.storage.journal import ClosedRound, Journal
from simulation.model import Violation
from simulation.network import CLIENT_KEEPALIVE, Stream

if TYPE_CHECKING:
    from simulation.cluster import Cluster

__all__ = ["Crash", "DiskJournal", "Outbox", "Server"]

_T = TypeVar("_T")
_STREAM_GRACE = 30.0
_TICK = 1.0
_CODES = {
    Status.ABORTED: "ABORTED",
    Status.SUPERSEDED: "ABORTED",
    Status.FAILED_PRECONDITION: "FAILED_PRECONDITION",
    Status.INVALID_ARGUMENT: "INVALID_ARGUMENT",
}


class Crash(BaseException):
    """The server's process is killed at this very instant."""


def failure(refused: RequestRejected) -> Failure:
    return Failure(_CODES[refused.status], str(refused), refused.status is Status.SUPERSEDED)


class DiskJournal(Journal):
    """The real journal; the process may be killed before and after each of its transactions, which a crash keeps whole."""

    def __init__(self, cluster: Cluster, identity: str) -> None:
        super().__init__(None, identity)
        self.cluster = cluster

    def append(self, closed: ClosedRound) -> None:
        self.cluster.server.burn()
        super().append(closed)
        self.cluster.ledger.journalled(closed.round, closed.replies)
        self.cluster.kernel.note(f"server: round {closed.round} is journalled")
        self.cluster.server.burn()

    def remember(self, record: ParticipantRecord) -> None:
        self.cluster.server.burn()
        super().remember(record)
        self.cluster.server.burn()

    def settle(self, key: str, value: str) -> None:
        self.cluster.server.burn()
        super().settle(key, value)
        self.cluster.server.burn()

    def forget(self, before: int) -> None:
        self.cluster.server.burn()
        super().forget(before)
        self.cluster.server.burn()

    def close(self) -> None:
        """Nothing: the file outlives the process."""

    def throw_away(self) -> None:
        super().close()


class Outbox:
    """A session's stream at the server."""

    def __init__(self, server: Server, stream: Stream) -> None:
        self.server, self.stream, self.ending = server, stream, False

    def reply(self, reply: bytes) -> None:
        self.server.burn()
        message = pb.ExchangeResponse.FromString(reply)
        if message.HasField("targets"):
            self.server.cluster.ledger.answered(self.stream.session_id, message.targets.round, reply)
        if not self.ending and not self.stream.server_reply(reply):
            self.end(Status.ABORTED, "replies lie unread")

    def end(self, status: Status, message: str) -> None:
        if not self.ending:
            self.ending = True
            self.server.later(lambda: self.server.end_stream(self, failure(RequestRejected(status, message))))


class Server:
    """One machine on which the server's process runs, dies, is stopped, and is started again."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.up = False
        self.complete = False
        self.paused = False
        self.fuse: int | None = None
        self.generation = 0
        self.coordinator: Coordinator | None = None
        self._outboxes: dict[Outbox, None] = {}  # in order, so that a seed is always the same
        self._backlog: list[Callable[[], None]] = []

    # The process

    def start(self) -> None:
        if self.up or self.complete:
            return
        self.up = True
        self.generation += 1
        generation = self.generation
        cluster = self.cluster
        cluster.kernel.note("server: starts")
        run_state = RunState(cluster.experiment, lambda _: None, cluster.kernel.clock, cluster.kernel.clock)
        try:
            coordinator = self.coordinator = cluster.plant.coordinator(
                cluster.experiment, cluster.journal, run_state, self._submit, cluster.kernel.clock
            )
        except Crash:
            self.crash()
            return
        decide = coordinator._decide

        def watched(action: Decide) -> None:
            cluster.ledger.decided(action.round, tuple(action.contributions))
            cluster.decided(action)
            decide(action)

        coordinator._decide = watched
        coordinator.on_complete = self._complete
        if coordinator.complete:
            self._complete()

        def tick() -> None:
            if self.generation == generation and self.up:
                self.take(lambda: self._with(lambda each: each.tick()))
                cluster.kernel.after(_TICK, tick)

        cluster.kernel.after(_TICK, tick)

    def burn(self) -> None:
        """One more instant at which the process may be killed."""
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse <= 0:
                self.fuse = None
                raise Crash

    def crash(self, *, silently: bool = False) -> None:
        """SIGKILL; `silently`: the machine goes down, and nobody is told."""
        if not self.up:
            return
        self.cluster.kernel.note(f"server: killed{' with its machine' if silently else ''}")
        self._gone()
        for stream in self.cluster.streams:
            if stream.server_open:
                stream.die()
                unnoticed = self.cluster.draw.random() * CLIENT_KEEPALIVE
                when = self.cluster.kernel.now + unnoticed if silently else stream.link.arrival()
                self.cluster.kernel.at(when, stream.worker_lost)
        self._outboxes.clear()
        self.cluster.server_died()

    def terminate(self) -> None:
        """SIGTERM."""
        if not self.up:
            return
        self.cluster.kernel.note("server: ends in good order")
        for outbox in list(self._outboxes):
            self.end_stream(outbox, Failure("UNAVAILABLE", "the server is going down; try again until it is back"))
        if self.coordinator is not None:
            self.coordinator.close()
        self._gone()
        self._outboxes.clear()
        self.cluster.server_died()

    def pause(self) -> None:
        self.paused = True

    def go_on(self) -> None:
        self.paused = False
        backlog, self._backlog = self._backlog, []
        for work in backlog:
            work()

    def take(self, work: Callable[[], None]) -> None:
        """Do what a message asks for, or put it off while the process is stopped."""
        if self.paused:
            self._backlog.append(lambda: self.take(work))
            return
        try:
            work()
        except Crash:
            self.crash()
        self._check_memory()

    def later(self, work: Callable[[], None]) -> None:
        generation = self.generation
        self.cluster.kernel.after(
            0, lambda: self.take(lambda: work() if self.up and self.generation == generation else None)
        )

    def _gone(self) -> None:
        self.up = False
        self.coordinator = None
        self.fuse = None
        self.paused = False
        self._backlog.clear()

    def _complete(self) -> None:
        self.cluster.kernel.note("server: the run is complete")
        self.complete = True
        # Calls under way are answered; then it ends.
        self.cluster.kernel.after(1.0, self.terminate)

    def _submit(self, work: Callable[[], _T], done: Callable[[_T], None], *, heavy: bool) -> None:
        del heavy
        if not self.cluster.slow_targets:
            done(work())
            return
        generation = self.generation
        self.cluster.kernel.after(
            self.cluster.draw.random() * 0.2,
            lambda: self.take(lambda: done(work()) if self.up and self.generation == generation else None),
        )

    def _with(self, work: Callable[[Coordinator], None]) -> None:
        if self.coordinator is not None:
            work(self.coordinator)

    # The rpcs

    def call(self, kind: str, request: Any, answer: Callable[[Any], None]) -> None:
        """Carry out a unary call."""
        coordinator = self.coordinator
        if coordinator is None:
            answer(Failure("UNAVAILABLE", "connection refused"))
            return
        try:
            match kind:
                case "join":
                    response = coordinator.join(request)
                    self.cluster.ledger.admitted(response.session_id, request.participant)
                    self.cluster.kernel.after(_STREAM_GRACE, lambda: self._expect(response.session_id))
                    answer(response)
                case "report":
                    answer(coordinator.report(request) or pb.ReportResponse())
                case _:
                    participant = coordinator.participant_of(request.session_id)
                    coordinator.leave(request)
                    self._check_end(participant)
                    answer(pb.LeaveResponse())
        except RequestRejected as refused:
            answer(failure(refused))
        except Crash:
            answer(Failure("UNAVAILABLE", "connection reset by peer"))
            raise

    def open_stream(self, stream: Stream) -> None:
        outbox = Outbox(self, stream)
        coordinator = self.coordinator
        if coordinator is None or not stream.server_open:
            stream.die()
            self.cluster.kernel.at(stream.link.arrival(), stream.worker_lost)
            return
        self._outboxes[outbox] = None
        try:
            coordinator.open_stream(stream.session_id, outbox)
        except RequestRejected as refused:
            self.end_stream(outbox, failure(refused))
            return

    def message(self, stream: Stream, raw: bytes) -> None:
        outbox = self._outbox_of(stream)
        if self.coordinator is None or outbox is None or outbox.ending:
            return
        try:
            if not verify_checksum(raw, str(stream.session_id)):
                self.coordinator.reject_damaged(stream.session_id, "a contribution was damaged on the way")
                raise RequestRejected(Status.ABORTED, "a contribution was damaged on the way; join again")
            self.coordinator.contribute(stream.session_id, pb.ExchangeRequest.FromString(raw), len(raw))
        except RequestRejected as refused:
            outbox.end(refused.status, str(refused))

    def close_stream(self, stream: Stream) -> None:
        outbox = self._outbox_of(stream)
        if outbox is not None:
            self._closed(outbox)

    def end_stream(self, outbox: Outbox, why: Failure) -> None:
        self._closed(outbox)
        outbox.stream.server_close(why)

    def _outbox_of(self, stream: Stream) -> Outbox | None:
        return next((each for each in self._outboxes if each.stream is stream), None)

    def _closed(self, outbox: Outbox) -> None:
        self._outboxes.pop(outbox, None)
        self._with(lambda each: each.close_stream(outbox.stream.session_id, outbox))

    def _expect(self, session_id: int) -> None:
        self.take(lambda: self._with(lambda each: each.expect_stream(session_id)))

    def _check_end(self, participant: str | None) -> None:
        """Nobody has finished while rounds are open: the others would stop waiting for it."""
        coordinator, rounds = self.coordinator, self.cluster.rounds
        if coordinator is None or participant is None or coordinator.frontier == rounds:
            return
        if coordinator.states[participant] is ParticipantState.FINISHED:
            raise Violation(f"{participant} has finished with {coordinator.frontier} of {rounds} rounds closed")

    def _check_memory(self) -> None:
        if self.coordinator is None:
            return
        core, count = self.coordinator._rounds, len(self.cluster.experiment.names)
        sizes = {
            "sessions": len(core._sessions),
            "contributions": len(core._open_round.contributions),
            "waiters": len(core._open_round.waiters),
            "outboxes": len(self.coordinator._outboxes),
        }
        for what, size in sizes.items():
            if size > count:
                raise Violation(f"the server holds {size} {what} for {count} participants")
        if len(self.coordinator._recent) > 4:
            raise Violation(f"the server holds {len(self.coordinator._recent)} recent rounds")
