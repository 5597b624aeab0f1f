"""One run's aggregation server without a socket.

The coordinator has messages checked, drives the rounds' state machine, carries out its actions (targets, journal,
answers) and feeds the observations. It knows no gRPC, no thread and no event loop: the gRPC service and the in-process
loop both stand on it, which is why they give the same bits.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol, TypeVar

import torch

from codistill.config.experiment import Experiment
from codistill.config.schedule import ExchangeSchedule
from codistill.methods.aggregator import NOTHING, RoundInputs, Targets
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.checksum import append_checksum
from codistill_server import methods
from codistill_server.admission.contributions import Contributions
from codistill_server.admission.joins import JoinAdmission
from codistill_server.admission.progress import check_rounds, check_values
from codistill_server.errors import RequestRejected, printable
from codistill_server.observability.state import RunState
from codistill_server.rounds.events import (
    Absent,
    Admit,
    Answer,
    Complete,
    Contribute,
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
    Status,
    Tick,
)
from codistill_server.rounds.machine import Rounds, Rules
from codistill_server.rounds.stragglers import StragglerPolicy
from codistill_server.storage.codec import dump_state, load_state, make_replies
from codistill_server.storage.journal import ClosedRound, Journal

__all__ = ["Coordinator", "Outbox", "Submit", "run_inline"]

_RECENT_ROUNDS = 4
_LONGEST_DEVICE = 200  # it is in the run's events, which GetRun sends all together
_T = TypeVar("_T")

_LEAVE_REASONS = {
    pb.LEAVE_REASON_FINISHED: LeaveReason.FINISHED,
    pb.LEAVE_REASON_STOPPED: LeaveReason.STOPPED,
    pb.LEAVE_REASON_FAILED: LeaveReason.FAILED,
}


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
        observations: RunState,
        submit: Submit = run_inline,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.experiment = experiment
        self.observations = observations
        self.on_complete: Callable[[], None] = lambda: None
        self._journal = journal
        self._submit = submit
        self._clock = clock
        self._half = methods.create(experiment.distillation, experiment.names, experiment.teacher_names)
        self._state: Mapping[str, torch.Tensor] = load_state(journal.last_state())
        self._teachers = frozenset(experiment.teacher_names)
        self._door = JoinAdmission(experiment, journal, self._half)
        self._contributions = Contributions(experiment)
        self._exchange_schedule = self._rhythm_with(self._door.train_samples)
        self._outboxes: dict[int, Outbox] = {}
        self._recent: OrderedDict[int, ClosedRound] = OrderedDict()
        restored = journal.restore()
        rules = Rules(
            students=experiment.participants,
            exchanges=experiment.distillation.exchanges,
            waiting_notice=experiment.exchange.waiting_notice,
            keep_all=experiment.exchange.journal.keep == "all",
            absence=_absence(experiment),
            steps=experiment.distillation.exchange_schedule(1).every,
        )
        self._keep_all = rules.keep_all
        self._rounds = Rounds(rules, restored)
        for record in restored.students:
            if record.student in observations.students:
                view = observations.students[record.student]
                view.durable_round = view.round = self._exchange_schedule.round(record.durable_round)
        if restored.frontier:
            oldest, newest = (
                self._exchange_schedule.round(restored.oldest),
                self._exchange_schedule.round(restored.frontier - 1),
            )
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
        return self._exchange_schedule.round(self._rounds.frontier)

    def join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        """Opens a session.

        Raises:
            RequestRejected: something differs from the run; the text names the field and both values.
        """
        try:
            self._door.check(request)
            exchange_schedule = self._rhythm_with(request.data.train_samples)
            # A teacher learns nothing, so it needs no round that is closed.
            taught = request.student not in self._teachers
            first = exchange_schedule.exchanges_before(request.first_round) if taught else self._rounds.frontier
            admitted = self._apply(Join(request.student, first, request.worker, request.session))
        except RequestRejected as refused:
            who = request.student if request.student in self._rounds.presence else ""
            self.observations.refusal("refused", who, str(refused))
            raise
        assert admitted is not None  # noqa: S101 - a join is either refused or admitted
        self._door.settle(request)
        self._exchange_schedule = exchange_schedule
        self.observations.total_rounds = request.total_rounds
        self.observations.rounds_per_epoch = request.data.train_samples // self.experiment.training.batch_size
        request.device = printable(request.device[:_LONGEST_DEVICE])
        self.observations.joined(request)
        where = f" on {request.device}" if request.device else ""
        again = f", from round {request.first_round}" if request.first_round else ""
        self.observations.event("joined", request.student, f"joined{where}{again}")
        return pb.JoinResponse(
            session=admitted.session, frontier=exchange_schedule.round(admitted.frontier), run=self.experiment.name
        )

    def student_of(self, session: int) -> str | None:
        """Returns whose session this is, or None if it is over or never was."""
        return self._rounds.student_of(session)

    def open_stream(self, session: int, outbox: Outbox) -> None:
        """Says where a session's replies go.

        Raises:
            RequestRejected: the session is over.
        """
        if self._rounds.student_of(session) is None:
            raise RequestRejected(Status.ABORTED, f"session {session} is over or unknown to this server; join again")
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
            RequestRejected: the contribution is turned away; its session is over.
            JournalError: the round cannot be written down; the run cannot go on.
        """
        self.observations.bytes_in += size
        student = self._rounds.student_of(session)
        try:
            if student is None:
                raise RequestRejected(
                    Status.ABORTED, f"session {session} is over or unknown to this server; join again"
                )
            if self._half is None:
                raise RequestRejected(
                    Status.FAILED_PRECONDITION, "this run's method exchanges nothing; a contribution is not allowed"
                )
            shapes = self._door.shapes_of(student)
            contribution = self._contributions.read(student, message, shapes, self._exchange_schedule)
            self._apply(Contribute(session, contribution))
        except RequestRejected as refused:
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
            RequestRejected: the session is over, or a value cannot be.
        """
        student = self._rounds.student_of(request.session)
        if student is not None:  # else Progress is refused
            check_rounds(request, self.observations.total_rounds)
        check_values(request)
        self._apply(Progress(request.session, self._exchange_schedule.exchanges_before(request.durable_round)))
        assert student is not None  # noqa: S101 - else Progress was refused
        self.observations.reported(student, request)

    def leave(self, request: pb.LeaveRequest) -> None:
        """Ends a session.

        Raises:
            RequestRejected: the session is over already, or the reason is unknown.
        """
        reason = _LEAVE_REASONS.get(request.reason)
        if reason is None:
            raise RequestRejected(
                Status.INVALID_ARGUMENT,
                f"reason: {request.reason} is not allowed; allowed: FINISHED, STOPPED, FAILED",
            )
        student = self._rounds.student_of(request.session)
        what = "left" if reason is LeaveReason.STOPPED else reason.value
        if student is not None:  # before the event that may complete the run
            self.observations.event(what, student, printable(request.message[:500]))
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

    def _rhythm_with(self, train_samples: int) -> ExchangeSchedule:
        """Returns which rounds exchange, with so many samples to train on."""
        return self.experiment.distillation.exchange_schedule(train_samples // self.experiment.training.batch_size)

    # What the state machine asks for

    def _apply(self, event: Event) -> Admit | None:
        admitted: Admit | None = None
        asked = event.session if isinstance(event, Contribute) else 0  # who is answered by what this raises
        refused: RequestRejected | None = None  # raised last, as the others' part is done all the same
        completed = False
        for action in self._rounds.apply(event, self._clock()):
            match action:
                case Admit():
                    admitted = action
                case Refuse():
                    refused = RequestRejected(action.status, action.message)
                case End() if action.session == asked:
                    self._outboxes.pop(asked, None)
                    refused = RequestRejected(action.status, action.message)
                case End():
                    what = "superseded" if action.status is Status.SUPERSEDED else "evicted"
                    self._end(action, what)
                case Decide():
                    self._decide(action)
                case Answer():
                    try:
                        self._answer(action)
                    except RequestRejected as error:
                        if action.session == asked:
                            refused = error
                        else:
                            self._turn_away(action, error)
                case Notify():
                    waiting = pb.Waiting(
                        round=self._exchange_schedule.round(action.waiting.round),
                        students=action.waiting.students,
                        seconds=action.waiting.seconds,
                    )
                    self._send(action.session, append_checksum(pb.ExchangeReply(waiting=waiting)))
                case Absent():
                    self.observations.absent(action.student, self._exchange_schedule.round(action.round), action.reason)
                case Returned():
                    self.observations.returned(action.student, self._exchange_schedule.round(action.round))
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

    def _turn_away(self, answer: Answer, refused: RequestRejected) -> None:
        """Ends the session of one of those who wait for a round that was closed, and cannot be answered."""
        self.observations.reject(refused.status)
        self._end(End(answer.session, answer.student, refused.status, str(refused)), "rejected")
        self._apply(Disconnect(answer.session, lost=True))

    def _decide(self, decide: Decide) -> None:
        half = self._half
        assert half is not None  # noqa: S101 - a run without an exchange has no rounds to decide
        state = self._state
        first = next(iter(decide.contributions.values()))

        number = self._exchange_schedule.round(decide.round)
        contributors = tuple(decide.contributions)
        missing = tuple(name for name in self.experiment.participants if name not in decide.contributions)

        def work() -> tuple[ClosedRound, Targets, RoundInputs]:
            gathered = self._contributions.gather(decide, state, include_absent=self._keep_all or bool(missing))
            useful = decide.targets and bool(gathered.students)
            targets = half.targets(gathered) if useful else replace(NOTHING, state=state)
            closed = ClosedRound(
                decide.round,
                first.samples,
                make_replies(number, targets, self.experiment.teacher_names, self.experiment.exchange.dtype),
                dump_state(number, targets.state),
                contributors,
            )
            return closed, targets, gathered

        def done(result: tuple[ClosedRound, Targets, RoundInputs]) -> None:
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
        number = self._exchange_schedule.round(asked.round)
        if closed is None:
            raise RequestRejected(Status.FAILED_PRECONDITION, f"round {number} is not in the journal")
        if closed.samples != asked.samples:
            raise RequestRejected(
                Status.FAILED_PRECONDITION,
                f"round {number}: student {answer.student!r} has {closed.samples.difference(asked.samples)} when it "
                "was closed: seed, data and batch size must be the same as then",
            )
        reply = closed.reply_to(answer.student)
        if reply is None:
            raise RequestRejected(
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


def _absence(experiment: Experiment) -> StragglerPolicy | None:
    """Returns how an experiment goes on without a student; None where it waits for every one."""
    exchange = experiment.exchange
    if exchange.on_absence == "wait":
        return None
    deadline = None if exchange.round_deadline == "auto" else exchange.round_deadline
    return StragglerPolicy(exchange.quorum, deadline, exchange.evict_after)
