"""One run's aggregation server without a socket.

The coordinator has messages checked and asks the rounds' state machine what to do. It carries that out (targets, journal,
answers) and records it in the run's state. It knows no gRPC, no thread and no event loop. The gRPC service and the
in-process loop both drive it, which is why they give the same bits.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch

from codistill.config.experiment import Experiment
from codistill.config.methods import Custom
from codistill.methods.aggregator import NOTHING, RoundInputs, Targets
from codistill.peer.draws import derive
from codistill.process.printable import printable
from codistill.process.randomness import seed_generators, seeded
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.checksum import append_checksum
from codistill.wire.times import duration
from codistill_server import methods
from codistill_server.admission.contributions import Contributions
from codistill_server.admission.joins import JoinAdmission
from codistill_server.admission.progress import check_counts, check_values
from codistill_server.errors import RequestRejected
from codistill_server.methods.custom_trial import try_aggregator
from codistill_server.observability.state import RunState
from codistill_server.rounds.actions import (
    Action,
    Admit,
    Answer,
    Awaited,
    Complete,
    Decide,
    End,
    Forget,
    Notify,
    Refuse,
    Remember,
    Skipped,
    Status,
    Waiting,
)
from codistill_server.rounds.events import (
    Contribute,
    Decided,
    Disconnect,
    Event,
    Join,
    Leave,
    LeaveReason,
    ParticipantRecord,
    Progress,
    Tick,
)
from codistill_server.rounds.machine import ParticipantState, Rounds, Rules
from codistill_server.rounds.stragglers import straggler_policy
from codistill_server.storage.codec import decode_state, encode_replies, encode_state
from codistill_server.storage.journal import ClosedRound, Journal

__all__ = ["Coordinator", "Outbox", "Submit", "run_inline"]

_log = logging.getLogger(__name__)

_RECENT_ROUNDS = 4
_LONGEST_DEVICE = 200  # it is in the run's events, which GetRun sends all together
_T = TypeVar("_T")

_LEAVE_REASONS = {
    pb.LEAVE_REASON_FINISHED: LeaveReason.FINISHED,
    pb.LEAVE_REASON_STOPPED: LeaveReason.STOPPED,
    pb.LEAVE_REASON_FAILED: LeaveReason.FAILED,
}


_LEAVE_EVENTS = {
    LeaveReason.FINISHED: pb.EVENT_KIND_FINISHED,
    LeaveReason.STOPPED: pb.EVENT_KIND_STOPPED,
    LeaveReason.FAILED: pb.EVENT_KIND_FAILED,
}


class Outbox(Protocol):
    """Carries the coordinator's replies to one session. Neither call may block or call the coordinator."""

    def reply(self, reply: bytes) -> None:
        """Send an ``ExchangeResponse``, serialised and with its checksum."""
        ...

    def end(self, status: Status, message: str) -> None:
        """End the session's stream."""
        ...


class Submit(Protocol):
    """Runs work that may take milliseconds, and calls `done` with its result on the coordinator's thread."""

    def __call__(self, work: Callable[[], _T], done: Callable[[_T], None], *, heavy: bool) -> None:
        """Run `work`, beside the event loop if it is heavy and there is one."""
        ...


def run_inline(work: Callable[[], _T], done: Callable[[_T], None], *, heavy: bool) -> None:  # noqa: ARG001
    """Run the work at once: a :class:`Submit` where there is no event loop."""
    done(work())


@dataclass
class _Outcome:
    """The outcome of an event for its sender.

    Attributes:
        admitted: the session that a join was given.
        rejected: why the event was rejected; None if it was not.
    """

    admitted: Admit | None = None
    rejected: RequestRejected | None = None

    def raise_if_rejected(self) -> None:
        if self.rejected is not None:
            raise self.rejected


