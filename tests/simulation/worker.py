"""A worker's process: the real session, and around it what the gRPC transport, the student's loop and the app do."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from codistill import PROTOCOL_VERSION
from codistill.config.fingerprint import identity_sha256
from codistill.peer.errors import Interrupted, PeerError
from codistill.peer.steps import CALL_SECONDS, Cancel, Done, Failure, Join, Leave, Listen, Pause, Send
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
_LEAVE_SLACK = 3 * CALL_SECONDS + _SLACK


@dataclass
class Disk:
    """A student's folder: the newest two checkpoints, as (step, state); the newest may be torn."""

    newest: tuple[int, bytes] | None = None
    previous: tuple[int, bytes] | None = None
    torn: bool = False


class Store:
    """The checkpoints as one process knows them; see :class:`codistill_worker.training.checkpoints.CheckpointStore`.

    They count steps. Every step of the simulation exchanges, so a step has the number of its round.
    """

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self._steps: list[int] = []
        self._torn = False

    @property
    def durable_step(self) -> int:
        return self._steps[0] if len(self._steps) > 1 else 0

    def load(self) -> tuple[int, bytes] | None:
        disk = self.disk
        self._torn = disk.torn
        good = [each for each in (None if disk.torn else disk.newest, disk.previous) if each is not None]
        self._steps = [step for step, _ in reversed(good)]
        return good[0] if good else None

    def save(self, step: int, state: bytes) -> bool:
        if self.disk.newest is not None and not self.disk.torn and self.disk.newest[0] > step:
            return False
        if self.disk.newest is not None and not self._torn:
            self.disk.previous = self.disk.newest
        self.disk.newest = step, state
        self.disk.torn = self._torn = False
        if not self._steps or self._steps[-1] != step:
            self._steps = [*self._steps[-1:], step]
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
        self.superseded = False
        self.stop = False
        self.doing: tuple[str, float, float] | None = None  # what, since when, how long it may
        self._paused_before = 0.0
        self.core = cluster.plant.session(
            "server:1", cluster.connect_timeout, cluster.give_up_after, cluster.silence_after
        )
        self.stream: Stream | None = None
        self._listening: Callable[[Any], None] | None = None
        self._request = pb.JoinRequest()
        self._open: pb.ExchangeRequest | None = None
        self._leave_request = pb.LeaveRequest()
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

    # The student's loop

    def _main(self) -> Generator[Arm, Any, None]:
        cluster, draw = self.cluster, self.cluster.draw
        found = self.store.load()
        self._saved = found[0] if found else -1
        round_number, state = found or (0, model.first_state(cluster.experiment.seed, self.student))
        yield sleep(cluster.kernel, draw.random() * cluster.load_seconds)
        try:
            try:
                yield from self._join(round_number)
            except Interrupted:
                self._exit(ExitCode.INTERRUPTED)
                return
            reported = cluster.kernel.now
            while round_number < cluster.rounds:
                if self.stop:
                    raise Interrupted
                yield sleep(cluster.kernel, draw.random() * cluster.step_seconds)
                self._send(model.contribution(round_number, state, held_out=cluster.experiment.data.held_out > 0))
                yield sleep(cluster.kernel, draw.random() * cluster.step_seconds / 2)
                targets = yield from self._receive(round_number)
                cluster.ledger.received(self.student, round_number, targets)
                state = model.learn(state, targets)
                round_number += 1
                if draw.random() < cluster.save_chance and round_number < cluster.rounds:
                    self._save(round_number, state)
                if cluster.kernel.now - reported >= 1.0:
                    reported = cluster.kernel.now
                    yield from self._report(round_number)
            self._save(round_number, state)
            yield from self._report(round_number)
            yield from self._leave(pb.LEAVE_REASON_FINISHED)
        except Interrupted:
            self._save(round_number, state)
            yield from self._report(round_number)
            yield from self._leave(pb.LEAVE_REASON_STOPPED)
            self._exit(ExitCode.INTERRUPTED)
            return
        except PeerError as error:
            if error.code in _STUDENT_IS_WELL:
                self._save(round_number, state)
            if error.code not in _SESSION_IS_OVER:
                yield from self._leave(pb.LEAVE_REASON_FAILED)
            self._exit(error.code, str(error))
            return
        cluster.ledger.finished(self.student, state)
        self._exit(ExitCode.OK)

    def _save(self, round_number: int, state: bytes) -> None:
        if self._saved != round_number and self.store.save(round_number, state):
            self._saved = round_number

    def _exit(self, code: ExitCode, line: str = "") -> None:
        self.doing = None
        self.code, self.line = code, line

    def _ended(self) -> None:
        if self.stream is not None:
            self.stream.worker_close()
        self.cluster.worker_ended(self)

    # The transport

    def _join(self, round_number: int) -> Generator[Arm, Any, None]:
        experiment = self.cluster.experiment
        self._request = pb.JoinRequest(
            protocol_version=PROTOCOL_VERSION,
            participant=self.student,
            experiment_sha256=identity_sha256(experiment),
            experiment_json=self.cluster.identity,
            data=pb.DataFingerprint(
                data_sha256=b"d", train_samples=model.BATCH * model.ROUNDS_PER_EPOCH, classes=model.CLASSES
            ),
            outputs={"logits": pb.Shape(dims=[experiment.data.class_count])},
            first_round=round_number,
            total_rounds=self.cluster.rounds,
            steps_trained=round_number,
            total_steps=self.cluster.rounds,
            worker_id=self.order,
        )
        self.core.join(round_number, self.cluster.kernel.now)
        yield from self._bounded("join", self.cluster.connect_timeout + _SLACK)

    def _send(self, contribution: pb.ExchangeRequest) -> None:
        self._open = contribution
        self.cluster.ledger.sent(self.student, contribution)
        if self.core.send(contribution.round) and self.stream is not None:
            self._put(self.stream, contribution)

    def _put(self, stream: Stream, contribution: pb.ExchangeRequest) -> None:
        stream.worker_send(append_checksum(contribution, str(stream.session_id)))

    def _receive(self, round_number: int) -> Generator[Arm, Any, pb.Targets]:
        self.core.receive(round_number, self.cluster.kernel.now)
        targets = yield from self._bounded(f"receive {round_number}", self.cluster.give_up_after + _SLACK)
        self._open = None
        return targets

    def _report(self, round_number: int) -> Generator[Arm, Any, None]:
        self._pending = pb.ReportRequest(
            steps_trained=round_number, round=round_number, durable_round=self.store.durable_step
        )
        self._request.steps_trained = round_number
        self.core.reached(round_number)
        if not self._active:
            if self.stop:
                return
            self.core.reconnect(self.cluster.kernel.now)
            yield from self._bounded("report", self.cluster.give_up_after + _SLACK)
        if not self._reporting:
            self._reporting = True
            request, self._pending = self._pending, None
            request.session_id = self.core.session_id

            def done(answer: Any) -> None:
                self._reporting = False
                if not isinstance(answer, Failure):
                    self.core.report_answered()
                elif self._pending is None:
                    self._pending = request

            self.cluster.call(self, "report", request, CALL_SECONDS)(done)

    def _leave(self, reason: pb.LeaveReason.ValueType) -> Generator[Arm, Any, None]:
        self._leave_request = pb.LeaveRequest(reason=reason, message="")
        finished = reason == pb.LEAVE_REASON_FINISHED
        self.core.leave(self.cluster.kernel.now, finished=finished, active=self._active)
        yield from self._bounded("leave", self.cluster.give_up_after + _LEAVE_SLACK)

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
                case Done():
                    return None
                case Pause():
                    yield sleep(kernel, step.seconds)
                case Join():
                    self._check_stop()
                    if self.superseded:
                        raise Violation(f"{self.student} joins again although it is superseded")
                    self._request.first_round = step.first_round
                    self._request.session_id = step.session_id
                    request = pb.JoinRequest()
                    request.CopyFrom(self._request)
                    answer = yield self.cluster.call(self, "join", request, step.timeout)
                    if isinstance(answer, Failure):
                        self.core.join_failed(answer, kernel.now)
                    else:
                        self._open_stream(answer.session_id)
                        self.core.joined(answer.session_id)
                case Send():
                    if self.stream is not None and self._open is not None:
                        self._put(self.stream, self._open)
                case Listen():
                    item = yield from self._listen(step.seconds)
                    if item is None:
                        self._check_stop()
                        self.core.silence(kernel.now)
                    elif isinstance(item, Failure):
                        self._check_stop()
                        self._broke(item)
                    elif item.HasField("waiting"):
                        self._check_stop()
                        self.core.waiting(item.waiting.round, item.waiting.participants, kernel.now)
                    elif self.core.targets(item.targets.round, kernel.now):
                        return item.targets
                case Cancel():
                    self._broke(self._cancel_stream())
                case Leave():
                    yield from self._call_leave()

    def _open_stream(self, session_id: int) -> None:
        stream = self.stream = Stream(self.link, session_id)
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
            return pb.ExchangeResponse.FromString(item)
        return item

    def _broke(self, failure: Failure) -> None:
        if self.stream is not None:
            self.stream.worker_close()
            self.stream = None
        self.cluster.kernel.note(f"{self.student}: its stream broke: {failure.code} {failure.details[:60]}")
        self.superseded |= failure.superseded
        self.core.broke(failure, self.cluster.kernel.now)

    def _cancel_stream(self) -> Failure:
        stream = self.stream
        if stream is None:
            return Failure("UNAVAILABLE", "the server ended the stream")
        stream.worker_close()
        while stream.inbox:
            item = stream.read()
            if isinstance(item, Failure):
                return item
        return Failure("CANCELLED", "Locally cancelled by application!")

    def _call_leave(self) -> Generator[Arm, Any, None]:
        waited = 0.0
        while self._reporting and waited < CALL_SECONDS:
            yield sleep(self.cluster.kernel, 0.5)
            waited += 0.5
        if self._pending is not None:
            self._pending.session_id = self.core.session_id
            answer = yield self.cluster.call(self, "report", self._pending, CALL_SECONDS)
            if isinstance(answer, Failure):
                self.core.leave_failed(answer, self.cluster.kernel.now)
                return
            self._pending = None
        self._leave_request.session_id = self.core.session_id
        request = pb.LeaveRequest()
        request.CopyFrom(self._leave_request)
        answer = yield self.cluster.call(self, "leave", request, CALL_SECONDS)
        if isinstance(answer, Failure):
            self.core.leave_failed(answer, self.cluster.kernel.now)
        else:
            self.core.left()

    def _check_stop(self) -> None:
        if self.stop:
            raise Interrupted
