"""A run's parts and their command lines: what follows the Python that runs them, wherever that is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from codistill.config.experiment import Experiment
from codistill.rundir.layout import ParticipantLayout
from codistill_deploy.run_folder import RunFolder

__all__ = ["ProcessSpec", "serve_arguments", "work_arguments", "workers"]

_MODULE = ("-m", "codistill_deploy")


@dataclass(frozen=True)
class ProcessSpec:
    """One that takes part in a run.

    Attributes:
        title: as people call it.
        name: its name in the experiment.
        log: what its worker prints.
        host_lock: what its actor holds on a Ray cluster.
        hang_after: its `training.hang_after`.
    """

    title: str
    name: str
    log: Path
    host_lock: Path
    hang_after: float


def workers(experiment: Experiment, folder: RunFolder) -> list[ProcessSpec]:
    """Returns the students, then the teachers, in the experiment's order."""
    return [
        *(
            _spec("student", folder.student(name), experiment.plan(name).training.hang_after)
            for name in experiment.names
        ),
        *(
            _spec("teacher", folder.teacher(name), experiment.teacher_plan(name).training.hang_after)
            for name in experiment.teacher_names
        ),
    ]


def _spec(kind: str, layout: ParticipantLayout, hang_after: float) -> ProcessSpec:
    name = layout.path.name
    return ProcessSpec(f"{kind} {name!r}", name, layout.log, layout.host_lock, hang_after)


def serve_arguments(folder: RunFolder) -> list[str]:
    """Returns the server's, without its addresses.

    It stays after the run is complete: a worker whose goodbye got no answer says it again, to its successor too.
    """
    return [*_MODULE, "serve", *_run(folder), "--stay"]


def work_arguments(folder: RunFolder, name: str) -> list[str]:
    """Returns the worker's of a student or a teacher; it finds the server by the folder."""
    return [*_MODULE, "work", *_run(folder), "--student", name]


def _run(folder: RunFolder) -> list[str]:
    return [str(folder.experiment_file), "--run-dir", str(folder.path)]
