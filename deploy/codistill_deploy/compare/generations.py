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

# A machine that only serves has no worker's part installed, and the other way round; each function imports what it needs.

__all__ = ["as_teacher", "in_sequence", "is_trained", "parts", "planned", "refuse"]


def in_sequence(experiment: Experiment) -> bool:
    """Returns whether an experiment is of several generations, and so of several runs."""
    return isinstance(experiment.distillation, BornAgain) and not experiment.teachers


def refuse(experiment: Experiment) -> None:
    """Refuses an experiment of several generations where one run is wanted.

    Raises:
        CommandError: it is one.
    """
    if in_sequence(experiment):
        raise CommandError(
            "distillation.generations: `codistill run` trains generations one after the other; for one of them alone give "
            "its `teachers`, and generations: 1"
        )


def planned(experiment: Experiment, folder: Path) -> Iterator[tuple[Experiment, RunFolder]]:
    """Yields each generation's experiment and its folder, first to last.

    The first learns from the labels alone. Each later one begins from other initial weights, and each of its students
    has its own predecessor for a teacher.

    Args:
        experiment: of several generations.
        folder: what the generations' folders are in.

    Raises:
        ExperimentError: a name is too long to be told apart from its predecessor's.
    """
    from codistill.peer.draws import derive

    method = experiment.distillation
    assert isinstance(method, BornAgain)  # noqa: S101 - the caller has asked in_sequence
    places = [RunFolder(generation_folder(folder, number)) for number in range(1, method.generations + 1)]
    yield experiment.replace(distillation=Independent()), places[0]
    for number, (before, place) in enumerate(pairwise(places), 2):
        teachers = tuple(as_teacher(student, str(number - 1), before) for student in experiment.students)
        seed = derive(experiment.seed, "generation", number)
        one = method.model_copy(update={"generations": 1})
        yield experiment.replace(seed=seed, distillation=one, teachers=teachers), place


def parts(experiment: Experiment, folder: Path, title: str) -> list[tuple[Experiment, RunFolder, str]]:
    """Returns the runs of an experiment, first to last, each with its folder and a title: its generations, or itself.

    Raises:
        ExperimentError: as :func:`planned`.
    """
    if not in_sequence(experiment):
        return [(experiment, RunFolder(folder), title)]
    runs = list(planned(experiment, folder))
    return [(one, place, f"{title}, generation {number} of {len(runs)}") for number, (one, place) in enumerate(runs, 1)]


def as_teacher(student: Student, which: str, trained: RunFolder) -> Teacher:
    """Returns a student as the teacher of a later run, named after it and after which of its trainings it is of.

    Args:
        student: the student.
        which: a few characters that tell its trainings apart.
        trained: the folder of the run that trains it.
    """
    return Teacher(
        name=f"{student.name[:56]}.{which}",
        model=student.model,
        model_args=student.model_args,
        weights=str(trained.student(student.name).path),
    )


def is_trained(folder: RunFolder) -> bool:
    """Returns whether a folder holds a generation that is trained to its end."""
    from codistill.rundir.history import read

    return folder.experiment_file.exists() and folder.metrics_file.exists() and read(folder.path).complete
