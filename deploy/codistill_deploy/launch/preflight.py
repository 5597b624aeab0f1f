"""What can be found wrong with an experiment before any process is started."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from codistill.config.experiment import Experiment, ExperimentError
from codistill.methods import ImageShape, StudentContext
from codistill.process.plugins import LoadError
from codistill.rundir import history
from codistill.rundir.layout import ParticipantLayout, RunLayout
from codistill_server import methods as server_methods
from codistill_worker import data, models
from codistill_worker import methods as worker_methods
from codistill_worker.app import choose_device
from codistill_worker.errors import ConfigurationError
from codistill_worker.training import weights
from codistill_worker.training.outputs import output_shapes, teacher_shapes

__all__ = ["check"]

_CPU = torch.device("cpu")


def check(experiment: Experiment, source: str = "experiment", *, here: bool = True) -> None:
    """Checks that every model is known, its device there, and the data set where it is said to be.

    Where the method reads hidden layers or is a user's own, models are built to see that it can have what it needs;
    teachers are built and given their weights, which are those of a run that is over.

    Args:
        experiment: what is to be run.
        source: names the experiment in errors.
        here: whether the students train on this machine; else neither devices nor data are looked for.

    Raises:
        ExperimentError: something is not so; a line for each names the field and what is allowed.
    """
    problems = list(dict.fromkeys(_problems(experiment, here)))
    if here and not problems:
        problems = list(dict.fromkeys(_method_problems(experiment)))
    if problems:
        raise ExperimentError(source, problems)


def _problems(experiment: Experiment, here: bool) -> Iterator[str]:
    if here:
        yield from _of(lambda: data.check(experiment.data))
    taking_part = [(f"students.{position}", each) for position, each in enumerate(experiment.students)]
    taking_part += [(f"teachers.{position}", each) for position, each in enumerate(experiment.teachers)]
    for position, (place, each) in enumerate(taking_part):
        for problem in _of(partial(models.check, each.model, each.model_args)):
            named = problem if problem.startswith("model") else f"model: {each.model!r}: {problem}"
            yield f"{place}.{named}"
        if not here:
            continue
        device = each.training.device or experiment.training.device
        own = f"{place}." if each.training.device is not None else ""
        yield from (f"{own}{problem}" for problem in _of(partial(choose_device, device, position)))
    for position, teacher in enumerate(experiment.teachers if here else ()):
        found = list(_of(partial(weights.read, Path(teacher.weights), teacher.name)))
        for problem in found or _of(partial(_check_trained, Path(teacher.weights), teacher.name)):
            yield f"teachers.{position}.{problem}"


def _check_trained(path: Path, name: str) -> None:
    """Sees that a teacher is trained to its end, where a run is given: else those who learn from it find other weights."""
    of = ParticipantLayout(path).run
    run, student = (RunLayout(path), name) if of is None else (of, path.name)
    if not (path.is_dir() and run.experiment_file.exists() and run.metrics_file.exists()):
        return
    try:
        over = {each.name: each.final is not None for each in history.read(run.path).students}
    except ValueError:  # records of another version; the weights have been read, and those are what is asked for
        return
    if not over.get(student, all(over.values())):
        raise ConfigurationError(
            f"weights: the run in {run.path} is not trained to its end; go on with it, or name one of its checkpoints, a "
            ".safetensors file, to take that as it is"
        )


def _method_problems(experiment: Experiment) -> Iterator[str]:
    """Yields what the models have not that the method needs."""
    method = experiment.distillation
    builds_students = method.reads_layers or method.method == "custom"
    if not (experiment.teachers or builds_students):
        return
    try:
        half = server_methods.create(method, experiment.names, experiment.teacher_names)
        channels, size = data.image_of(experiment.data)
    except (LoadError, ConfigurationError) as error:
        yield str(error)
        return
    shape = ImageShape(classes=experiment.data.class_count, channels=channels, size=size)
    for position, teacher in enumerate(experiment.teachers):
        problems = list(_of(partial(_teach, experiment, teacher.name, shape, half)))
        yield from (f"teachers.{position}.{each}" if each.startswith("weights") else each for each in problems)
        if problems:
            return
    for position, student in enumerate(experiment.students if builds_students else ()):
        for problem in _of(partial(_learn, experiment, student.name, shape, half)):
            own = problem.startswith("distillation.")
            yield problem if own else f"students.{position}: {problem}"


def _teach(experiment: Experiment, name: str, shape: ImageShape, half: server_methods.Aggregator | None) -> None:
    """Builds a teacher as its worker does."""
    plan = experiment.teacher_plan(name)
    teacher = plan.teacher
    model = models.build(teacher.model, **shape, args=teacher.model_args, seed=0)
    read = weights.read(Path(teacher.weights), name)
    weights.apply(read, model, teacher.weights, teacher.model, shape["classes"])
    network = worker_methods.teacher_network(plan.distillation, StudentContext(name, model, shape, dict))
    _check_outputs(
        output_shapes(network, shape, _CPU), half.teacher if half is not None else {}, shape["classes"], name
    )


def _learn(experiment: Experiment, name: str, shape: ImageShape, half: server_methods.Aggregator | None) -> None:
    """Builds a student and its worker half as its worker does."""
    plan = experiment.plan(name)
    model = models.build(plan.student.model, **shape, args=plan.student.model_args, seed=0)
    teachers = partial(teacher_shapes, experiment, shape)
    made = worker_methods.create(plan.distillation, StudentContext(name, model, shape, teachers))
    shapes = output_shapes(made.network, shape, _CPU)
    published = {each: shapes[each] for each in made.publishes}
    _check_outputs(published, half.student if half is not None else {}, shape["classes"], name)


def _check_outputs(
    published: Mapping[str, tuple[int, ...]], taken: Mapping[str, server_methods.Output], classes: int, name: str
) -> None:
    """Sees that what a worker half publishes is what the server half takes."""
    wanted = {key: each.describe(classes) for key, each in taken.items()}
    if published.keys() != taken.keys() or not all(
        each.takes(list(published[key]), classes) for key, each in taken.items()
    ):
        shown = {key: list(dims) for key, dims in published.items()}
        raise ConfigurationError(f"distillation: {name!r} publishes {shown}, the server's half takes {wanted}")


def _of(check_one: Callable[[], object]) -> Iterator[str]:
    try:
        check_one()
    except (ConfigurationError, LoadError) as error:
        yield str(error)
