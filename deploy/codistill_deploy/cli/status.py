"""Tells where a run stands: asks its server, or reads what one left that does not run any more."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from typing import cast

import grpc
from rich.console import Console
from rich.text import Text

from codistill.process.exit_codes import ExitCode
from codistill.rundir import records
from codistill.rundir.history import History, read
from codistill.rundir.layout import RunLayout
from codistill.rundir.records import Happened
from codistill.v1 import distillation_pb2 as pb
from codistill.v1.distillation_pb2_grpc import DistillationStub
from codistill.wire import diagnose
from codistill.wire.security import REFUSALS, Security
from codistill_deploy.console.progress import status_table
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder

__all__ = ["add_supervisor_events", "fetch_status", "print_status", "recorded"]

_SECONDS = 5.0
_EVENTS = 5
_UNBOUNDED = 10_000


def fetch_status(address: str, security: Security | None = None) -> pb.Run:
    """Returns where the run of a server stands.

    Args:
        address: the server's "HOST:PORT".
        security: TLS and token.

    Raises:
        CommandError: there is no server of ours at the address, or it lets us not in.
        SecurityError: a certificate or key cannot be used.
    """
    security = security or Security()
    with security.channel(address) as channel:
        try:
            return DistillationStub(channel).GetRun(pb.GetRunRequest(), timeout=_SECONDS)
        except grpc.RpcError as error:
            call = cast("grpc.Call", error)  # what a failed call raises is the call itself
            code, details = call.code(), " ".join(str(call.details()).split())
    if code in REFUSALS:
        raise CommandError(f"server {address} refused: {details}", ExitCode.REFUSED)
    wrong = diagnose.explain(address, security) if code is grpc.StatusCode.UNAVAILABLE else None
    if wrong is not None:
        raise CommandError(f"server {address}: {wrong}", ExitCode.REFUSED)
    raise CommandError(
        f"server {address} does not answer: {code.name}: {details}; check the address with --server, or name the run's "
        "folder with --run-dir",
        ExitCode.UNREACHABLE,
    )


def recorded(folder: RunFolder) -> str | None:
    """Returns one line on the run whose records a folder holds and that no server serves; None where there is none.

    Raises:
        ExperimentError: its experiment cannot be used.
        CommandError: its records cannot be read.
    """
    if folder.served or not folder.experiment_file.exists() or not folder.metrics_file.exists():
        return None
    try:
        history = read(folder.path)
    except (OSError, ValueError) as error:
        raise CommandError(f"run folder {folder.path} cannot be read: {error}") from error
    experiment = history.experiment
    reached = max(
        (
            *(span.last + 1 for span in history.rounds),
            *(each.round for student in history.students for each in (*student.pace, *student.train, *student.test)),
        ),
        default=0,
    )
    if history.complete:
        stage = f"complete at round {reached}"
    elif folder.held:
        stage = f"under way without a server, at round {reached} of {history.total_rounds or '?'} when it last reported"
    else:
        stage = f"stopped at round {reached} of {history.total_rounds or '?'}; go on with: {_again(history, folder)}"
    return f"{experiment.name} ({experiment.distillation.title}): {stage}"


def _again(history: History, folder: RunFolder) -> str:
    """Returns the command that goes on with a run: the one that started it, which knows where models and data are."""
    command = list(history.info.command)
    if command[1:2] not in (["run"], ["serve"], ["ray"]):
        mode = ["--in-process"] if history.info.mode == "in-process" else []
        command = ["codistill", "run", str(folder.experiment_file), *mode]
    if not any(part == "--run-dir" or part.startswith("--run-dir=") for part in command):
        command += ["--run-dir", str(folder.path)]
    if command[1] == "run" and "--resume" not in command:
        command.append("--resume")
    return shlex.join(command)


def add_supervisor_events(run: pb.Run, folder: RunLayout) -> None:
    """Adds what `codistill run` wrote down of its processes to the events of a run, in order of time."""
    try:
        for record in records.read(folder.supervisor_file):
            if isinstance(record, Happened):
                run.events.add(
                    unix_seconds=record.time, kind=record.what, student=record.student, message=record.message
                )
    except (OSError, ValueError) as error:
        raise CommandError(f"{folder.supervisor_file} cannot be read: {error}") from error
    run.events.sort(key=lambda event: event.unix_seconds)


def print_status(run: pb.Run, console: Console) -> None:
    """Prints where a run stands, whom it waits for, and what happened last."""
    if not console.is_terminal:  # a file or a pipe has no width to wrap for
        console = Console(file=console.file, width=_UNBOUNDED, highlight=False)
    stage = "complete" if run.complete else f"round {run.frontier} of {run.total_rounds or '?'}"
    rate = f", {run.rounds_per_second:.1f} rounds/s" if run.rounds_per_second else ""
    console.print(Text(f"{run.name} ({run.method}): {stage}{rate}", style="bold"))
    console.print(status_table(run))
    if run.waiting_for and run.waiting_seconds > 0:
        console.print(
            f"round {run.frontier} has waited {run.waiting_seconds:.1f} s for {', '.join(run.waiting_for)}",
            soft_wrap=True,
        )
    for event in run.events[-_EVENTS:]:
        at = datetime.fromtimestamp(event.unix_seconds, UTC).astimezone().strftime("%H:%M:%S")
        who = f" {event.student}" if event.student else ""
        told = event.message if event.message.startswith(event.kind) else f"{event.kind}: {event.message}"
        console.print(Text(f"{at}{who} {told if event.message else event.kind}", style="dim"), soft_wrap=True)
