"""All participants of a run in one process, with the coordinator that the server runs.

For few GPUs, for tests, and as the reference of equality: a run over gRPC ends with the same bits.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import torch

from codistill.config.data import Augment
from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity
from codistill.config.plans import TeacherPlan
from codistill.peer.errors import PeerError
from codistill.peer.grpc_reports import Reports
from codistill.peer.steps import Failure
from codistill.process.exit_codes import ExitCode
from codistill.process.watchdog import Watchdog
from codistill.rundir.info import record_code
from codistill.rundir.storage import FolderGuard, unwritable
from codistill.rundir.writer import RecordWriter
from codistill.v1 import distillation_pb2 as pb
from codistill_deploy.console.progress import ProgressView
from codistill_deploy.run_folder import RunFolder
from codistill_server.coordinator import Coordinator
from codistill_server.errors import RequestRejected
from codistill_server.observability.state import RunState
from codistill_server.rounds.actions import Status
from codistill_server.storage.journal import Journal, JournalError
from codistill_worker import data
from codistill_worker.errors import participants_errors
from codistill_worker.student import StudentLoop
from codistill_worker.teacher import TeacherLoop
from codistill_worker.training.checkpoints import CheckpointStore
from codistill_worker.training.devices import set_kernels
from codistill_worker.training.gpus import check_gpus, choose_devices

__all__ = ["InProcessTransport", "run_in_process"]

_T = TypeVar("_T")


class InProcessTransport:
    """A participant's session with a coordinator in the same process.

    It implements :class:`codistill.peer.base.Transport` towards the participant's loop, and
    :class:`codistill_server.coordinator.Outbox` towards the coordinator.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._worker_id = secrets.randbits(64)
        self._session_id = 0
        self._open: pb.ExchangeRequest | None = None
        self._replies: list[pb.ExchangeResponse] = []
        self._reports = Reports(lambda: None)
        self._ended: RequestRejected | None = None

    def join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        """Open the session."""
        request.worker_id, request.session_id = self._worker_id, self._session_id
        with _rejections():
            response = self._coordinator.join(request)
            self._coordinator.open_stream(response.session_id, self)
        self._session_id, self._ended = response.session_id, None
        self._publish()
        return response

    def send(self, contribution: pb.ExchangeRequest) -> None:
        """Publish a round's outputs."""
        self._open = contribution
        if self._session_id:
            self._check_session()
            self._publish()
            self._check_session()

    def receive(self, round_number: int) -> pb.Targets:
        """Return the targets of a round, which are there as soon as every participant has sent."""
        while self._replies:
            reply = self._replies.pop(0)
            if reply.targets.round == round_number and reply.HasField("targets"):
                self._open = None
                return reply.targets
        self._check_session()
        raise PeerError(f"round {round_number} was not closed although every participant has contributed to it")

    def report(self, report: pb.ReportRequest) -> None:
        """Report progress."""
        self._reports.add(report)
        self._check_session()
        self._deliver()

    def undelivered(self) -> Sequence[pb.Measurement]:
        """Return the measurements that the coordinator rejected; all others arrive at once."""
        return self._reports.undelivered()

    def leave(self, reason: pb.LeaveReason.ValueType, message: str) -> None:
        """End the session; only a student that finished must be able to."""
        finished = reason == pb.LEAVE_REASON_FINISHED
        if not finished and (not self._session_id or self._ended is not None):
            return
        self._check_session()
        try:
            self._deliver()
            with _rejections():
                self._coordinator.leave(pb.LeaveRequest(session_id=self._session_id, reason=reason, message=message))
        except PeerError:
            if finished:
                raise

    def close(self) -> None:
        """Break the session if it is open."""
        self._coordinator.close_stream(self._session_id, self)

    def reply(self, reply: bytes) -> None:
        """Store a reply of the coordinator for :meth:`receive`."""
        self._replies.append(pb.ExchangeResponse.FromString(reply))

    def end(self, status: Status, message: str) -> None:
        """Record that the coordinator ended the session."""
        self._ended = RequestRejected(status, message)

    def _check_session(self) -> None:
        if not self._session_id:
            raise RuntimeError("send and receive come after join")
        if self._ended is not None:
            raise _peer_error(self._ended)

    def _publish(self) -> None:
        """Hand the open contribution, if there is one, to the coordinator; a rejection ends the session."""
        if self._open is None:
            return
        try:
            self._coordinator.contribute(self._session_id, self._open, self._open.ByteSize())
        except RequestRejected as rejected:
            self._ended = rejected

    def _deliver(self) -> None:
        with _rejections():
            self._reports.flush(self._session_id, self._coordinator.report)


@contextlib.contextmanager
def _rejections() -> Generator[None, None, None]:
    """Raise what the coordinator rejects as every transport does."""
    try:
        yield
    except RequestRejected as rejected:
        raise _peer_error(rejected) from None


