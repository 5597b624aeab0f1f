"""One run's aggregation server without a socket.

The coordinator checks messages, drives the rounds' state machine, carries out its actions (targets, journal, answers)
and feeds the observations. It knows no gRPC, no thread and no event loop: the gRPC service and the in-process loop
both stand on it, which is why they give the same bits.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, cast

import torch

from codistill import PROTOCOL_VERSION
from codistill.checksums import seal
from codistill.experiment import Experiment
from codistill.identity import difference, identity
from codistill.rhythm import Rhythm
from codistill.tensors import TensorError, check, decode, encode, encoded_size
from codistill.v1 import distillation_pb2 as pb
from codistill_server import methods
from codistill_server.absence import Absence
from codistill_server.journal import ClosedRound, Journal
from codistill_server.observations import Observations
from codistill_server.round_events import (
    Absent,
    Admit,
    Answer,
    Complete,
    Contribute,
    Contribution,
    Decide,
    Decided,
    Disconnect,
    End,
    Event,
    Forget,
    Join,
    Leave,
    LeaveReason,
    Notify,
    Presence,
    Progress,
    Refuse,
    Remember,
    Returned,
    Samples,
    Status,
    Tick,
)
from codistill_server.rounds import Rounds, Rules

__all__ = ["Coordinator", "Outbox", "Refused", "Submit", "receive_limit", "run_inline"]

_log = logging.getLogger(__name__)
_RECENT_ROUNDS = 4
_LARGEST_LOGIT = 1e30  # what the ensembles compute with; sums and differences stay finite in float32
_LARGEST_ROUND = 2**53  # what JSON, the journal's 64-bit integers and float metrics all hold exactly
_LONGEST_DEVICE = 200  # it is in the run's events, which GetRun sends all together
_LONGEST_REFUSAL = 500  # a status travels percent-encoded in HTTP/2 headers, which gRPC limits to 8 KiB
_T = TypeVar("_T")

_LEAVE_REASONS = {
    pb.LEAVE_REASON_FINISHED: LeaveReason.FINISHED,
    pb.LEAVE_REASON_STOPPED: LeaveReason.STOPPED,
    pb.LEAVE_REASON_FAILED: LeaveReason.FAILED,
}


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """A call is turned away; `status` says how, the text why and what to do."""

    def __init__(self, status: Status, message: str) -> None:
        self.status = status
        super().__init__(message if len(message) <= _LONGEST_REFUSAL else f"{message[: _LONGEST_REFUSAL - 3]}...")


class Outbox(Protocol):
    """Where the coordinator puts what a session is to receive. Neither call may block."""

    def reply(self, reply: bytes) -> None:
        """Sends an ``ExchangeReply``, serialised and sealed."""
        ...

    def end(self, status: Status, message: str) -> None:
        """Ends the session's stream."""
        ...


class Submit(Protocol):
    """Runs work that may take milliseconds and hands its result to `done`, on the coordinator's own thread."""

    def __call__(self, work: Callable[[], _T], done: Callable[[_T], None], *, heavy: bool) -> None:
        """Runs `work`, beside the event loop if it is heavy and there is one."""
        ...


def run_inline(work: Callable[[], _T], done: Callable[[_T], None], *, heavy: bool) -> None:  # noqa: ARG001
    """Runs the work at once: what :class:`Submit` is where there is no event loop."""
    done(work())


@dataclass(frozen=True)
class _Payload:
    """A contribution's decoded outputs."""

    outputs: Mapping[str, torch.Tensor]
    labels: torch.Tensor
    held_out: Mapping[str, torch.Tensor]
    held_out_labels: torch.Tensor | None


def receive_limit(experiment: Experiment) -> int:
    """Returns the size in bytes of the largest message that an experiment can need.

    That is a contribution with its held-out samples and the largest outputs that the method takes, or a join with the
    experiment's identity, and 64 KiB on top for names and lengths.
    """
    half = methods.create(experiment.distillation)
    classes, dtype = experiment.data.class_count, experiment.exchange.dtype
    samples = [experiment.training.batch_size]
    if experiment.data.held_out:
        samples.append(experiment.data.held_out)

    def contribution(outputs: Mapping[str, methods.Output]) -> int:
        shapes = [each.largest(classes) for each in outputs.values()]
        return sum(
            2 * encoded_size([size], "int64") + sum(encoded_size([size, *shape], dtype) for shape in shapes)
            for size in samples
        )

    published = (half.student, half.teacher if experiment.teachers else {}) if half is not None else ()
    return max(*map(contribution, published), len(identity(experiment)), 0) + 65536


