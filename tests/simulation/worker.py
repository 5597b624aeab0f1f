"""A worker's process: the real session core, and around it what client.py, learner.py and app.py do."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from codistill import PROTOCOL_VERSION
from codistill.peer import session as core
from codistill.peer.errors import Interrupted, PeerError
from codistill.peer.session import Failure
from codistill.process.exit_codes import ExitCode
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.checksum import append_checksum, verify_checksum
from simulation import model
from simulation.kernel import Arm, Process, sleep
from simulation.model import Violation
from simulation.network import Link, Stream

if TYPE_CHECKING:
    from simulation.cluster import Cluster

__all__ = ["Disk", "Store", "Worker"]

_SESSION_IS_OVER = (ExitCode.UNREACHABLE, ExitCode.SUPERSEDED, ExitCode.REFUSED)
_STUDENT_IS_WELL = (ExitCode.UNREACHABLE, ExitCode.GAVE_UP)
_SLACK = 5.0
_GOODBYE_SLACK = 3 * core.CALL_SECONDS + _SLACK


@dataclass
class Disk:
    """A student's folder: the newest two checkpoints, as (round, state); the newest may be torn."""

    newest: tuple[int, bytes] | None = None
    previous: tuple[int, bytes] | None = None
    torn: bool = False


class Store:
    """The checkpoints as one process knows them; see :class:`codistill_worker.training.checkpoints.CheckpointStore`."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self._rounds: list[int] = []
        self._torn = False

    @property
    def durable_round(self) -> int:
        return self._rounds[0] if len(self._rounds) > 1 else 0

    def load(self) -> tuple[int, bytes] | None:
        disk = self.disk
        self._torn = disk.torn
        good = [each for each in (None if disk.torn else disk.newest, disk.previous) if each is not None]
        self._rounds = [number for number, _ in reversed(good)]
        return good[0] if good else None

    def save(self, number: int, state: bytes) -> bool:
        if self.disk.newest is not None and not self.disk.torn and self.disk.newest[0] > number:
            return False
        if self.disk.newest is not None and not self._torn:
            self.disk.previous = self.disk.newest
        self.disk.newest = number, state
        self.disk.torn = self._torn = False
        if not self._rounds or self._rounds[-1] != number:
            self._rounds = [*self._rounds[-1:], number]
        return True


class Worker:
    """One process of one student."""

    def __init__(self, cluster: Cluster, student: str, link: Link, disk: Disk) -> None:
        self.cluster, self.student, self.link, self.disk = cluster, student, link, disk
        self.code: ExitCode | None = None
        self.line = ""
        self.overlapped = False
        self.order = 0
        self.turn = 0
        self.rivals = 0
        self.told_superseded = False
        self.stop = False
        self.doing: tuple[str, float, float] | None = None  # what, since when, how long it may
        self._paused_before = 0.0
        self.core = cluster.plant.session(
            "server:1", cluster.connect_timeout, cluster.give_up_after, cluster.silence_after
        )
        self.stream: Stream | None = None
        self._listening: Callable[[Any], None] | None = None
        self._request = pb.JoinRequest()
        self._open: pb.Contribution | None = None
        self._goodbye = pb.LeaveRequest()
        self._reporting = False
        self._pending: pb.ReportRequest | None = None
        self.store = cluster.plant.store(disk)
        self._saved = -1
        self.process = Process(cluster.kernel, self._main(), self._ended)

    @property
    def alive(self) -> bool:
        return self.process.alive

    # From outside

    def kill(self, *, silently: bool = False) -> None:
        if self.alive:
            self.process.kill()
            if self.stream is not None:
                self.stream.worker_close(silently=silently)

    def ask_to_stop(self) -> None:
        self.stop = True
        if self._listening is not None:
            self.process.wake()

    def check_bound(self) -> None:
        """Nothing waits for longer than it may, the time that it was stopped apart."""
        if self.doing is None or not self.alive or self.process.paused:
            return
        what, since, limit = self.doing
        waited = self.cluster.kernel.now - since - (self.process.paused_seconds - self._paused_before)
        if waited > limit:
            raise Violation(f"{self.student} waits in {what} for {waited:.1f} s; the bound is {limit:.1f} s")

    # The learner

    def _main(self) -> Generator[Arm, Any, None]:
        cluster, draw = self.cluster, self.cluster.draw
        found = self.store.load()
        self._saved = found[0] if found else -1
        number, state = found or (0, model.first_state(cluster.experiment.seed, self.student))
        yield sleep(cluster.kernel, draw.random() * cluster.load_seconds)
        try:
            try:
                yield from self._join(number)
            except Interrupted:
                self._exit(ExitCode.INTERRUPTED)
                return
            reported = cluster.kernel.now
            while number < cluster.rounds:
                if self.stop:
                    raise Interrupted
                yield sleep(cluster.kernel, draw.random() * cluster.step_seconds)
                self._send(model.contribution(number, state, held_out=cluster.experiment.data.held_out > 0))
                yield sleep(cluster.kernel, draw.random() * cluster.step_seconds / 2)
                targets = yield from self._receive(number)
                cluster.ledger.received(self.student, number, targets)
                state = model.learn(state, targets)
                number += 1
                if draw.random() < cluster.save_chance and number < cluster.rounds:
                    self._save(number, state)
                if cluster.kernel.now - reported >= 1.0:
                    reported = cluster.kernel.now
                    yield from self._report(number)
            self._save(number, state)
            yield from self._report(number)
            yield from self._leave(pb.LEAVE_REASON_FINISHED)
        except Interrupted:
            self._save(number, state)
            yield from self._report(number)
            yield from self._leave(pb.LEAVE_REASON_STOPPED)
            self._exit(ExitCode.INTERRUPTED)
            return
        except PeerError as error:
            if error.code in _STUDENT_IS_WELL:
                self._save(number, state)
            if error.code not in _SESSION_IS_OVER:
                yield from self._leave(pb.LEAVE_REASON_FAILED)
            self._exit(error.code, str(error))
            return
        cluster.ledger.finished(self.student, state)
        self._exit(ExitCode.OK)

    def _save(self, number: int, state: bytes) -> None:
        if self._saved != number and self.store.save(number, state):
            self._saved = number

    def _exit(self, code: ExitCode, line: str = "") -> None:
        self.doing = None
        self.code, self.line = code, line

    def _ended(self) -> None:
        if self.stream is not None:
            self.stream.worker_close()
        self.cluster.worker_ended(self)

    # The exchange

    def _join(self, number: int) -> Generator[Arm, Any, None]:
        experiment = self.cluster.experiment
        self._request = pb.JoinRequest(
            protocol_version=PROTOCOL_VERSION,
            student=self.student,
            experiment=self.cluster.identity,
            data=pb.DataFingerprint(
                digest="d", train_samples=model.BATCH * model.ROUNDS_PER_EPOCH, classes=model.CLASSES
            ),
            outputs={"logits": pb.Shape(dims=[experiment.data.class_count])},
            first_round=number,
            total_rounds=self.cluster.rounds,
            worker=self.order,
        )
        self.core.join(number, self.cluster.kernel.now)
        yield from self._bounded("join", self.cluster.connect_timeout + _SLACK)

    def _send(self, contribution: pb.Contribution) -> None:
        self._open = contribution
        self.cluster.ledger.sent(self.student, contribution)
        if self.core.send(contribution.round) and self.stream is not None:
            self._put(self.stream, contribution)

    def _put(self, stream: Stream, contribution: pb.Contribution) -> None:
        stream.worker_send(append_checksum(contribution, str(stream.session)))

    def _receive(self, number: int) -> Generator[Arm, Any, pb.Targets]:
        self.core.receive(number, self.cluster.kernel.now)
        targets = yield from self._bounded(f"receive {number}", self.cluster.give_up_after + _SLACK)
        self._open = None
        return targets

    def _report(self, number: int) -> Generator[Arm, Any, None]:
        self._pending = pb.ReportRequest(round=number, durable_round=self.store.durable_round)
        self.core.reached(number)
        if not self._active:
            if self.stop:
                return
            self.core.mend(self.cluster.kernel.now)
            yield from self._bounded("report", self.cluster.give_up_after + _SLACK)
        if not self._reporting:
            self._reporting = True
            request, self._pending = self._pending, None
            request.session = self.core.number

            def done(answer: Any) -> None:
                self._reporting = False
                if not isinstance(answer, Failure):
                    self.core.answered()
                elif self._pending is None:
                    self._pending = request

            self.cluster.call(self, "report", request, core.CALL_SECONDS)(done)

    def _leave(self, reason: pb.LeaveReason.ValueType) -> Generator[Arm, Any, None]:
        self._goodbye = pb.LeaveRequest(reason=reason, message="")
        finished = reason == pb.LEAVE_REASON_FINISHED
        self.core.leave(self.cluster.kernel.now, finished=finished, active=self._active)
        yield from self._bounded("leave", self.cluster.give_up_after + _GOODBYE_SLACK)

    @property
    def _active(self) -> bool:
        return self.stream is not None and self.stream.worker_open

    def _bounded(self, what: str, limit: float) -> Generator[Arm, Any, Any]:
        self.doing = what, self.cluster.kernel.now, limit
        self._paused_before = self.process.paused_seconds
        result = yield from self._carry_out()
        self.check_bound()
        self.doing = None
        return result

    def _carry_out(self) -> Generator[Arm, Any, Any]:
        kernel = self.cluster.kernel
        while True:
            step = self.core.step(kernel.now, self.cluster.draw.random())
            match step:
                case core.Done():
                    return None
                case core.Pause():
                    yield sleep(kernel, step.seconds)
                case core.Join():
                    self._check_stop()
                    if self.told_superseded:
                        raise Violation(f"{self.student} joins again although it was told that it is superseded")
                    self._request.first_round = step.first_round
                    self._request.session = step.session
                    request = pb.JoinRequest()
                    request.CopyFrom(self._request)
                    answer = yield self.cluster.call(self, "join", request, step.timeout)
                    if isinstance(answer, Failure):
                        self.core.join_failed(answer, kernel.now)
                    else:
                        self._open_stream(answer.session)
                        self.core.joined(answer.session)
                case core.Send():
                    if self.stream is not None and self._open is not None:
                        self._put(self.stream, self._open)
                case core.Listen():
                    item = yield from self._listen(step.seconds)
                    if item is None:
                        self._check_stop()
                        self.core.silence(kernel.now)
                    elif isinstance(item, Failure):
                        self._check_stop()
                        self._broke(item)
                    elif item.HasField("waiting"):
                        self._check_stop()
                        self.core.waiting(item.waiting.round, item.waiting.students, kernel.now)
                    elif self.core.targets(item.targets.round, kernel.now):
                        return item.targets
                case core.HangUp():
                    self._broke(self._hang_up())
                case core.Goodbye():
                    yield from self._say_goodbye()

    def _open_stream(self, session: int) -> None:
        stream = self.stream = Stream(self.link, session)
        server = self.cluster.server
        stream.on_arrival = self._arrived
        stream.on_message = lambda message: server.take(lambda: server.message(stream, message))
        stream.on_closed = lambda: server.take(lambda: server.close_stream(stream))
        stream.worker_open_it(lambda: server.take(lambda: server.open_stream(stream)))
        self.cluster.watch(stream)

    def _arrived(self) -> None:
        if self._listening is not None and self.stream is not None and self.stream.inbox:
            resume, self._listening = self._listening, None
            resume(None)

    def _listen(self, seconds: float) -> Generator[Arm, Any, Any]:
        # A message is taken when the process runs, not when it arrives: the process may be stopped, or killed first.
        stream = self.stream
        if stream is not None and not stream.inbox:

            def arm(resume: Callable[[Any], None]) -> None:
                self._listening = resume
                self.cluster.kernel.after(seconds, lambda: resume(None))

            yield arm
            self._listening = None
        item = stream.read() if stream is not None and stream.inbox else None
        if isinstance(item, bytes):
            if not verify_checksum(item):
                return Failure("UNAVAILABLE", "a reply was damaged on the way", damaged=True)
            return pb.ExchangeReply.FromString(item)
        return item

    def _broke(self, failure: Failure) -> None:
        if self.stream is not None:
            self.stream.worker_close()
            self.stream = None
        self.cluster.kernel.note(f"{self.student}: its stream broke: {failure.code} {failure.details[:60]}")
        self.told_superseded |= failure.superseded
        self.core.broke(failure, self.cluster.kernel.now)

    def _hang_up(self) -> Failure:
        stream = self.stream
        if stream is None:
            return Failure("UNAVAILABLE", "the server ended the stream")
        stream.worker_close()
        while stream.inbox:
            item = stream.read()
            if isinstance(item, Failure):
                return item
        return Failure("CANCELLED", "Locally cancelled by application!")

    def _say_goodbye(self) -> Generator[Arm, Any, None]:
        waited = 0.0
        while self._reporting and waited < core.CALL_SECONDS:
            yield sleep(self.cluster.kernel, 0.5)
            waited += 0.5
        if self._pending is not None:
            self._pending.session = self.core.number
            answer = yield self.cluster.call(self, "report", self._pending, core.CALL_SECONDS)
            if isinstance(answer, Failure):
                self.core.goodbye_failed(answer, self.cluster.kernel.now)
                return
            self._pending = None
        self._goodbye.session = self.core.number
        request = pb.LeaveRequest()
        request.CopyFrom(self._goodbye)
        answer = yield self.cluster.call(self, "leave", request, core.CALL_SECONDS)
        if isinstance(answer, Failure):
            self.core.goodbye_failed(answer, self.cluster.kernel.now)
        else:
            self.core.left()

    def _check_stop(self) -> None:
        if self.stop:
            raise Interrupted
