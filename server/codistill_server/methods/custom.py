"""A user's own aggregator; its mistakes are reported by the experiment's field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from codistill.config.methods import Custom
from codistill.methods.aggregator import Aggregator, Output, RoundInputs, Targets
from codistill.process import plugins
from codistill.process.plugins import LoadError

__all__ = ["aggregator"]

_ATTRIBUTES = ("heavy", "student", "teacher", "targets")


def aggregator(settings: Custom, students: Sequence[str], teachers: Sequence[str]) -> Aggregator:
    """Return the result of the experiment's callable, called with the experiment's parameters.

    Its `targets` raises LoadError where the user's raises an error or returns what cannot be sent.

    Raises:
        LoadError: the callable cannot be imported, does not take the parameters, or returned something that is no
            aggregator.
    """
    del students, teachers
    made = plugins.call(settings.server, "distillation.server", settings.parameters)
    field = f"distillation.server: {settings.server!r}"
    with plugins.users_code(field):
        missing = [name for name in _ATTRIBUTES if not hasattr(made, name)]
    if missing:
        raise LoadError(
            f"{field} returned {type(made).__name__}, which lacks {', '.join(missing)}; an aggregator has {', '.join(_ATTRIBUTES)}"
        )
    return _CheckedAggregator(cast("Aggregator", made), field)


class _CheckedAggregator:
    """A user's aggregator, `checked`, whose targets are checked, and whose errors name the experiment's field."""

    def __init__(self, checked: Aggregator, field: str) -> None:
        self.heavy = checked.heavy
        self.student: Mapping[str, Output] = checked.student
        self.teacher: Mapping[str, Output] = checked.teacher
        self.checked = checked
        self._field = field

    def targets(self, inputs: RoundInputs) -> Targets:
        """Return the user's targets of one round."""
        with plugins.users_code(self._field):
            targets = self.checked.targets(inputs)
            problem = next(_problems(targets, inputs), None)
        if problem is not None:
            raise LoadError(f"{self._field}: {problem}")
        return targets


def _problems(targets: Any, inputs: RoundInputs) -> Iterator[str]:
    """Yield why targets cannot be sent."""
    if not isinstance(targets, Targets):
        yield f"targets returned {type(targets).__name__}; expected codistill.methods.Targets"
        return
    by_student = targets.each or {}
    for student in inputs.students:
        if targets.shared is None and student not in by_student:
            yield f"there are targets for {', '.join(by_student) or 'nobody'}, and none for {student!r}; give it {{}} at least"
    places = {"shared": targets.shared or {}, "state": targets.state}
    places |= {f"each[{student!r}]": arrays for student, arrays in by_student.items()}
    for place, arrays in places.items():
        for name, value in cast("Mapping[str, Any]", arrays).items():
            if not isinstance(value, torch.Tensor):
                yield f"{place}[{name!r}] is a {type(value).__name__}; expected a torch.Tensor"
            elif not bool(torch.isfinite(value).all()):
                yield f"{place}[{name!r}] has values that are not finite; nobody can learn from them"
