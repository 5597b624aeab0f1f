"""The status of a run without a server, from the records in its folder: of the run, and of its processes."""

from __future__ import annotations

import shlex

from codistill.rundir import records
from codistill.rundir.history import History, read
from codistill.rundir.layout import RunLayout
from codistill.rundir.records import Happened
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder

__all__ = ["describe_recorded", "supervisor_events"]


def describe_recorded(folder: RunFolder) -> str | None:
    """Return one line on the run in a folder that no server serves; None where there is none.

    Raises:
        ExperimentError: its experiment cannot be used.
        CommandError: its records cannot be read.
    """
    if folder.has_server or not folder.experiment_file.exists() or not folder.metrics_file.exists():
        return None
    try:
        history = read(folder.path)
    except (OSError, ValueError) as error:
        raise CommandError(f"run folder {folder.path} cannot be read: {error}") from error
    reached = _steps_reached(history)
    of_total = f"step {reached} of {history.total_steps or '?'}"
    if history.complete or _is_complete(history):
        stage = f"complete at step {reached}"
    elif folder.in_use:
        stage = f"under way without a server, at {of_total} when it last reported"
    else:
        stage = f"stopped at {of_total}; continue with: {_resume_command(history, folder)}"
    return f"{history.experiment.name} ({history.experiment.distillation.title}): {stage}"


def _is_complete(history: History) -> bool:
    """Return whether every participant left as finished, with or without a test after its last epoch."""
    ends = [event.what for event in history.events if event.what in ("complete", "joined", "resumed")]
    return ends[-1:] == ["complete"]


def _steps_reached(history: History) -> int:
    reported = (
        record.steps_trained
        for participant in history.participants
        for record in (*participant.pace, *participant.train, *participant.test)
    )
    return max((*(span.steps_trained for span in history.rounds), *reported), default=0)


def _resume_command(history: History, folder: RunFolder) -> str:
    """Return the command that started the run, which knows where models and data are, made to resume it."""
    command = list(history.info.command)
    if command[1:2] not in (["run"], ["serve"], ["ray"]):
        mode = ["--in-process"] if history.info.mode == "in-process" else []
        command = ["codistill", "run", str(folder.experiment_file), *mode]
    if not any(argument == "--run-dir" or argument.startswith("--run-dir=") for argument in command):
        command += ["--run-dir", str(folder.path)]
    if command[1] == "run" and "--resume" not in command:
        command.append("--resume")
    return shlex.join(command)


def supervisor_events(folder: RunLayout) -> list[Happened]:
    """Return what `codistill run` recorded of its processes, oldest first; the server does not know of these events.

    Raises:
        CommandError: the records cannot be read.
    """
    try:
        return [record for record in records.read(folder.supervisor_file) if isinstance(record, Happened)]
    except (OSError, ValueError) as error:
        raise CommandError(f"{folder.supervisor_file} cannot be read: {error}") from error
