"""A worker as a process: loads the data, builds a student or teacher, and runs it to the end of the run."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from codistill.config.experiment import Experiment
from codistill.config.plans import TeacherPlan
from codistill.peer.errors import Interrupted, PeerError
from codistill.peer.grpc import GrpcTransport
from codistill.process.exit_codes import ExitCode
from codistill.process.plugins import LoadError
from codistill.process.watchdog import Watchdog
from codistill.rundir.info import record_code
from codistill.rundir.layout import RunLayout
from codistill.wire.security import Security
from codistill_worker import data
from codistill_worker.errors import ConfigurationError, is_out_of_memory, refuse_exit
from codistill_worker.student import StudentLoop
from codistill_worker.teacher import TeacherLoop
from codistill_worker.training.checkpoints import CheckpointStore

__all__ = ["WorkOptions", "check_participant", "choose_device", "use_deterministic_kernels", "work"]

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


def choose_device(wanted: str, position: int) -> torch.device:
    """Return the device to train on.

    Args:
        wanted: `training.device`; "auto" takes the GPUs in turn, or the CPU where there is none.
        position: of the participant among the experiment's participants, from 0.

    Raises:
        ConfigurationError: the device is not there.
    """
    count = torch.cuda.device_count()
    if wanted == "auto":
        return torch.device("cuda", position % count) if count else torch.device("cpu")
    if wanted == "cpu":
        return torch.device("cpu")
    if not count:
        raise ConfigurationError(f"training.device: {wanted!r}, but PyTorch finds no GPU here; allowed: auto, cpu")
    _, _, suffix = wanted.partition(":")
    index = int(suffix) if suffix else position % count
    if index >= count:
        allowed = ", ".join(f"cuda:{present}" for present in range(count))
        raise ConfigurationError(
            f"training.device: {wanted!r}, but there are {count} GPUs; allowed: auto, cpu, {allowed}"
        )
    return torch.device("cuda", index)


def use_deterministic_kernels() -> None:
    """Set cuDNN to algorithms that give the same bits each time."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


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
    torch.set_num_threads(plan.training.threads)
    use_deterministic_kernels()
    device = choose_device(plan.training.device, experiment.participants.index(options.participant))
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
            with refuse_exit(title):
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
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise PeerError(
            f"{title} ran out of memory on {device}: {line}; lower training.batch_size, or set "
            "training.precision: bfloat16",
            ExitCode.OUT_OF_MEMORY,
        ) from error
    finally:
        transport.close()


def _drive(loop: StudentLoop | TeacherLoop, stop: threading.Event) -> ExitCode:
    try:
        loop.join()
    except Interrupted:
        return _stopped()
    try:
        with refuse_exit(loop.title):
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
