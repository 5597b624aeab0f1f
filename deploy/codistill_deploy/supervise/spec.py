"""A run's parts and their command lines: what follows the Python that runs them, wherever that is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from codistill.config.experiment import Experiment
from codistill_deploy.run_folder import RunFolder

__all__ = ["ProcessSpec", "serve_arguments", "work_arguments", "workers"]

_MODULE = ("-m", "codistill_deploy")


@dataclass(frozen=True)
class ProcessSpec:
    """One that takes part in a run.

    Attributes:
        title: as people call it.
        name: its name in the experiment.
        log: what its worker prints; it is in the folder of its own.
        hang_after: its `training.hang_after`.
    """

    title: str
    name: str
    log: Path
    hang_after: float


def workers(experiment: Experiment, folder: RunFolder) -> list[ProcessSpec]:
    """Returns the students, then the teachers, in the experiment's order."""
    return [
        *(
            ProcessSpec(f"student {name!r}", name, folder.student_log(name), experiment.plan(name).training.hang_after)
            for name in experiment.names
        ),
        *(
            ProcessSpec(
                f"teacher {name!r}", name, folder.teacher_log(name), experiment.teacher_plan(name).training.hang_after
            )
            for name in experiment.teacher_names
        ),
    ]


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
