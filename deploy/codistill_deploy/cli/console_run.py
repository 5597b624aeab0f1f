"""Run one experiment in its folder, shown on the console: its checks, its progress, its report."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codistill.config.experiment import Experiment
from codistill.process.exit_codes import ExitCode
from codistill.rundir import records
from codistill.rundir.info import Mode
from codistill.rundir.records import Measured
from codistill_deploy.cli.options import SecurityFiles
from codistill_deploy.cli.process_setup import find_modules_beside
from codistill_deploy.cli.stdio import console
from codistill_deploy.run_folder import RunFolder
from codistill_deploy.supervise.restart_policy import DEFAULT_RESTARTS

if TYPE_CHECKING:
    from codistill.wire.security import Security
    from codistill_deploy.console.progress import ProgressView

__all__ = ["Wire", "read_security_for_both", "run_here", "run_in_folder", "write_report"]

# As in the commands, what imports torch or gRPC is imported where it is used.

_log = logging.getLogger("codistill")


@dataclass(frozen=True)
class Wire:
    """How the processes of a local run reach one another.

    Attributes:
        security: TLS and token.
        listen: the server's "HOST:PORT"; port 0 takes a free one.
        metrics: the "HOST:PORT" of the live page and the metrics.
        announce: print the addresses once the server is up.
        insecure: listen beyond this machine although nothing protects the port.
        working_folder: in which they start; by default this process's, before a user's code can change it.
    """

    security: Security | None = None
    listen: str = "127.0.0.1:0"
    metrics: str = "127.0.0.1:0"
    announce: bool = False
    insecure: bool = False
    working_folder: Path = field(default_factory=Path.cwd)


def read_security_for_both(files: SecurityFiles) -> Security:
    """Read what protects a run whose server and workers all start here, and check it for both before they do.

    Raises:
        SecurityError: a file or a variable cannot be used.
    """
    security = files.read()
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
    """Run one experiment in one folder on this machine, shown on the console.

    Args:
        experiment: what to run.
        folder: the run's folder.
        title: what the view calls it.
        source: the absolute path of the experiment's file, for errors and for modules beside it.
        stop: set to stop: the students are saved first.
        resume: resume the run in the folder.
        in_process: all participants in this process, without a server.
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

    find_modules_beside(source)
    security = wire.security or Security()
    check_server(ServeOptions(wire.listen, folder.path, wire.metrics, wire.insecure, security=security))
    check(experiment, str(source))
    folder.check(experiment, resume=resume)

    def run(view: ProgressView, lock: int) -> ExitCode:
        if in_process:
            from codistill_deploy.launch.in_process import run_in_process

            with _logged_under("" if title == experiment.name else title):
                return run_in_process(experiment, folder, view, stop)
        options = LocalOptions(
            wire.listen,
            wire.metrics,
            announce=wire.announce,
            search_path=source.resolve().parent,
            working_folder=wire.working_folder,
            restarts=restarts,
            inherited=(lock,),
            security=security,
            insecure=wire.insecure,
        )
        return run_local(experiment, folder, view, stop, options)

    mode: Mode = "in-process" if in_process else "grpc"
    return run_in_folder(experiment, folder, title, run, mode=mode, resume=resume, report=report)


@contextlib.contextmanager
def _logged_under(title: str) -> Generator[None]:
    """Put the title of one of several runs before each log line, as all of them have participants of the same names."""
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
    run: Callable[[ProgressView, int], ExitCode],
    *,
    mode: Mode,
    resume: bool,
    report: bool,
) -> ExitCode:
    """Start a run's folder, then call `run` with a view on the console and the descriptor of the folder's lock.

    A run that failed has a report too, if it has measured something. A run that was refused has none, as the folder belongs to another one.

    Raises:
        CommandError: the folder cannot be this run's, or `run` raised it.
    """
    from codistill_deploy.console.progress import make_view

    with folder.hold(waiting=lambda: console.print("waiting for the processes of an earlier run to end")) as lock:
        folder.start(experiment, mode=mode, resume=resume)
        with contextlib.ExitStack() as shown:
            view = make_view(console)
            view.start(title)
            shown.callback(view.finish)
            try:
                code = run(view, lock)
            except Exception as error:
                shown.close()
                if report and _has_measured(folder):
                    line = _save_report(folder.path)
                    if line is not None:
                        error.add_note(line)  # shown after the error
                raise
        if report and (code is ExitCode.OK or _has_measured(folder)):
            write_report(folder.path)
        return code


def _has_measured(folder: RunFolder) -> bool:
    """Return whether a run has come far enough for a report to show something."""
    try:
        return any(isinstance(record, Measured) for record in records.read(folder.metrics_file))
    except ValueError:
        return True  # making the report then says what is wrong with it
    except OSError:
        return False


def write_report(folder: Path) -> None:
    """Write the report of a run or a comparison, and print where it is."""
    line = _save_report(folder)
    if line is not None:
        console.print(line, soft_wrap=True)


def _save_report(folder: Path) -> str | None:
    """Write a report and return a line that says where; only warn where that fails, as the exit code is the run's."""
    from codistill_deploy import report as reports

    try:
        return f"report: {reports.write(folder)}"
    except reports.ReportError as error:
        _log.warning(
            "%s; what was trained is untouched; write its report later with: codistill report %s", error, folder
        )
        return None