def _peer_error(rejected: RequestRejected) -> PeerError:
    superseded = rejected.status is Status.SUPERSEDED
    failure = Failure(rejected.status.name, str(rejected), superseded=superseded)
    return PeerError(failure.details, failure.exit_code)


def run_in_process(experiment: Experiment, folder: RunFolder, view: ProgressView, stop: threading.Event) -> ExitCode:
    """Train every student of an experiment in this process.

    Args:
        experiment: what to run.
        folder: the run's folder, started; a run that it holds is resumed.
        view: where progress is shown.
        stop: set to stop after the step under way.

    Returns:
        OK, or INTERRUPTED if it was stopped.

    Raises:
        PeerError: a student cannot be trained.
    """
    set_kernels(experiment.training)  # before anything starts CUDA, whose libraries read the environment once
    journal = _open_journal(experiment, folder)
    try:
        writer = RecordWriter(folder.events_file, folder.metrics_file)
    except OSError as error:
        journal.close()
        raise PeerError(*unwritable(folder.path, error)) from error
    files = (folder.experiment_file, folder.journal_file, folder.metrics_file, folder.events_file)
    guard = FolderGuard("run folder", folder.path, "its journal, records and checkpoints", files)
    coordinator = Coordinator(experiment, journal, RunState(experiment, writer.write), _submit)
    try:
        with Watchdog() as watchdog:
            loops = _loops(experiment, folder, coordinator, watchdog)
            for loop in loops:
                with loop.errors():
                    loop.join()
            record_code(folder)
            code = _train(loops, coordinator, view, stop, guard)
            record_code(folder)
            return code
    except JournalError as error:
        raise PeerError(str(error), error.code or ExitCode.ERROR) from error
    finally:
        coordinator.close()
        writer.close()


def _open_journal(experiment: Experiment, folder: RunFolder) -> Journal:
    settings = experiment.exchange.journal
    try:
        return Journal(folder.journal_file, identity(experiment), settings.durability, may_grow=settings.keep == "all")
    except JournalError as error:
        raise PeerError(str(error), error.code or ExitCode.CONFIGURATION) from error


def _submit(work: Callable[[], _T], done: Callable[[_T], None], *, heavy: bool) -> None:
    """Compute targets at once, on one thread as the server does."""
    del heavy
    torch.set_num_threads(1)
    done(work())


def _loops(
    experiment: Experiment, folder: RunFolder, coordinator: Coordinator, watchdog: Watchdog
) -> list[StudentLoop | TeacherLoop]:
    datasets: dict[tuple[str, torch.device], data.Dataset] = {}
    loops: list[StudentLoop | TeacherLoop] = []
    devices = choose_devices(experiment)
    check_gpus(devices)
    for name, device in zip(experiment.participants, devices, strict=True):
        plan = experiment.teacher_plan(name) if name in experiment.teacher_names else experiment.plan(name)
        # Students differ in how they augment a data set, never in which; one copy a device serves them all.
        key = (plan.data.model_copy(update={"augment": Augment()}).model_dump_json(), device)
        transport = InProcessTransport(coordinator)
        title = f"{'teacher' if isinstance(plan, TeacherPlan) else 'student'} {name!r}"
        with participants_errors(title, device):
            if key not in datasets:
                datasets[key] = data.load(plan.data, device)
            if isinstance(plan, TeacherPlan):
                loops.append(TeacherLoop(experiment, plan, datasets[key], device, transport, watchdog=watchdog))
                continue
            store = CheckpointStore(folder.student(name).path)
            loops.append(StudentLoop(experiment, plan, datasets[key], device, transport, store, watchdog=watchdog))
    return loops


def _train(
    loops: Sequence[StudentLoop | TeacherLoop],
    coordinator: Coordinator,
    view: ProgressView,
    stop: threading.Event,
    guard: FolderGuard,
) -> ExitCode:
    while not all(loop.done for loop in loops):
        if stop.is_set():
            for loop in loops:
                with loop.errors():
                    loop.stop()
            view.update(coordinator.snapshot())
            return ExitCode.INTERRUPTED
        # Students resume at the steps of their checkpoints; those behind catch up from the journal.
        step = min(loop.step for loop in loops)
        behind = [loop for loop in loops if loop.step == step]
        for loop in behind:
            with loop.errors():
                loop.launch_step()  # each on its own GPU, before the first one's outputs are waited for
        for loop in behind:
            with loop.errors():
                loop.begin_step()
        for loop in behind:
            with loop.errors():
                loop.end_step()
        guard.check()
        view.offer(coordinator.snapshot)
    for loop in loops:
        with loop.errors():
            loop.finish()
    guard.check()
    view.update(coordinator.snapshot())
    return ExitCode.OK
