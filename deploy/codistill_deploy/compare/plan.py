"""The plan of a comparison: the methods to compare, those whose needs the experiment does not meet, and the teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from codistill.config.experiment import Experiment, ExperimentError
from codistill.config.methods import METHODS, Distillation
from codistill.config.participants import Teacher
from codistill_deploy.compare.generations import as_teacher
from codistill_deploy.compare.statistics import BASELINE
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder

__all__ = ["ALL", "VARIANTS", "Variant", "best_alone", "choose"]

ALL = "all"
"""Stands for every method whose needs the experiment meets."""

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    title: {"method": name, **settings}
    for name, method in METHODS.items()
    for title, settings in method.variants().items()
}
"""The settings of what ``all`` stands for, by title, in the order of a comparison's tables."""

_DISTILLATION: TypeAdapter[Any] = TypeAdapter(Distillation)


@dataclass(frozen=True)
class Variant:
    """An experiment with one method of a comparison."""

    experiment: Experiment
    """Where `finds_teacher`, it has a teacher in place of the one that is still to be found."""
    finds_teacher: bool = False
    """Whether its teacher is the best of the students alone, once they are trained."""

    @property
    def title(self) -> str:
        """The method with its variant."""
        return self.experiment.distillation.title

    def with_seed(self, seed: int, teacher: Teacher | None) -> Experiment:
        """Return the experiment with a seed, and with the teacher that was found, if any."""
        if teacher is None:
            return self.experiment.replace(seed=seed)
        return self.experiment.replace(seed=seed, teachers=(teacher,))


def choose(experiment: Experiment, methods: Sequence[str]) -> tuple[tuple[Variant, ...], Mapping[str, str]]:
    """Return the experiment with each method, `independent` first, and the methods of ``all`` whose needs it does not meet.

    The experiment's own settings hold where the method is its own; otherwise the method's defaults do. A student's
    overrides hold where the method has such a setting. A method that has
    a teacher takes the experiment's. Where there is none, the best of the students alone is to teach, as
    :func:`best_alone` finds it, for which `independent` must be among the methods.

    Args:
        experiment: what to run.
        methods: titles of :data:`VARIANTS`, a method's name for the experiment's own settings or its defaults, or "all".

    Returns:
        The variants, none twice, and the reason for each method that ``all`` leaves out, by the method's title.

    Raises:
        CommandError: there is no such method, or no teacher for it.
        ExperimentError: the experiment does not meet the needs of a method that was named.
    """
    own_method = experiment.distillation.method
    every = (*VARIANTS, *([own_method] if not METHODS[own_method].variants() else []))
    named = [name for name, method in METHODS.items() if name not in every and method.variants()]
    allowed = (*every, *named, ALL)
    for method in methods:
        if method not in allowed:
            hint = f"; `{method}` is for an experiment that has its own pair" if method in METHODS else ""
            raise CommandError(f"--methods: {method!r} is not a method; allowed: {', '.join(allowed)}{hint}")
    wanted = [method for method in methods if method != ALL]
    rest = [method for method in every if method not in wanted] if ALL in methods else []
    may_find = BASELINE in methods or ALL in methods
    variants = {variant.title: variant for variant in (_variant(experiment, method, may_find) for method in wanted)}
    left_out: dict[str, str] = {}
    for method in rest:
        try:
            variant = _variant(experiment, method, may_find)
        except ExperimentError as error:
            left_out[method] = "; ".join(problem.removeprefix("distillation.method: ") for problem in error.problems)
        else:
            variants.setdefault(variant.title, variant)
    return tuple(sorted(variants.values(), key=lambda variant: variant.title != BASELINE)), left_out


def best_alone(experiment: Experiment, alone: RunFolder) -> Teacher:
    """Return the student with the highest test accuracy at the end of a run of all of them alone, as a teacher.

    Args:
        experiment: the run's experiment.
        alone: the folder of the run, complete.

    Returns:
        The teacher; of students with equal accuracies, the first.
    """
    from codistill.rundir.history import read

    students = read(alone.path).students
    accuracies = {student.name: student.final.accuracy for student in students if student.final is not None}
    best = max(experiment.students, key=lambda student: accuracies[student.name])
    return as_teacher(best, "alone", alone)


def _variant(experiment: Experiment, method: str, may_find_teacher: bool) -> Variant:
    settings = dict(VARIANTS.get(method, {"method": method}))
    own = experiment.distillation
    is_own = own.method == settings["method"]
    if is_own:
        settings = own.model_dump(mode="json") | settings
    try:
        distillation: Distillation = _DISTILLATION.validate_python(settings)
    except ValidationError as error:
        raise CommandError(f"--methods: {method}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
    needs_teacher = distillation.teacher_limits[0] > 0
    teachers = experiment.teachers if needs_teacher or is_own else ()
    finds_teacher = needs_teacher and not teachers
    if finds_teacher and not may_find_teacher:
        raise CommandError(
            f"--methods: {method!r} needs a teacher, there is none; add `teachers` to the experiment, or {BASELINE} to "
            "--methods: the best of the students alone then teaches"
        )
    if finds_teacher:
        teachers = (as_teacher(experiment.students[0], "alone", RunFolder.default(experiment.name)),)
    return Variant(experiment.with_method(distillation, teachers=teachers), finds_teacher)
