"""The processes of a run and their command lines: what follows the Python that runs them, on whatever machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from codistill.config.experiment import Experiment
from codistill.rundir.layout import ParticipantLayout
from codistill_deploy.run_folder import RunFolder

__all__ = ["ProcessSpec", "serve_arguments", "work_arguments", "worker_specs"]

_MODULE = ("-P", "-m", "codistill_deploy")  # with -m alone, Python would take modules of the working folder first


@dataclass(frozen=True)
class ProcessSpec:
    """The worker of one participant.

    Attributes:
        title: its name for people: "student 'a'".
        participant: its participant's name in the experiment.
        log: the file that holds its output.
        host_lock: the file that its actor locks on a Ray cluster.
        hang_after: its `training.hang_after`, in seconds.
    """

    title: str
    participant: str
    log: Path
    host_lock: Path
    hang_after: float


def worker_specs(experiment: Experiment, folder: RunFolder) -> list[ProcessSpec]:
    """Return the students' workers, then the teachers', in the experiment's order."""
    students = [
        _spec("student", folder.student(name), experiment.plan(name).training.hang_after) for name in experiment.names
    ]
    teachers = [
        _spec("teacher", folder.teacher(name), experiment.teacher_plan(name).training.hang_after)
        for name in experiment.teacher_names
    ]
    return students + teachers


def _spec(kind: str, layout: ParticipantLayout, hang_after: float) -> ProcessSpec:
    name = layout.path.name
    return ProcessSpec(f"{kind} {name!r}", name, layout.log, layout.host_lock, hang_after)


def serve_arguments(folder: RunFolder) -> list[str]:
    """Return the arguments of the server, without its addresses.

    The server stays after the run is complete. A worker whose Leave got no answer repeats it, also to a restarted server.
    """
    return [*_MODULE, "serve", *_run_arguments(folder), "--stay"]


def work_arguments(folder: RunFolder, participant: str) -> list[str]:
    """Return the arguments of a participant's worker, which finds the server by the folder."""
    return [*_MODULE, "work", *_run_arguments(folder), "--student", participant]


def _run_arguments(folder: RunFolder) -> list[str]:
    return [str(folder.experiment_file), "--run-dir", str(folder.path)]
