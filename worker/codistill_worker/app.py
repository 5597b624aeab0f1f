"""A worker as a process: loads the data, builds a student or teacher, and runs it to the end of the run."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from codistill.config.experiment import Experiment
from codistill.config.plans import TeacherPlan
from codistill.peer.errors import Interrupted
from codistill.peer.grpc import GrpcTransport
from codistill.process.exit_codes import ExitCode
from codistill.process.plugins import LoadError
from codistill.process.watchdog import Watchdog
from codistill.rundir.info import record_code
from codistill.rundir.layout import RunLayout
from codistill.wire.security import Security
from codistill_worker import data
from codistill_worker.errors import ConfigurationError, participants_errors
from codistill_worker.student import StudentLoop
from codistill_worker.teacher import TeacherLoop
from codistill_worker.training.checkpoints import CheckpointStore
from codistill_worker.training.devices import set_kernels
from codistill_worker.training.gpus import take_device

__all__ = ["WorkOptions", "check_participant", "work"]

_log = logging.getLogger(__name__)
_SESSION_OVER = (ExitCode.UNREACHABLE, ExitCode.SUPERSEDED, ExitCode.REFUSED)
_STUDENT_INTACT = (ExitCode.UNREACHABLE, ExitCode.GAVE_UP)
_LOADING = 12  # times training.hang_after: a download, or an index of millions of files
_KEEPALIVE = 2 / 3  # of the server's exchange.keepalive: the worker can do something about a dead link


@dataclass(frozen=True)
class WorkOptions:
    """The options of a worker.

    Attributes:
        participant: the student to train, or the teacher to run.
        server: the aggregation server's "HOST:PORT".
        run_dir: the run folder, which holds a student's checkpoints.
        security: TLS and token.
        find: returns the server's present address, as it may have moved; None while it is not known.
    """

    participant: str
    server: str
    run_dir: Path
    security: Security = field(default_factory=Security)
    find: Callable[[], str | None] = lambda: None


def check_participant(experiment: Experiment, name: str) -> None:
    """Check that an experiment has a participant of a name.

    Raises:
        ConfigurationError: it has no participant of that name.
    """
    if name not in experiment.participants:
        raise ConfigurationError(
            f"student: {name!r} is not one of the experiment's; allowed: {', '.join(experiment.participants)}"
        )


def work(experiment: Experiment, options: WorkOptions, stop: threading.Event | None = None) -> ExitCode:
    """Train one student, or run one teacher, until the run's end, or until SIGTERM, SIGINT or `stop`.

    Raises:
        PeerError: the worker cannot continue; the text is one line, its code the exit code.
        SecurityError: a certificate or key cannot be used.
    """
    stop = stop or threading.Event()
    _stop_on_signals(stop)
    check_participant(experiment, options.participant)
    teaches = options.participant in experiment.teacher_names
    plan = experiment.teacher_plan(options.participant) if teaches else experiment.plan(options.participant)
    set_kernels(plan.training)  # before anything starts CUDA, whose libraries read the environment once
    device = take_device(experiment, options.participant)
    layout = RunLayout(options.run_dir)
    title = f"{'teacher' if teaches else 'student'} {options.participant!r}"
    transport = GrpcTransport(
        options.server,
        connect_timeout=experiment.exchange.connect_timeout,
        give_up_after=experiment.exchange.give_up_after,
        silence_after=3 * experiment.exchange.waiting_notice + 2,
        keepalive=experiment.exchange.keepalive * _KEEPALIVE,
        stop=stop,
        security=options.security,
        find=options.find,
    )
    try:
        with Watchdog() as watchdog:
            watchdog.begin(
                f"{title} at loading its data and its model",
                _LOADING * plan.training.hang_after,
            )
            with participants_errors(title, device):
                dataset = data.load(plan.data, device)
                _log.info("data digests: %s", ", ".join(f"{name} {digest}" for name, digest in dataset.digests.items()))
                if isinstance(plan, TeacherPlan):
                    loop = TeacherLoop(experiment, plan, dataset, device, transport, watchdog=watchdog)
                else:
                    store = CheckpointStore(layout.student(options.participant).path)
                    loop = StudentLoop(experiment, plan, dataset, device, transport, store, watchdog=watchdog)
                record_code(layout)
                code = _drive(loop, stop)
                record_code(layout)  # what was imported by a computed name meanwhile
                return code
    except LoadError as error:
        raise ConfigurationError(str(error)) from error.__cause__
    finally:
        transport.close()


def _drive(loop: StudentLoop | TeacherLoop, stop: threading.Event) -> ExitCode:
    try:
        loop.join()
    except Interrupted:
        return _stopped()
    try:
        with loop.errors():
            while not loop.done:
                if stop.is_set():
                    loop.stop()
                    return _stopped()
                loop.begin_step()
                loop.end_step()
            loop.finish()
    except Interrupted:
        loop.stop()
        return _stopped()
    except Exception as error:
        code = getattr(error, "code", None)
        if code in _STUDENT_INTACT:
            loop.keep()
        if code not in _SESSION_OVER:
            line = str(error) if isinstance(code, ExitCode) else f"{type(error).__name__}: {error}"
            loop.fail(line.splitlines()[0])
        raise
    return ExitCode.OK


def _stopped() -> ExitCode:
    _log.info("stopped on a signal; the same command resumes from here")
    return ExitCode.INTERRUPTED


def _stop_on_signals(stop: threading.Event) -> None:
    if threading.current_thread() is not threading.main_thread():
        return

    def handle(signal_number: int, frame: object) -> None:
        del signal_number, frame
        stop.set()  # logs nothing: a signal may come while a line is written, and a second line would be an error

    handler: Callable[[int, object], None] = handle
    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)
