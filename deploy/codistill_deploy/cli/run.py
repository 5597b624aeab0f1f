"""The running of one run, shown on the console: what stops it, what protects it, its folder, its view, its report."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from codistill.config.experiment import Experiment
from codistill.process.exit_codes import ExitCode
from codistill.rundir.info import Mode
from codistill_deploy.run_folder import RunFolder
from codistill_deploy.supervise.restart_policy import DEFAULT_RESTARTS

if TYPE_CHECKING:
    from codistill.wire.security import Security
    from codistill_deploy.console.progress import View

__all__ = [
    "Wire",
    "console",
    "find_modules_beside",
    "read_security_for_both",
    "run_here",
    "run_in_folder",
    "stop_on_signals",
    "write_report",
]

# As in the command line, what imports torch or gRPC is imported where it is used.

console = Console(highlight=False)
_log = logging.getLogger("codistill")


@dataclass(frozen=True)
class Wire:
    """How the processes of a local run reach one another."""

    security: Security | None = None
    listen: str = "127.0.0.1:0"
    metrics: str = "127.0.0.1:0"
    announce: bool = False
    insecure: bool = False


def read_security_for_both(
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    tls_ca: Path | None = None,
    token_file: Path | None = None,
) -> Security:
    """Reads what protects a run whose server and workers are all started here, and checks it before they are.

    Raises:
        SecurityError: a file or a variable cannot be used.
    """
    from codistill.wire.security import read

    security = read(tls_cert, tls_key, tls_ca, token_file)
    security.server_credentials()
    security.channel("127.0.0.1:1").close()
    return security


def run_here(
    experiment: Experiment,
    folder: RunFolder,
    title: str,
    source: Path,
    stop: threading.Event,
    resume: bool,
    in_process: bool,
    wire: Wire,
    restarts: int = DEFAULT_RESTARTS,
    *,
    report: bool = False,
) -> ExitCode:
    """Runs one experiment in one folder on this machine, shown on the console.

    Args:
        experiment: what to run.
        folder: the run's folder.
        title: what the view calls it.
        source: the experiment's file, for errors and for modules beside it.
        stop: set to stop: the students are saved first.
        resume: go on with the run that the folder holds.
        in_process: all students in this process, without a server.
        wire: how the processes reach one another, where there are some.
        restarts: how often each process that dies is started again.
        report: write the report at the end.

    Returns:
        OK, or INTERRUPTED if it was stopped.

    Raises:
        CommandError: it cannot be run, or a process ended that the run needs.
    """
    from codistill.wire.security import Security
    from codistill_deploy.launch.local import LocalOptions, run_local
    from codistill_deploy.launch.preflight import check
    from codistill_server.app import ServeOptions
    from codistill_server.app import check as check_server

    search_path = source.parent
    find_modules_beside(source)
    security = wire.security or Security()
    check_server(ServeOptions(wire.listen, folder.path, wire.metrics, wire.insecure, security=security))
    check(experiment, str(source))
    folder.check(experiment, resume=resume)

    def go(view: View, lock: int) -> ExitCode:
        if in_process:
            from codistill_deploy.launch.in_process import run_in_process

            with _logged_under("" if title == experiment.name else title):
                return run_in_process(experiment, folder, view, stop)
        options = LocalOptions(
            wire.listen,
            wire.metrics,
            announce=wire.announce,
            search_path=search_path,
            restarts=restarts,
            keep=(lock,),
            security=security,
            insecure=wire.insecure,
        )
        return run_local(experiment, folder, view, stop, options)

    mode: Mode = "in-process" if in_process else "grpc"
    return run_in_folder(experiment, folder, title, go, mode=mode, resume=resume, report=report)


@contextlib.contextmanager
def _logged_under(title: str) -> Generator[None]:
    """Puts the title of one of several runs before what is logged, as its students have the names of the others'."""
    make = logging.getLogRecordFactory()

    def titled(*args: Any, **more: Any) -> logging.LogRecord:
        record = make(*args, **more)
        record.msg, record.args = f"{title}: {record.getMessage()}", None
        return record

    if title:
        logging.setLogRecordFactory(titled)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)


def run_in_folder(
    experiment: Experiment,
    folder: RunFolder,
    title: str,
    go: Callable[[View, int], ExitCode],
    *,
    mode: Mode,
    resume: bool,
    report: bool,
) -> ExitCode:
    """Starts a run's folder, and runs what `go` does, given a view on the console and the lock on the folder.

    The report is written of a run that failed too, but not where this one was refused: the folder is another one's.

    Raises:
        CommandError: the folder cannot be this run's, or `go` raised it.
    """
    from codistill_deploy.console.progress import make_view

    with folder.hold(waiting=lambda: console.print("waiting for the processes of an earlier run to end")) as lock:
        folder.start(experiment, mode=mode, resume=resume)
        with contextlib.ExitStack() as ending:
            view = make_view(console)
            view.start(title)
            ending.callback(view.finish)
            try:
                code = go(view, lock)
            except Exception:
                ending.close()
                if report and folder.metrics_file.exists():
                    write_report(folder.path)
                raise
        if report:
            write_report(folder.path)
        return code


def write_report(folder: Path) -> None:
    """Writes the report; where it cannot be, says so, as the run ends as it does with or without one."""
    from codistill_deploy import report as reports

    try:
        written = reports.write(folder)
    except reports.ReportError as error:
        _log.warning(
            "%s; what was trained is untouched; write its report later with: codistill report %s", error, folder
        )
    else:
        console.print(f"report: {written}", soft_wrap=True)


def find_modules_beside(experiment: Path) -> None:
    """Lets `package.module:callable` be found in the working folder and in the experiment file's."""
    places = (str(experiment.resolve().parent), str(Path.cwd()))
    sys.path[:0] = [each for each in places if each not in sys.path]  # of several runs each asks for it


def stop_on_signals() -> threading.Event:
    """Returns an event that the first Ctrl-C or SIGTERM sets; the second ends the process at once."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        del number, frame
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return stop
