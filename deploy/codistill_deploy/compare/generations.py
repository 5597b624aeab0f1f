"""Born-again networks: generations that are trained one after the other, each the teacher of the next."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from codistill.config.experiment import Experiment
from codistill.config.methods import BornAgain, Independent
from codistill.config.participants import Student, Teacher
from codistill.rundir.layout import generation_folder
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder

# A machine that only serves may lack the worker's dependencies, and the other way round: functions import them when called.

__all__ = ["as_teacher", "generation_runs", "has_generations", "is_trained", "require_single_run", "runs_in_order"]


def has_generations(experiment: Experiment) -> bool:
    """Return whether an experiment has several generations, and so several runs."""
    return isinstance(experiment.distillation, BornAgain) and not experiment.teachers


def require_single_run(experiment: Experiment) -> None:
    """Reject an experiment of several generations.

    Raises:
        CommandError: the experiment has several generations.
    """
    if has_generations(experiment):
        raise CommandError(
            "distillation.generations: `codistill run` trains generations one after the other; to train one alone, give "
            "its `teachers` and generations: 1"
        )


def generation_runs(experiment: Experiment, folder: Path) -> Iterator[tuple[Experiment, RunFolder]]:
    """Yield each generation's experiment and its folder, first to last.

    The first learns from the labels alone. Each later one begins from other initial weights, and each of its students
    has its own predecessor for a teacher.

    Args:
        experiment: an experiment of several generations.
        folder: the folder that holds the generations' folders.

    Raises:
        ExperimentError: a name is too long to be told apart from its predecessor's.
    """
    from codistill.peer.draws import derive

    method = experiment.distillation
    assert isinstance(method, BornAgain)  # noqa: S101 - the caller has asked has_generations
    folders = [RunFolder(generation_folder(folder, generation)) for generation in range(1, method.generations + 1)]
    yield experiment.with_method(Independent()), folders[0]
    single = method.model_copy(update={"generations": 1})
    for generation, (previous_folder, run_folder) in enumerate(pairwise(folders), 2):
        teachers = tuple(as_teacher(student, str(generation - 1), previous_folder) for student in experiment.students)
        seed = derive(experiment.seed, "generation", generation)
        yield experiment.replace(seed=seed, distillation=single, teachers=teachers), run_folder


def runs_in_order(experiment: Experiment, folder: Path, title: str) -> list[tuple[Experiment, RunFolder, str]]:
    """Return the runs of an experiment, first to last, each with its folder and a title: its generations, or itself.

    Raises:
        ExperimentError: as :func:`generation_runs`.
    """
    if not has_generations(experiment):
        return [(experiment, RunFolder(folder), title)]
    runs = list(generation_runs(experiment, folder))
    return [
        (run, run_folder, f"{title}, generation {generation} of {len(runs)}")
        for generation, (run, run_folder) in enumerate(runs, 1)
    ]


def as_teacher(student: Student, suffix: str, trained: RunFolder) -> Teacher:
    """Return a student of one run as the teacher of a later run.

    Args:
        student: the student.
        suffix: the end of the teacher's name, a few characters that tell the student's trainings apart.
        trained: the folder of the run that trains the student.
    """
    return Teacher(
        name=f"{student.name[:56]}.{suffix}",
        model=student.model,
        model_args=student.model_args,
        weights=str(trained.student(student.name).path),
    )


def is_trained(folder: RunFolder) -> bool:
    """Return whether a folder holds a run that is trained to its end."""
    from codistill.rundir.history import read

    return folder.experiment_file.exists() and folder.metrics_file.exists() and read(folder.path).complete