class Coordinator:
    """The core of one run's server, whatever the transport. Call it from one thread.

    Args:
        experiment: the run's experiment.
        journal: its journal, of the same experiment.
        run_state: the run's state as it is shown to the outside.
        submit: runs work that takes time.
        clock: seconds that never go back.

    Attributes:
        on_complete: called when every participant has finished; again if one joined again meanwhile.
    """

    def __init__(
        self,
        experiment: Experiment,
        journal: Journal,
        run_state: RunState,
        submit: Submit = run_inline,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.experiment = experiment
        self.run_state = run_state
        self.on_complete: Callable[[], None] = lambda: None
        self._journal = journal
        self._submit = submit
        self._clock = clock
        try_aggregator(experiment)
        with seeded(derive(experiment.seed, "aggregator")):
            self._aggregator = methods.create(experiment.distillation, experiment.names, experiment.teacher_names)
        self._method_state: Mapping[str, torch.Tensor] = decode_state(journal.last_state())
        self._teachers = frozenset(experiment.teacher_names)
        self._admission = JoinAdmission(experiment, journal, self._aggregator)
        self._contributions = Contributions(experiment)
        self._outboxes: dict[int, Outbox] = {}
        self._recent: OrderedDict[int, ClosedRound] = OrderedDict()
        self._events: deque[tuple[Event, _Outcome]] = deque()
        self._processing = False
        restored = journal.restore()
        rules = Rules(
            participants=experiment.participants,
            exchanges=experiment.distillation.exchanges,
            waiting_notice=experiment.exchange.waiting_notice,
            keep_all=experiment.exchange.journal.keep == "all",
            stragglers=straggler_policy(experiment),
            steps_per_round=experiment.distillation.exchange_schedule(1).every,
        )
        self._rounds = Rounds(rules, restored)
        self._show_length()
        for record in restored.participants:
            if record.participant in run_state.participants:
                self._show_restored(run_state.participants[record.participant], record)
        if restored.frontier:
            message = f"the journal holds rounds {restored.oldest} to {restored.frontier - 1}"
            run_state.record_event(pb.EVENT_KIND_RESUMED, message=message)

    @property
    def complete(self) -> bool:
        """Whether every participant has finished."""
        return self._rounds.complete

    @property
    def states(self) -> Mapping[str, ParticipantState]:
        """Where each participant stands."""
        return self._rounds.states

    @property
    def frontier(self) -> int:
        """The first round that is not closed."""
        return self._rounds.frontier

    def join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        """Open a session.

        Raises:
            RequestRejected: something differs from the run; the text names the field and both values.
            JournalError: the session cannot be recorded.
        """
        try:
            self._admission.check(request)
            # A teacher learns nothing, so it needs no round that is closed.
            learns = request.participant not in self._teachers
            first_round = request.first_round if learns else self._rounds.frontier
            outcome = self._process(Join(request.participant, first_round, request.worker_id, request.session_id))
            outcome.raise_if_rejected()
        except RequestRejected as rejected:
            participant = request.participant if request.participant in self._rounds.states else ""
            recorded = self.run_state.record_rejection(pb.EVENT_KIND_REFUSED, participant, str(rejected))
            if recorded is not None:
                _log.warning("refused to let %s join: %s", repr(participant) if participant else "a worker", recorded)
            raise
        admitted = outcome.admitted
        assert admitted is not None  # noqa: S101 - a join is either rejected or admitted
        self._admission.settle(request)
        self._show_length()
        request.device = printable(request.device[:_LONGEST_DEVICE])
        self.run_state.record_join(request)
        where = f" on {request.device}" if request.device else ""
        resumed = f", from step {request.steps_trained}" if request.steps_trained else ""
        self.run_state.record_event(pb.EVENT_KIND_JOINED, request.participant, f"joined{where}{resumed}")
        return pb.JoinResponse(
            session_id=admitted.session_id,
            frontier=admitted.frontier,
            run=self.experiment.name,
            lane=pb.LANE_GRPC,
            encoding=pb.ENCODING_DENSE,
        )

    def participant_of(self, session_id: int) -> str | None:
        """Return the participant of a session, or None if the session is over or never was."""
        return self._rounds.participant_of(session_id)

    def open_stream(self, session_id: int, outbox: Outbox) -> None:
        """Set where a session's replies go; a stream that it opened before is ended.

        Raises:
            RequestRejected: the session is over.
        """
        if self._rounds.participant_of(session_id) is None:
            raise _session_is_over(session_id)
        replaced = self._outboxes.get(session_id)
        self._outboxes[session_id] = outbox
        if replaced is not None:
            replaced.end(Status.ABORTED, f"session {session_id} has opened another stream")

    def close_stream(self, session_id: int, outbox: Outbox) -> None:
        """End the session of a stream that is gone, unless another stream has taken its place."""
        if self._outboxes.get(session_id) is outbox:
            self.disconnect(session_id)

    def expect_stream(self, session_id: int) -> None:
        """End a session that has not opened its stream by now."""
        if session_id not in self._outboxes:
            self.disconnect(session_id)

    def contribute(self, session_id: int, message: pb.ExchangeRequest, size: int) -> None:
        """Process a contribution; the answers that it leads to go to the sessions' outboxes.

        Args:
            session_id: the session on which it arrived.
            message: the contribution.
            size: its bytes on the wire.

        Raises:
            RequestRejected: the contribution is rejected; its session is over.
            JournalError: the round cannot be journalled; the run cannot go on.
        """
        self.run_state.bytes_in += size
        participant = self._rounds.participant_of(session_id)
        try:
            if participant is None:
                raise _session_is_over(session_id)
            if self._aggregator is None:
                raise RequestRejected(
                    Status.FAILED_PRECONDITION, "this run's method exchanges nothing; a contribution is not allowed"
                )
            if message.round >= self.run_state.total_rounds:
                raise RequestRejected(
                    Status.FAILED_PRECONDITION,
                    f"round: {message.round} is not one of the run's; allowed: 0 to {self.run_state.total_rounds - 1}",
                )
            shapes = self._admission.shapes_of(participant)
            contribution = self._contributions.decode(participant, message, shapes)
            self._process(Contribute(session_id, contribution)).raise_if_rejected()
        except RequestRejected as rejected:
            self.run_state.count_rejection(rejected.status)
            self.run_state.record_rejection(pb.EVENT_KIND_REJECTED, participant or "", str(rejected))
            self._outboxes.pop(session_id, None)
            self._process(Disconnect(session_id, lost=True))
            raise

    def reject_damaged(self, session_id: int, message: str) -> None:
        """End the session of a contribution that was damaged on its way; its worker joins again."""
        self.run_state.count_rejection(Status.ABORTED)
        self.run_state.record_event(pb.EVENT_KIND_DAMAGED, self._rounds.participant_of(session_id) or "", message)
        self._outboxes.pop(session_id, None)
        self._process(Disconnect(session_id))

    def report(self, request: pb.ReportRequest) -> None:
        """Record a participant's progress.

        Raises:
            RequestRejected: the session is over, or a value is out of range.
            JournalError: the progress cannot be recorded.
        """
        participant = self._rounds.participant_of(request.session_id)
        if participant is not None:  # else the machine rejects it
            check_counts(request, self.run_state.total_rounds, self.run_state.total_steps)
        check_values(request)
        self._process(Progress(request.session_id, request.durable_round)).raise_if_rejected()
        assert participant is not None  # noqa: S101 - else it was rejected
        self.run_state.record_report(participant, request)

    def leave(self, request: pb.LeaveRequest) -> None:
        """End a session because its participant leaves.

        Raises:
            RequestRejected: the session is over already, or the reason is unknown.
            JournalError: a round that this closes cannot be journalled, or that the participant has finished.
        """
        reason = _LEAVE_REASONS.get(request.reason)
        if reason is None:
            raise RequestRejected(
                Status.INVALID_ARGUMENT,
                f"reason: {request.reason} is not allowed; allowed: FINISHED, STOPPED, FAILED",
            )
        participant = self._rounds.participant_of(request.session_id)
        if participant is not None and reason is LeaveReason.FINISHED:
            self._check_finished(participant)
        if participant is not None:  # before the run may complete
            self.run_state.record_event(_LEAVE_EVENTS[reason], participant, printable(request.message[:500]))
        self._outboxes.pop(request.session_id, None)
        self._process(Leave(request.session_id, reason)).raise_if_rejected()

    def _check_finished(self, participant: str) -> None:
        """Reject the end of a participant that cannot have finished yet; the others would stop waiting for it."""
        run_state = self.run_state
        if self._rounds.rules.exchanges:
            done, total, unit = self.frontier, run_state.total_rounds, "rounds are closed"
        else:
            done, total = run_state.participants[participant].steps_trained, run_state.total_steps
            unit = "steps are reported"
        if done < total:
            raise RequestRejected(
                Status.FAILED_PRECONDITION,
                f"reason: FINISHED is not allowed while {done} of {total} {unit}; leave as STOPPED or FAILED",
            )

    def disconnect(self, session_id: int) -> None:
        """End a session whose stream is gone."""
        self._outboxes.pop(session_id, None)
        participant = self._rounds.participant_of(session_id)
        if participant is None:
            return
        self._process(Disconnect(session_id))
        self.run_state.record_event(pb.EVENT_KIND_DISCONNECTED, participant, "its connection broke")

    def tick(self) -> None:
        """Do what is due: notify participants that wait, close rounds at their deadline, end silent sessions.

        Raises:
            JournalError: a round that this closes cannot be journalled.
        """
        self._process(Tick())

    def snapshot(self) -> pb.Run:
        """Return the state of the run."""
        waiting = self._rounds.waiting(self._clock())
        return self.run_state.snapshot(self._rounds.states, self._rounds.awaited, self.frontier, waiting)

    def close(self) -> None:
        """Record what the run's state still holds back, and close the journal."""
        self.run_state.flush()
        self._journal.close()

    def _show_length(self) -> None:
        """Show the length of the run, as far as it is settled."""
        run_state, admission = self.run_state, self._admission
        run_state.total_rounds, run_state.total_steps = admission.total_rounds, admission.total_steps
        run_state.steps_per_epoch = admission.steps_per_epoch
        run_state.schedule = admission.schedule

    def _show_restored(self, status: pb.ParticipantStatus, record: ParticipantRecord) -> None:
        """Show the progress of a participant from the journal, until it reports."""
        status.durable_round = status.round = record.durable_round
        if record.finished:
            status.steps_trained = self._admission.total_steps
        elif self._rounds.rules.exchanges and record.durable_round:
            status.steps_trained = self._admission.schedule.step_of(record.durable_round)

    # What the state machine asks for

    def _process(self, event: Event) -> _Outcome:
        """Process an event and all that follow from it, one after the other; return the outcome for its sender.

        Carrying out an action may lead to another event. A call for such an event only queues it. So all actions of one
        event are carried out before the next event is applied.

        Raises:
            JournalError: the journal cannot be written or read. The queue is empty then, and the run cannot go on.
        """
        outcome = _Outcome()
        self._events.append((event, outcome))
        if self._processing:
            return outcome
        self._processing = True
        try:
            while self._events:
                current, its_outcome = self._events.popleft()
                for action in self._rounds.apply(current, self._clock()):
                    self._carry_out(action, current, its_outcome)
        finally:
            self._events.clear()
            self._processing = False
        return outcome

    def _carry_out(self, action: Action, event: Event, outcome: _Outcome) -> None:
        """Carry out an action; the sender of a rejected contribution is answered by its outcome, not on its stream."""
        sender = event.session_id if isinstance(event, Contribute) else None
        match action:
            case Admit():
                outcome.admitted = action
            case Refuse():
                outcome.rejected = RequestRejected(action.status, action.message)
            case End() if action.session_id == sender:
                self._outboxes.pop(action.session_id, None)
                outcome.rejected = RequestRejected(action.status, action.message)
            case End():
                superseded = action.status is Status.SUPERSEDED
                self._end(action, pb.EVENT_KIND_SUPERSEDED if superseded else pb.EVENT_KIND_EVICTED)
            case Decide():
                self._decide(action)
            case Answer():
                try:
                    self._send(action.session_id, self._reply_to(action))
                except RequestRejected as rejected:
                    if action.session_id == sender:
                        outcome.rejected = rejected
                    else:
                        self._reject_waiter(action, rejected)
            case Notify():
                self._notify(action.session_id, action.waiting)
            case Skipped():
                self.run_state.record_skipped(action.participant, action.round, action.reason)
            case Awaited():
                self.run_state.record_awaited(action.participant, action.round)
            case Remember():
                self._journal.remember(action.record)
            case Forget():
                self._journal.forget(action.before)
            case Complete():
                self.run_state.record_event(pb.EVENT_KIND_COMPLETE, message="every participant has finished")
                self.on_complete()

    def _end(self, action: End, kind: pb.EventKind.ValueType) -> None:
        outbox = self._outboxes.pop(action.session_id, None)
        self.run_state.record_event(kind, action.participant, action.message)
        if outbox is not None:
            outbox.end(action.status, action.message)

    def _reject_waiter(self, answer: Answer, rejected: RequestRejected) -> None:
        """End the session of a participant that waits for a closed round and cannot be answered."""
        self.run_state.count_rejection(rejected.status)
        self._end(End(answer.session_id, answer.participant, rejected.status, str(rejected)), pb.EVENT_KIND_REJECTED)
        self._process(Disconnect(answer.session_id, lost=True))

    def _decide(self, decide: Decide) -> None:
        """Have a round's targets made; journal them before the round counts as decided."""
        aggregator = self._aggregator
        assert aggregator is not None  # noqa: S101 - a run without an exchange has no rounds to decide
        experiment, state = self.experiment, self._method_state
        round_number = decide.round
        samples = next(iter(decide.contributions.values())).samples
        contributors = tuple(decide.contributions)
        missing = tuple(name for name in experiment.participants if name not in decide.contributions)
        include_missing = self._rounds.rules.keep_all or bool(missing)

        def make() -> tuple[RoundInputs, Targets, ClosedRound]:
            inputs = self._contributions.round_inputs(decide, state, include_missing=include_missing)
            with_targets = decide.targets and bool(inputs.students)
            if isinstance(experiment.distillation, Custom):  # no other method draws anything
                seed_generators(derive(experiment.seed, "targets", round_number))
            targets = aggregator.targets(inputs) if with_targets else replace(NOTHING, state=state)
            replies = encode_replies(round_number, targets, experiment.teacher_names, experiment.exchange.dtype)
            method_state = encode_state(round_number, targets.state)
            return inputs, targets, ClosedRound(decide.round, samples, replies, method_state, contributors)

        def close(made: tuple[RoundInputs, Targets, ClosedRound]) -> None:
            inputs, targets, closed = made
            self._method_state = targets.state
            self._journal.append(closed)
            self._recent[closed.round] = closed
            if len(self._recent) > _RECENT_ROUNDS:
                self._recent.popitem(last=False)
            if "logits" in inputs.outputs:
                self.run_state.measure_agreement(round_number, inputs.students, inputs.outputs["logits"], inputs.labels)
            has_targets = bool(targets.shared or targets.each)
            why = "below the quorum" if not decide.targets else "without its teacher"
            self.run_state.record_round(round_number, decide.arrived, missing, targets=has_targets, why=why)
            self._process(Decided(closed.round))

        self._submit(make, close, heavy=aggregator.heavy)

    def _reply_to(self, answer: Answer) -> bytes:
        """Return the reply to a contribution to a closed round.

        Raises:
            RequestRejected: the round is not kept, is about other samples, or has no targets for this participant.
            JournalError: the round cannot be read.
        """
        contribution = answer.contribution
        closed = self._recent.get(contribution.round) or self._journal.read(contribution.round)
        round_number = contribution.round
        if closed is None:
            raise RequestRejected(Status.FAILED_PRECONDITION, f"round {round_number} is not in the journal")
        if closed.samples != contribution.samples:
            raise RequestRejected(
                Status.FAILED_PRECONDITION,
                f"round {round_number}: participant {answer.participant!r} has "
                f"{closed.samples.difference(contribution.samples)} when it was closed: seed, data and batch size must be "
                "the same as then",
            )
        reply = closed.reply_to(answer.participant)
        if reply is None:
            raise RequestRejected(
                Status.FAILED_PRECONDITION,
                f"round {round_number} was closed by {', '.join(closed.contributors)} with targets for nobody else; a "
                "participant that joins later needs exchange.journal.keep: all from the run's start",
            )
        return reply

    def _notify(self, session_id: int, waiting: Waiting) -> None:
        elapsed = duration(waiting.seconds)
        message = pb.Waiting(round=waiting.round, participants=waiting.participants, elapsed=elapsed)
        self._send(session_id, append_checksum(pb.ExchangeResponse(waiting=message)))

    def _send(self, session_id: int, reply: bytes) -> None:
        outbox = self._outboxes.get(session_id)
        if outbox is not None:
            self.run_state.bytes_out += len(reply)
            outbox.reply(reply)


def _session_is_over(session_id: int) -> RequestRejected:
    return RequestRejected(Status.ABORTED, f"session {session_id} is over or unknown to this server; join again")