class Coordinator:
    """The server of one run. All calls come from one thread.

    Args:
        experiment: the run's experiment.
        journal: its journal, of the same experiment.
        observations: what shows the run to the outside.
        submit: how work that takes time is run.
        clock: seconds that never go back.

    Attributes:
        on_complete: called when every student has finished; again if one joined again meanwhile.
    """

    def __init__(
        self,
        experiment: Experiment,
        journal: Journal,
        observations: Observations,
        submit: Submit = run_inline,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.experiment = experiment
        self.observations = observations
        self.on_complete: Callable[[], None] = lambda: None
        self._identity = identity(experiment)
        self._journal = journal
        self._submit = submit
        self._clock = clock
        self._half = methods.create(experiment.distillation, experiment.names, experiment.teacher_names)
        self._state: Mapping[str, torch.Tensor] = _load_state(journal.last_state())
        self._settled: Mapping[str, int | str] = json.loads(journal.settled("data") or "{}")
        self._classes = experiment.data.class_count
        self._dtype = experiment.exchange.dtype
        self._teachers = frozenset(experiment.teacher_names)
        self._rhythm = self._rhythm_with(int(self._settled.get("data.train_samples", 0)))
        self._shapes: dict[str, Mapping[str, list[int]]] = {}
        self._outboxes: dict[int, Outbox] = {}
        self._recent: OrderedDict[int, ClosedRound] = OrderedDict()
        restored = journal.restore()
        rules = Rules(
            students=experiment.participants,
            exchanges=experiment.distillation.exchanges,
            waiting_notice=experiment.exchange.waiting_notice,
            keep_all=experiment.exchange.journal.keep == "all",
            absence=_absence(experiment),
        )
        self._keep_all = rules.keep_all
        self._rounds = Rounds(rules, restored)
        for record in restored.students:
            if record.student in observations.students:
                view = observations.students[record.student]
                view.durable_round = view.round = self._rhythm.round(record.durable_round)
        if restored.frontier:
            oldest, newest = self._rhythm.round(restored.oldest), self._rhythm.round(restored.frontier - 1)
            observations.event("resumed", message=f"the journal holds rounds {oldest} to {newest}")

    @property
    def complete(self) -> bool:
        """Whether every student has finished."""
        return self._rounds.complete

    @property
    def presence(self) -> Mapping[str, Presence]:
        """Where each student stands."""
        return self._rounds.presence

    @property
    def frontier(self) -> int:
        """The first round that exchanges and is not closed."""
        return self._rhythm.round(self._rounds.frontier)

    def join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        """Opens a session.

        Raises:
            Refused: something differs from the run; the text names the field and both values.
        """
        try:
            self._check_join(request)
            rhythm = self._rhythm_with(request.data.train_samples)
            # A teacher learns nothing, so it needs no round that is closed.
            taught = request.student not in self._teachers
            first = rhythm.exchanges_before(request.first_round) if taught else self._rounds.frontier
            admitted = self._apply(Join(request.student, first, request.worker, request.session))
        except Refused as refused:
            who = request.student if request.student in self._rounds.presence else ""
            self.observations.refusal("refused", who, str(refused))
            raise
        assert admitted is not None  # noqa: S101 - a join is either refused or admitted
        self._settle(request)
        self._rhythm = rhythm
        request.device = _printable(request.device[:_LONGEST_DEVICE])
        self.observations.joined(request)
        where = f" on {request.device}" if request.device else ""
        again = f", from round {request.first_round}" if request.first_round else ""
        self.observations.event("joined", request.student, f"joined{where}{again}")
        return pb.JoinResponse(
            session=admitted.session, frontier=rhythm.round(admitted.frontier), run=self.experiment.name
        )

    def student_of(self, session: int) -> str | None:
        """Returns whose session this is, or None if it is over or never was."""
        return self._rounds.student_of(session)

    def open_stream(self, session: int, outbox: Outbox) -> None:
        """Says where a session's replies go.

        Raises:
            Refused: the session is over.
        """
        if self._rounds.student_of(session) is None:
            raise Refused(Status.ABORTED, f"session {session} is over or unknown to this server; join again")
        older = self._outboxes.get(session)
        self._outboxes[session] = outbox
        if older is not None:
            older.end(Status.ABORTED, f"session {session} has opened another stream")

    def close_stream(self, session: int, outbox: Outbox) -> None:
        """Takes in that a stream is gone; its session is over, unless another stream has taken its place."""
        if self._outboxes.get(session) is outbox:
            self.disconnect(session)

    def expect_stream(self, session: int) -> None:
        """Ends a session that has had the time to open its stream and has not."""
        if session not in self._outboxes:
            self.disconnect(session)

    def contribute(self, session: int, message: pb.Contribution, size: int) -> None:
        """Takes in a contribution; whatever it leads to goes to the sessions' outboxes.

        Args:
            session: the session it came in on.
            message: the contribution.
            size: its bytes on the wire.

        Raises:
            Refused: the contribution is turned away; its session is over.
            JournalError: the round cannot be written down; the run cannot go on.
        """
        self.observations.bytes_in += size
        student = self._rounds.student_of(session)
        try:
            if student is None:
                raise Refused(Status.ABORTED, f"session {session} is over or unknown to this server; join again")
            contribution = self._read(student, message)
            self._apply(Contribute(session, contribution))
        except Refused as refused:
            self.observations.reject(refused.status)
            self.observations.refusal("rejected", student or "", str(refused))
            self._outboxes.pop(session, None)
            self._apply(Disconnect(session, lost=True))
            raise

    def damaged(self, session: int, message: str) -> None:
        """Takes in that a contribution was damaged on its way; its session is over, and its worker joins again."""
        self.observations.reject(Status.ABORTED)
        self.observations.event("damaged", self._rounds.student_of(session) or "", message)
        self._outboxes.pop(session, None)
        self._apply(Disconnect(session))

    def report(self, request: pb.ReportRequest) -> None:
        """Takes in a student's report.

        Raises:
            Refused: the session is over, or a value cannot be.
        """
        student = self._rounds.student_of(request.session)
        last = self.observations.total_rounds
        rounds = {"round": request.round, "durable_round": request.durable_round}
        rounds |= {f"measurements.{index}.round": each.round for index, each in enumerate(request.measurements)}
        for field, number in rounds.items():
            if student is not None and number > last:
                raise Refused(Status.INVALID_ARGUMENT, f"{field}: {number} is not allowed; allowed: 0 to {last}")
        seconds = {"epoch": request.epoch, "step_seconds": request.step_seconds, "wait_seconds": request.wait_seconds}
        for field, value in seconds.items():
            if not (math.isfinite(value) and value >= 0):
                raise Refused(Status.INVALID_ARGUMENT, f"{field}: {value} is not allowed; allowed are 0 and above")
        for index, measurement in enumerate(request.measurements):
            if measurement.split not in (pb.SPLIT_TRAIN, pb.SPLIT_TEST):
                raise Refused(
                    Status.INVALID_ARGUMENT,
                    f"measurements.{index}.split: {measurement.split} is not allowed; allowed: SPLIT_TRAIN, SPLIT_TEST",
                )
            if not 0 <= measurement.accuracy <= 1:
                raise Refused(
                    Status.INVALID_ARGUMENT,
                    f"measurements.{index}.accuracy: {measurement.accuracy} is not allowed; allowed: 0 to 1",
                )
            for name in ("loss", "distillation_loss"):
                value: float = getattr(measurement, name)
                if not math.isfinite(value):
                    raise Refused(
                        Status.INVALID_ARGUMENT,
                        f"measurements.{index}.{name}: {value} is not allowed; allowed are finite values",
                    )
        self._apply(Progress(request.session, self._rhythm.exchanges_before(request.durable_round)))
        assert student is not None  # noqa: S101 - else Progress was refused
        self.observations.reported(student, request)

    def leave(self, request: pb.LeaveRequest) -> None:
        """Ends a session.

        Raises:
            Refused: the session is over already, or the reason is unknown.
        """
        reason = _LEAVE_REASONS.get(request.reason)
        if reason is None:
            raise Refused(
                Status.INVALID_ARGUMENT,
                f"reason: {request.reason} is not allowed; allowed: FINISHED, STOPPED, FAILED",
            )
        student = self._rounds.student_of(request.session)
        what = "left" if reason is LeaveReason.STOPPED else reason.value
        if student is not None:  # before the event that may complete the run
            self.observations.event(what, student, _printable(request.message[:500]))
        self._outboxes.pop(request.session, None)
        self._apply(Leave(request.session, reason))

    def disconnect(self, session: int) -> None:
        """Takes in that a session's stream is gone."""
        self._outboxes.pop(session, None)
        student = self._rounds.student_of(session)
        if student is None:
            return
        self._apply(Disconnect(session))
        self.observations.event("disconnected", student, "its connection broke")

    def tick(self) -> None:
        """Lets time go by: notices to those who wait, and rounds that close at their deadline."""
        self._apply(Tick())

    def snapshot(self) -> pb.Run:
        """Returns where the run stands."""
        waiting = self._rounds.waiting(self._clock())
        return self.observations.snapshot(self._rounds.presence, self.frontier, waiting)

    def close(self) -> None:
        """Writes down what is left and closes the journal."""
        self.observations.flush()
        self._journal.close()

    # What the state machine asks for

    def _apply(self, event: Event) -> Admit | None:
        admitted: Admit | None = None
        asked = event.session if isinstance(event, Contribute) else 0  # who is answered by what this raises
        refused: Refused | None = None  # raised last, as the others' part is done all the same
        completed = False
        for action in self._rounds.apply(event, self._clock()):
            match action:
                case Admit():
                    admitted = action
                case Refuse():
                    refused = Refused(action.status, action.message)
                case End() if action.session == asked:
                    self._outboxes.pop(asked, None)
                    refused = Refused(action.status, action.message)
                case End():
                    what = "superseded" if action.status is Status.SUPERSEDED else "evicted"
                    self._end(action, what)
                case Decide():
                    self._decide(action)
                case Answer():
                    try:
                        self._answer(action)
                    except Refused as error:
                        if action.session == asked:
                            refused = error
                        else:
                            self._turn_away(action, error)
                case Notify():
                    waiting = pb.Waiting(
                        round=self._rhythm.round(action.waiting.round),
                        students=action.waiting.students,
                        seconds=action.waiting.seconds,
                    )
                    self._send(action.session, seal(pb.ExchangeReply(waiting=waiting)))
                case Absent():
                    self.observations.absent(action.student, self._rhythm.round(action.round), action.reason)
                case Returned():
                    self.observations.returned(action.student, self._rhythm.round(action.round))
                case Remember():
                    self._journal.remember(action.record)
                case Forget():
                    self._journal.forget(action.before)
                case Complete():
                    completed = True
        if completed:
            self.observations.event("complete", message="every student has finished")
            self.on_complete()
        if refused is not None:
            raise refused
        return admitted

    def _end(self, action: End, what: str) -> None:
        outbox = self._outboxes.pop(action.session, None)
        self.observations.event(what, action.student, action.message)
        if outbox is not None:
            outbox.end(action.status, action.message)

    def _turn_away(self, answer: Answer, refused: Refused) -> None:
        """Ends the session of one of those who wait for a round that was closed, and cannot be answered."""
        self.observations.reject(refused.status)
        self._end(End(answer.session, answer.student, refused.status, str(refused)), "rejected")
        self._apply(Disconnect(answer.session, lost=True))

    def _decide(self, decide: Decide) -> None:
        half = self._half
        assert half is not None  # noqa: S101 - a run without an exchange has no rounds to decide
        state = self._state
        first = next(iter(decide.contributions.values()))

        number = self._rhythm.round(decide.round)
        contributors = tuple(decide.contributions)
        missing = tuple(name for name in self.experiment.participants if name not in decide.contributions)

        def work() -> tuple[ClosedRound, methods.Targets, methods.Gathered]:
            gathered = self._gather(decide, state, outsiders=self._keep_all or bool(missing))
            useful = decide.targets and bool(gathered.students)
            targets = half.targets(gathered) if useful else replace(methods.NOTHING, state=state)
            closed = ClosedRound(
                decide.round,
                first.samples,
                _replies(number, targets, self.experiment.teacher_names, self._dtype),
                _dump_state(number, targets.state),
                contributors,
            )
            return closed, targets, gathered

        def done(result: tuple[ClosedRound, methods.Targets, methods.Gathered]) -> None:
            closed, targets, gathered = result
            self._state = targets.state
            self._journal.append(closed)
            self._recent[closed.round] = closed
            if len(self._recent) > _RECENT_ROUNDS:
                self._recent.popitem(last=False)
            if "logits" in gathered.outputs:
                self.observations.agreement(number, gathered.students, gathered.outputs["logits"], gathered.labels)
            taught = bool(targets.shared or targets.each)
            why = "below the quorum" if not decide.targets else "without its teacher"
            self.observations.round_closed(number, decide.arrived, missing, targets=taught, why=why)
            self._apply(Decided(closed.round))

        self._submit(work, done, heavy=half.heavy)

    def _answer(self, answer: Answer) -> None:
        asked = answer.contribution
        closed = self._recent.get(asked.round) or self._journal.read(asked.round)
        number = self._rhythm.round(asked.round)
        if closed is None:
            raise Refused(Status.FAILED_PRECONDITION, f"round {number} is not in the journal")
        if closed.samples != asked.samples:
            raise Refused(
                Status.FAILED_PRECONDITION,
                f"round {number}: student {answer.student!r} has {closed.samples.difference(asked.samples)} when it "
                "was closed: seed, data and batch size must be the same as then",
            )
        reply = closed.reply_to(answer.student)
        if reply is None:
            raise Refused(
                Status.FAILED_PRECONDITION,
                f"round {number} was closed by {', '.join(closed.contributors)} with targets for nobody else; a student "
                "that joins later needs exchange.journal.keep: all from the run's start",
            )
        self._send(answer.session, reply)

    def _send(self, session: int, reply: bytes) -> None:
        outbox = self._outboxes.get(session)
        if outbox is not None:
            self.observations.bytes_out += len(reply)
            outbox.reply(reply)

    # What comes from outside

    def _check_join(self, request: pb.JoinRequest) -> None:
        if request.protocol_version != PROTOCOL_VERSION:
            raise Refused(
                Status.FAILED_PRECONDITION,
                f"protocol_version: the server speaks {PROTOCOL_VERSION}, this worker {request.protocol_version}; "
                "install the same codistill on both sides",
            )
        if request.student not in self._rounds.presence:
            return  # the state machine names the students there are
        if request.total_rounds > _LARGEST_ROUND:
            raise Refused(
                Status.INVALID_ARGUMENT,
                f"total_rounds: {request.total_rounds} is not allowed; allowed are at most {_LARGEST_ROUND}",
            )
        if request.first_round > request.total_rounds:
            raise Refused(
                Status.INVALID_ARGUMENT,
                f"first_round: {request.first_round} is not allowed; allowed: 0 to total_rounds, {request.total_rounds}",
            )
        differs = difference(self._identity, request.experiment)
        if differs is not None:
            raise Refused(Status.FAILED_PRECONDITION, f"{differs}; start both from the same experiment file")
        if request.data.classes != self._classes:
            raise Refused(
                Status.FAILED_PRECONDITION,
                f"data.classes: the run has {self._classes}, this worker {request.data.classes}",
            )
        theirs = _course(request)
        dataset = self.experiment.data.dataset
        drawn = f"; {dataset!r} must return the same in every process: seed whatever it draws" if ":" in dataset else ""
        for field, value in self._settled.items():
            if theirs[field] != value:
                raise Refused(
                    Status.FAILED_PRECONDITION,
                    f"{field}: the run has {value}, this worker {theirs[field]}; all students need the same data set, "
                    f"in the same order{drawn}",
                )
        self._check_outputs(request)
        self._check_weights(request)

    def _check_outputs(self, request: pb.JoinRequest) -> None:
        """Sees that a worker publishes what the method takes, in the shapes that were settled."""
        who, outputs = request.student, _shapes(request)
        expected, classes = self._expected(who), self._classes
        if self._half is None:
            return
        if outputs.keys() != expected.keys() or not all(
            each.takes(outputs[name], classes) for name, each in expected.items()
        ):
            allowed = ", ".join(f"'{name}': {each.describe(classes)}" for name, each in sorted(expected.items()))
            raise Refused(
                Status.FAILED_PRECONDITION,
                f"outputs: this worker publishes {outputs}, method {self.experiment.distillation.title} "
                f"with {classes} classes takes {{{allowed}}}",
            )
        settled = self._journal.settled(self._outputs_key(who))
        if settled is not None and json.loads(settled) != outputs:
            raise Refused(
                Status.FAILED_PRECONDITION,
                f"outputs: {who!r} publishes {outputs}, the run was settled to {json.loads(settled)}; its model must give "
                "the same shapes as before, and all students the same",
            )

    def _check_weights(self, request: pb.JoinRequest) -> None:
        """Sees that a teacher is the one that it was."""
        settled = self._journal.settled(f"weights/{request.student}")
        if request.student in self._teachers and settled not in (None, request.weights):
            raise Refused(
                Status.FAILED_PRECONDITION,
                f"weights: the run has a teacher {request.student!r} with weights of digest {settled}, this worker's are "
                f"{_printable(request.weights[:128])}; give its teachers.weights the file that the run began with",
            )

    def _expected(self, participant: str) -> Mapping[str, methods.Output]:
        """Returns the outputs that a student or a teacher publishes."""
        if self._half is None:
            return {}
        return self._half.teacher if participant in self._teachers else self._half.student

    def _outputs_key(self, participant: str) -> str:
        """Returns under which key shapes are settled: each teacher has its own, the students' are stacked."""
        return f"outputs/{participant}" if participant in self._teachers else "outputs"

    def _rhythm_with(self, train_samples: int) -> Rhythm:
        """Returns which rounds exchange, with so many samples to train on."""
        return self.experiment.distillation.rhythm(train_samples // self.experiment.training.batch_size)

    def _settle(self, request: pb.JoinRequest) -> None:
        """Holds the run to the data of the first worker that it admits, and to what nobody else says of its models."""
        if not self._settled:
            self._settled = _course(request)
            self._journal.settle("data", json.dumps(self._settled))
        who = request.student
        self._shapes[who] = _shapes(request)
        if any(any(each.limits) for each in self._expected(who).values()):
            self._settle_once(self._outputs_key(who), json.dumps(self._shapes[who]))
        if who in self._teachers:
            self._settle_once(f"weights/{who}", _printable(request.weights[:128]))
        self.observations.total_rounds = request.total_rounds
        self.observations.rounds_per_epoch = request.data.train_samples // self.experiment.training.batch_size

    def _settle_once(self, key: str, value: str) -> None:
        if self._journal.settled(key) is None:
            self._journal.settle(key, value)

    def _read(self, student: str, message: pb.Contribution) -> Contribution:
        if self._half is None:
            raise Refused(
                Status.FAILED_PRECONDITION, "this run's method exchanges nothing; a contribution is not allowed"
            )
        try:
            samples, outputs, labels = self._read_samples(
                student, message.batch, "batch", message.round, self.experiment.training.batch_size
            )
            held_out: Samples | None = None
            held_out_outputs: Mapping[str, torch.Tensor] = {}
            held_out_labels: torch.Tensor | None = None
            if message.HasField("held_out"):
                if not self.experiment.data.held_out:
                    raise TensorError("held_out: some samples are not allowed; this run's experiment holds out none")
                held_out, held_out_outputs, held_out_labels = self._read_samples(
                    student, message.held_out, "held_out", message.round, self.experiment.data.held_out
                )
        except TensorError as error:
            raise Refused(Status.INVALID_ARGUMENT, f"student {student!r}, round {message.round}: {error}") from error
        if not self._rhythm.exchanges(message.round):
            raise Refused(
                Status.FAILED_PRECONDITION,
                f"round {message.round} exchanges nothing; allowed: round {self._rhythm.start} and one in "
                f"{self._rhythm.every} from there",
            )
        payload = _Payload(outputs, labels, held_out_outputs, held_out_labels)
        return Contribution(self._rhythm.exchanges_before(message.round), samples, held_out, payload)

    def _read_samples(
        self, student: str, message: pb.Samples, field: str, number: int, size: int
    ) -> tuple[Samples, Mapping[str, torch.Tensor], torch.Tensor]:
        check(message.ids, f"{field}.ids", dtype="int64", shape=[size])
        check(message.labels, f"{field}.labels", dtype="int64", shape=[size])
        shapes = self._shapes.get(student, {})
        if set(message.outputs) != set(shapes):
            raise TensorError(f"{field}.outputs: {sorted(message.outputs)} are not allowed; expected {sorted(shapes)}")
        for name, dims in shapes.items():
            check(message.outputs[name], f"{field}.outputs.{name}", dtype=self._dtype, shape=[size, *dims])
        labels = decode(message.labels)
        if not (int(labels.min()) >= 0 and int(labels.max()) < self._classes):
            bad = int(labels[(labels < 0) | (labels >= self._classes)][0])
            raise TensorError(f"{field}.labels: {bad} is not a class; allowed: 0 to {self._classes - 1}")
        outputs = {name: decode(message.outputs[name]) for name in shapes}
        for name, values in outputs.items():
            low, high = torch.aminmax(values)  # both NaN where any value is
            if not (float(low) >= -_LARGEST_LOGIT and float(high) <= _LARGEST_LOGIT):
                place = torch.nonzero(~(values.double().abs() <= _LARGEST_LOGIT))[0].tolist()
                why = (
                    "the teacher's weights are damaged"
                    if student in self._teachers
                    else "the student has diverged, lower its learning rate"
                )
                raise Refused(
                    Status.INVALID_ARGUMENT,
                    f"student {student!r}, round {number}: {field}.outputs.{name}{place} is "
                    f"{values[tuple(place)].item()}; allowed are finite values of magnitude up to {_LARGEST_LOGIT:g}: {why}",
                )
        return Samples(message.ids.data, message.labels.data), outputs, labels

    def _gather(self, decide: Decide, state: Mapping[str, torch.Tensor], *, outsiders: bool) -> methods.Gathered:
        payloads = {name: cast("_Payload", each.payload) for name, each in decide.contributions.items()}
        students = [payload for name, payload in payloads.items() if name not in self._teachers]
        first = next(iter(payloads.values()))
        of_students = students[0] if students else _Payload({}, first.labels, {}, None)
        return methods.Gathered(
            students=tuple(name for name in payloads if name not in self._teachers),
            outputs={
                name: torch.stack([each.outputs[name] for each in students]).float() for name in of_students.outputs
            },
            labels=first.labels,
            teachers={
                name: {key: value.float() for key, value in payload.outputs.items()}
                for name, payload in payloads.items()
                if name in self._teachers
            },
            held_out={
                name: torch.stack([each.held_out[name] for each in students]).float() for name in of_students.held_out
            },
            held_out_labels=of_students.held_out_labels,
            state=state,
            outsiders=outsiders,
        )


def _shapes(request: pb.JoinRequest) -> dict[str, list[int]]:
    """Returns the shapes of what a worker publishes, by name."""
    return {name: list(shape.dims) for name, shape in sorted(request.outputs.items())}


def _printable(text: str) -> str:
    """Returns what a worker wrote as one line that does nothing to a terminal."""
    return text if text.isprintable() else "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _course(request: pb.JoinRequest) -> dict[str, int | str]:
    """Returns what every worker must say alike of the run's data and length, by the fields' names."""
    return {
        "data.train_samples": request.data.train_samples,
        "data.digest": _printable(request.data.digest[:128]),
        "total_rounds": request.total_rounds,
    }


def _absence(experiment: Experiment) -> Absence | None:
    """Returns how an experiment goes on without a student; None where it waits for every one."""
    exchange = experiment.exchange
    if exchange.on_absence == "wait":
        return None
    deadline = None if exchange.round_deadline == "auto" else exchange.round_deadline
    return Absence(exchange.quorum, deadline, exchange.evict_after)


def _replies(number: int, targets: methods.Targets, teachers: Sequence[str], dtype: str) -> Mapping[str, bytes]:
    nothing: methods.Arrays = {}
    by_student = {**(targets.each or {}), **dict.fromkeys(teachers, nothing)}
    if targets.shared is not None:
        by_student[""] = targets.shared
    return {
        student: seal(
            pb.ExchangeReply(
                targets=pb.Targets(round=number, targets={name: encode(value, dtype) for name, value in arrays.items()})
            )
        )
        for student, arrays in by_student.items()
    }


def _dump_state(number: int, state: Mapping[str, torch.Tensor]) -> bytes:
    if not state:
        return b""
    arrays = {name: encode(value, "float32") for name, value in state.items()}
    return pb.Targets(round=number, targets=arrays).SerializeToString(deterministic=True)


def _load_state(state: bytes) -> Mapping[str, torch.Tensor]:
    return {name: decode(value) for name, value in pb.Targets.FromString(state).targets.items()}
