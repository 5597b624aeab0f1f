"""All students of a run in one process, on the same core that the server stands on.

For one GPU, for tests, and as the reference of equality: a run over gRPC ends with the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from codistill.config.data import Augment
from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity
from codistill.config.plans import TeacherPlan
from codistill.peer.errors import PeerError
from codistill.process.exit_codes import ExitCode
from codistill.process.watchdog import Watchdog
from codistill.rundir.writer import RecordWriter
from codistill.v1 import distillation_pb2 as pb
from codistill_deploy.console.progress import View
from codistill_deploy.run_folder import RunFolder
from codistill_server.coordinator import Coordinator
from codistill_server.errors import RequestRejected
from codistill_server.observability.state import RunState
from codistill_server.rounds.events import Status
from codistill_server.storage.journal import Journal, JournalError
from codistill_worker import data
from codistill_worker.app import choose_device, use_deterministic_kernels
from codistill_worker.student import StudentLoop
from codistill_worker.teacher import TeacherLoop
from codistill_worker.training.checkpoints import CheckpointStore

__all__ = ["InProcessTransport", "run_in_process"]

_T = TypeVar("_T")


class InProcessTransport:
    """A student's session with a coordinator in the same process; see :class:`codistill.peer.base.Exchange`."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._session = 0
        self._inbox: list[pb.ExchangeReply] = []
        self._ended: str | None = None

    def join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        """Opens the session."""
        try:
            response = self._coordinator.join(request)
            self._session = response.session
            self._coordinator.open_stream(self._session, self)
        except RequestRejected as refused:
            raise PeerError(str(refused), ExitCode.REFUSED) from None
        return response

    def send(self, contribution: pb.Contribution) -> None:
        """Publishes a round's outputs."""
        try:
            self._coordinator.contribute(self._session, contribution, contribution.ByteSize())
        except RequestRejected as refused:
            raise PeerError(str(refused), ExitCode.REFUSED) from None

    def receive(self, number: int) -> pb.Targets:
        """Returns the round's targets, which are there as soon as every student has sent."""
        while self._inbox:
            reply = self._inbox.pop(0)
            if reply.targets.round == number and reply.HasField("targets"):
                return reply.targets
        raise PeerError(self._ended or f"round {number} was not closed although every student has contributed to it")

    def report(self, report: pb.ReportRequest) -> None:
        """Reports progress."""
        report.session = self._session
        self._coordinator.report(report)

    def undelivered(self) -> Sequence[pb.Measurement]:
        """Returns nothing: what is reported arrives at once."""
        return ()

    def leave(self, reason: pb.LeaveReason.ValueType, message: str) -> None:
        """Ends the session."""
        self._coordinator.leave(pb.LeaveRequest(session=self._session, reason=reason, message=message))

    def close(self) -> None:
        """Breaks the session if it is open."""
        self._coordinator.close_stream(self._session, self)

    def reply(self, reply: bytes) -> None:
        """Takes a reply from the coordinator."""
        self._inbox.append(pb.ExchangeReply.FromString(reply))

    def end(self, status: Status, message: str) -> None:
        """Takes from the coordinator that the session is over."""
        self._ended = f"{status.value}: {message}"


def run_in_process(experiment: Experiment, folder: RunFolder, view: View, stop: threading.Event) -> ExitCode:
    """Trains every student of an experiment in this process.

    Args:
        experiment: what to run.
        folder: the run's folder, started; a run that it holds is gone on with.
        view: where progress is shown.
        stop: set to stop after the round under way.

    Raises:
        PeerError: a student cannot be trained.
    """
    use_deterministic_kernels()
    settings = experiment.exchange.journal
    try:
        journal = Journal(
            folder.journal_file, identity(experiment), settings.durability, may_grow=settings.keep == "all"
        )
    except JournalError as error:
        raise PeerError(str(error), ExitCode.CONFIGURATION) from error
    recorder = RecordWriter(folder.events_file, folder.metrics_file)
    observations = RunState(experiment, recorder.write)
    coordinator = Coordinator(experiment, journal, observations, _submit)
    try:
        with Watchdog() as watchdog:
            learners = _learners(experiment, folder, coordinator, watchdog)
            for learner in learners:
                learner.join()
            return _train(learners, coordinator, view, stop)
    except JournalError as error:
        raise PeerError(str(error)) from error
    finally:
        coordinator.close()
        recorder.close()


def _submit(work: Callable[[], _T], done: Callable[[_T], None], *, heavy: bool) -> None:
    """Makes targets as the server does: at once, on one thread."""
    del heavy
    torch.set_num_threads(1)
    done(work())


def _learners(
    experiment: Experiment, folder: RunFolder, coordinator: Coordinator, watchdog: Watchdog
) -> list[StudentLoop | TeacherLoop]:
    datasets: dict[tuple[str, torch.device], data.Dataset] = {}
    learners: list[StudentLoop | TeacherLoop] = []
    for position, name in enumerate(experiment.participants):
        plan = experiment.teacher_plan(name) if name in experiment.teacher_names else experiment.plan(name)
        device = choose_device(plan.training.device, position)
        # Students differ in how they augment a data set, never in which; one copy a device serves them all.
        key = (plan.data.model_copy(update={"augment": Augment()}).model_dump_json(), device)
        if key not in datasets:
            datasets[key] = data.load(plan.data, device)
        exchange = InProcessTransport(coordinator)
        if isinstance(plan, TeacherPlan):
            learners.append(TeacherLoop(experiment, plan, datasets[key], device, exchange, watchdog=watchdog))
            continue
        store = CheckpointStore(folder.student(name).path)
        learners.append(StudentLoop(experiment, plan, datasets[key], device, exchange, store, watchdog=watchdog))
    return learners


def _train(
    learners: list[StudentLoop | TeacherLoop], coordinator: Coordinator, view: View, stop: threading.Event
) -> ExitCode:
    while not all(learner.done for learner in learners):
        if stop.is_set():
            for learner in learners:
                learner.stop()
            view.update(coordinator.snapshot())
            return ExitCode.INTERRUPTED
        # Students resume at the rounds of their own checkpoints; those behind catch up from the journal.
        behind = min(learner.round for learner in learners)
        turn = [learner for learner in learners if learner.round == behind]
        for learner in turn:
            learner.begin_round()
        for learner in turn:
            learner.end_round()
        view.offer(coordinator.snapshot)
    for learner in learners:
        learner.finish()
    view.update(coordinator.snapshot())
    return ExitCode.OK
