"""What can be found wrong with an experiment before any process is started."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from codistill.experiment import Experiment, ExperimentError
from codistill_worker import data, models
from codistill_worker.app import choose_device
from codistill_worker.errors import ConfigurationError

__all__ = ["check"]


def check(experiment: Experiment, source: str = "experiment", *, here: bool = True) -> None:
    """Checks that every student's model is known, its device there, and the data set where it is said to be.

    Args:
        experiment: what is to be run.
        source: names the experiment in errors.
        here: whether the students train on this machine; else neither devices nor data are looked for.

    Raises:
        ExperimentError: something is not so; a line for each names the field and what is allowed.
    """
    problems = list(dict.fromkeys(_problems(experiment, here)))
    if problems:
        raise ExperimentError(source, problems)


def _problems(experiment: Experiment, here: bool) -> Iterator[str]:
    if here:
        yield from _of(lambda: data.check(experiment.data))
    for position, student in enumerate(experiment.students):
        for problem in _of(lambda: models.check(student.model, student.model_args)):  # noqa: B023 - called at once
            named = problem if problem.startswith("model") else f"model: {student.model!r}: {problem}"
            yield f"students.{position}.{named}"
        if not here:
            continue
        device = experiment.plan(student.name).training.device
        own = f"students.{position}." if student.training.device is not None else ""
        yield from (f"{own}{problem}" for problem in _of(lambda: choose_device(device, position)))  # noqa: B023


def _of(check_one: Callable[[], object]) -> Iterator[str]:
    try:
        check_one()
    except ConfigurationError as error:
        yield str(error)
