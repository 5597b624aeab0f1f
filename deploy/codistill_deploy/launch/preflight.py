"""The checks of an experiment before any process is started."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from codistill.config.experiment import Experiment, ExperimentError
from codistill.methods import Aggregator, ImageShape, Output, StudentContext
from codistill.process.gpus import spread
from codistill.process.plugins import LoadError
from codistill.rundir import history
from codistill.rundir.layout import ParticipantLayout, RunLayout
from codistill_server import methods as server_methods
from codistill_worker import data, models
from codistill_worker import methods as worker_methods
from codistill_worker.errors import ConfigurationError, refuse_exit
from codistill_worker.training import weights
from codistill_worker.training.gpus import choose_device, visible_gpus
from codistill_worker.training.outputs import output_shapes, teacher_shapes

__all__ = ["check"]

_CPU = torch.device("cpu")


def check(experiment: Experiment, source: str = "experiment", *, here: bool = True) -> None:
    """Check that every model and device exists, and that the data set is where the experiment says.

    Where a method depends on what the models are made of, every student is built as its worker builds it. Every teacher is
    built and given its weights, which are those of a run that is over.

    Args:
        experiment: what to run.
        source: names the experiment in errors.
        here: whether the students train on this machine; else neither devices nor data are looked for.

    Raises:
        ExperimentError: a check failed; a line for each names the field and what is allowed.
    """
    problems = list(dict.fromkeys(_problems(experiment, here)))
    if here and not problems:
        problems = list(dict.fromkeys(_method_problems(experiment)))
    if problems:
        raise ExperimentError(source, problems)


def _problems(experiment: Experiment, here: bool) -> Iterator[str]:
    if here:
        yield from _problems_of(partial(data.check, experiment.data))
    participants = [(f"students.{position}", student) for position, student in enumerate(experiment.students)]
    participants += [(f"teachers.{position}", teacher) for position, teacher in enumerate(experiment.teachers)]
    count = len(visible_gpus()) if here else 0
    numbers = spread(experiment.devices, count)
    for position, (path, participant) in enumerate(participants):
        for problem in _problems_of(partial(models.check, participant.model, participant.model_args)):
            named = problem if problem.startswith("model") else f"model: {participant.model!r}: {problem}"
            yield f"{path}.{named}"
        if not here:
            continue
        prefix = f"{path}." if participant.training.device is not None else ""
        chosen = partial(choose_device, experiment.devices[position], numbers[position] or 0, count)
        yield from (f"{prefix}{problem}" for problem in _problems_of(chosen))
    for position, teacher in enumerate(experiment.teachers if here else ()):
        unreadable = list(_problems_of(partial(weights.read, Path(teacher.weights), teacher.name)))
        for problem in unreadable or _problems_of(partial(_check_trained, Path(teacher.weights), teacher.name)):
            yield f"teachers.{position}.{problem}"


def _check_trained(path: Path, name: str) -> None:
    """Reject a teacher of a run that is still training: its students would find other weights after a restart.

    Args:
        path: the teacher's weights; only a run's folder, or a student's in it, is looked into.
        name: the teacher's name, which is the student's where `path` is a run's folder.

    Raises:
        ConfigurationError: the run is not over.
    """
    parent_run = ParticipantLayout(path).run
    run, student_name = (RunLayout(path), name) if parent_run is None else (parent_run, path.name)
    if not (path.is_dir() and run.experiment_file.exists() and run.metrics_file.exists()):
        return
    try:
        trained = {student.name: student.final is not None for student in history.read(run.path).students}
    except ValueError:  # records of another version; the weights have been read, and those are what is asked for
        return
    if not trained.get(student_name, all(trained.values())):
        raise ConfigurationError(
            f"weights: the run in {run.path} is not trained to its end; continue it, or name one of its checkpoints, a "
            ".safetensors file, to use that as it is"
        )


def _method_problems(experiment: Experiment) -> Iterator[str]:
    """Yield the layers and outputs that the method needs and the models lack."""
    builds_students = experiment.distillation.depends_on_models
    if not (experiment.teachers or builds_students):
        return
    try:
        aggregator = server_methods.create(experiment.distillation, experiment.names, experiment.teacher_names)
        channels, size = data.image_of(experiment.data)
    except (LoadError, ConfigurationError) as error:
        yield str(error)
        return
    shape = ImageShape(classes=experiment.data.class_count, channels=channels, size=size)
    for position, teacher in enumerate(experiment.teachers):
        problems = list(_problems_of(partial(_check_teacher, experiment, teacher.name, shape, aggregator)))
        for problem in problems:
            yield f"teachers.{position}.{problem}" if problem.startswith("weights") else problem
        if problems:
            return
    for position, student in enumerate(experiment.students if builds_students else ()):
        for problem in _problems_of(partial(_check_student, experiment, student.name, shape, aggregator)):
            yield problem if problem.startswith("distillation.") else f"students.{position}: {problem}"


def _check_teacher(experiment: Experiment, name: str, shape: ImageShape, aggregator: Aggregator | None) -> None:
    """Build a teacher as its worker does, and compare its outputs with those that the aggregator takes."""
    plan = experiment.teacher_plan(name)
    teacher = plan.teacher
    model = models.build(teacher.model, **shape, args=teacher.model_args, seed=0)
    read = weights.read(Path(teacher.weights), name)
    weights.apply(read, model, teacher.weights, teacher.model, shape["classes"])
    network = worker_methods.teacher_network(plan.distillation, StudentContext(name, model, shape, dict))
    _check_outputs(
        output_shapes(network, shape, _CPU),
        aggregator.teacher if aggregator is not None else {},
        shape["classes"],
        name,
    )


def _check_student(experiment: Experiment, name: str, shape: ImageShape, aggregator: Aggregator | None) -> None:
    """Build a student and its objective as its worker does, and compare what it publishes with what the aggregator takes."""
    plan = experiment.plan(name)
    model = models.build(plan.student.model, **shape, args=plan.student.model_args, seed=0)
    teachers = partial(teacher_shapes, experiment, shape)
    objective = worker_methods.create(plan.distillation, StudentContext(name, model, shape, teachers))
    shapes = output_shapes(objective.network, shape, _CPU)
    published = {output: shapes[output] for output in objective.publishes}
    _check_outputs(published, aggregator.student if aggregator is not None else {}, shape["classes"], name)


def _check_outputs(
    published: Mapping[str, tuple[int, ...]], taken: Mapping[str, Output], classes: int, name: str
) -> None:
    """Reject an objective that publishes other outputs or shapes than the aggregator takes."""
    if published.keys() == taken.keys() and all(
        output.accepts(list(published[key]), classes) for key, output in taken.items()
    ):
        return
    shapes = {key: list(shape) for key, shape in published.items()}
    wanted = {key: output.describe(classes) for key, output in taken.items()}
    raise ConfigurationError(f"distillation: {name!r} publishes {shapes}, the aggregator takes {wanted}")


def _problems_of(check_one: Callable[[], object]) -> Iterator[str]:
    try:
        with refuse_exit("the experiment's own code"):
            check_one()
    except (ConfigurationError, LoadError) as error:
        yield str(error)
