"""An experiment with other methods: which there are to compare, what of it meets their needs, and who teaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from codistill.config.experiment import Experiment, ExperimentError
from codistill.config.methods import Distillation, Method
from codistill.config.participants import Teacher
from codistill_deploy.compare.generations import as_teacher
from codistill_deploy.compare.statistics import BASELINE
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder

__all__ = ["ALL", "METHODS", "Variant", "best_alone", "choose"]

ALL = "all"
"""Stands for every method whose needs the experiment meets."""

METHODS = (
    BASELINE,
    "kd",
    "logit_regression",
    "born_again",
    "vid",
    "rkd_distance",
    "rkd_angle",
    "rkd",
    "fddml",
    "hddml",
    "dml",
    "dcm",
    "kdcl/naive",
    "kdcl/linear",
    "kdcl/min_logit",
    "kdcl/general",
    "cross_architecture",
)
"""What ``all`` stands for, in the order of a comparison's tables."""

_DISTILLATION: TypeAdapter[Any] = TypeAdapter(Distillation)


@dataclass(frozen=True)
class Variant:
    """An experiment with one method of a comparison."""

    experiment: Experiment
    """Where `finds_teacher`, with a teacher that only stands for the one that is to be found."""
    finds_teacher: bool = False
    """Whether its teacher is the best of the students alone, once they are trained."""

    @property
    def title(self) -> str:
        """The method with its variant."""
        return self.experiment.distillation.title

    def taught(self, seed: int, teacher: Teacher | None) -> Experiment:
        """Returns the experiment with a seed, and with the teacher that was found."""
        if teacher is None:
            return self.experiment.replace(seed=seed)
        return self.experiment.replace(seed=seed, teachers=(teacher,))


def choose(experiment: Experiment, methods: Sequence[str]) -> tuple[tuple[Variant, ...], Mapping[str, str]]:
    """Returns the experiment with each method, `independent` first, and which of ``all`` it does not meet the needs of.

    The experiment's own settings hold where the method is its own; otherwise the method's defaults do. A method that has
    a teacher takes the experiment's. Where there is none, the best of the students alone is to teach, as
    :func:`best_alone` finds it, for which `independent` must be among the methods.

    Args:
        experiment: what to run.
        methods: names of :data:`METHODS`, "kdcl" for the experiment's own ensemble, "custom" for its own pair, or "all".

    Returns:
        The variants, none twice, and by the name of each method that ``all`` leaves out why.

    Raises:
        CommandError: there is no such method, or nobody who could teach it.
        ExperimentError: the experiment does not meet what a method needs that was asked for by name.
    """
    every = METHODS if experiment.distillation.method != "custom" else (*METHODS, "custom")
    allowed = (*every, "kdcl", ALL)
    for method in methods:
        if method not in allowed:
            hint = "; `custom` is for an experiment with a pair of its own" if method == "custom" else ""
            raise CommandError(f"--methods: {method!r} is not a method; allowed: {', '.join(allowed)}{hint}")
    wanted = [method for method in methods if method != ALL]
    rest = [method for method in every if method not in wanted] if ALL in methods else []
    may_find = BASELINE in methods or ALL in methods
    variants = {each.title: each for each in (_variant(experiment, method, may_find) for method in wanted)}
    left_out: dict[str, str] = {}
    for method in rest:
        try:
            made = _variant(experiment, method, may_find)
        except ExperimentError as error:
            left_out[method] = "; ".join(problem.removeprefix("distillation.method: ") for problem in error.problems)
        else:
            variants.setdefault(made.title, made)
    return tuple(sorted(variants.values(), key=_place)), left_out


def best_alone(experiment: Experiment, alone: RunFolder) -> Teacher:
    """Returns the student with the highest test accuracy at the end of a run of all of them alone, as a teacher.

    Args:
        experiment: the run's experiment.
        alone: the folder of the run, complete. A tie goes to the first student.
    """
    from codistill.rundir.history import read

    accuracies = {each.name: each.final.accuracy for each in read(alone.path).students if each.final is not None}
    best = max(experiment.students, key=lambda student: accuracies[student.name])
    return as_teacher(best, "alone", alone)


def _variant(experiment: Experiment, method: str, may_find: bool) -> Variant:
    name, _, ensemble = method.partition("/")
    own = experiment.distillation
    settings = own.model_dump(mode="json") if own.method == name else {"method": name}
    if ensemble:
        settings["ensemble"] = ensemble
    try:
        distillation: Method = _DISTILLATION.validate_python(settings)
    except ValidationError as error:
        raise CommandError(f"--methods: {method}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
    needed, _ = distillation.teacher_limits
    teachers = experiment.teachers if needed or own.method == name else ()
    finds = bool(needed) and not teachers
    if finds and not may_find:
        raise CommandError(
            f"--methods: {method!r} needs a teacher, there is none; add `teachers` to the experiment, or {BASELINE} to "
            "--methods: the best of the students alone then teaches"
        )
    if finds:
        teachers = (as_teacher(experiment.students[0], "alone", RunFolder.default(experiment.name)),)
    return Variant(experiment.replace(distillation=distillation, teachers=teachers), finds)


def _place(variant: Variant) -> int:
    return 0 if variant.title == BASELINE else 1
