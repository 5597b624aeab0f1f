"""The base of every method's settings: its needs, the checks of them, its variants, and the steps that exchange."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Protocol, cast

from pydantic import Field

from codistill.config.base import Section
from codistill.config.data import Data
from codistill.config.errors import NOT_EMPTY
from codistill.config.participants import DistillationOverrides, Student, Teacher
from codistill.config.schedule import EVERY_STEP, ExchangeSchedule
from codistill.config.training import Training

__all__ = ["UNLIMITED", "ExperimentSections", "Intermittent", "LayerReader", "Method"]

UNLIMITED = 256
"""As many students or teachers as an experiment may have."""


class ExperimentSections(Protocol):
    """The sections of an experiment that a method's checks read. Each is valid in itself."""

    @property
    def data(self) -> Data:
        """The section `data`."""
        ...

    @property
    def training(self) -> Training:
        """The section `training`."""
        ...

    @property
    def students(self) -> tuple[Student, ...]:
        """The students, in order."""
        ...

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """The teachers, in order."""
        ...

    @property
    def steps_per_epoch(self) -> int | None:
        """Training steps of an epoch; None where the data set's size is not known, 0 where no batch is full."""
        ...


class Method(Section):
    """The settings that all methods have. Each declares a field `method`, a literal with its name as the default.

    Attributes:
        student_limits: how many students the method is for, least and most.
        teacher_limits: how many teachers.
        depends_on_models: whether only the built models show that the method can have what it needs. The checks before a
            run then build every student.
        own_temperatures: whether a student may have its own temperature.
    """

    student_limits: ClassVar[tuple[int, int]] = (1, UNLIMITED)
    teacher_limits: ClassVar[tuple[int, int]] = (0, 0)
    depends_on_models: ClassVar[bool] = False
    own_temperatures: ClassVar[bool] = True

    @classmethod
    def method_name(cls) -> str:
        """Return the name by which `distillation.method` chooses the method."""
        return cast("str", cls.model_fields["method"].default)

    @classmethod
    def variants(cls) -> Mapping[str, Mapping[str, Any]]:
        """Return what `compare --methods all` runs of the method: settings by title, in the order of the tables.

        It is empty where the settings have no defaults, so that only an experiment of the method can be compared.
        """
        return {cls.method_name(): {}}

    @property
    def exchanges(self) -> bool:
        """Whether students publish or learn anything."""
        return True

    @property
    def title(self) -> str:
        """The method with its variant."""
        return self.method_name()

    def exchange_schedule(self, steps_per_epoch: int) -> ExchangeSchedule:
        """Return which steps exchange."""
        del steps_per_epoch
        return EVERY_STEP

    def problems(self, experiment: ExperimentSections) -> Iterator[str]:
        """Yield a line for each need of the method that the experiment does not meet, with its path in the experiment."""
        yield from self._student_count_problems(len(experiment.students))
        yield from self._teacher_count_problems([teacher.name for teacher in experiment.teachers])
        for position, student in enumerate(experiment.students):
            allowed = self.student_settings(position)
            for name, value in student.distillation.given().items():
                if name not in allowed:
                    reason = self._no_effect(name, allowed)
                    yield f"students.{position}.distillation.{name}: {value}, but `{self.method_name()}` {reason}"

    @classmethod
    def student_settings(cls, position: int) -> tuple[str, ...]:
        """Return the names of the settings that one student may override: those that change its loss.

        Args:
            position: the student's, in the experiment's order.
        """
        del position
        shared = () if cls.own_temperatures else ("temperature",)
        return tuple(
            name for name in DistillationOverrides.model_fields if name in cls.model_fields and name not in shared
        )

    @classmethod
    def _no_effect(cls, name: str, allowed: tuple[str, ...]) -> str:
        """Return why one student cannot override a setting, as the end of a sentence about the method."""
        if name not in cls.model_fields:
            fields = [field for field in cls.model_fields if field != "method"]
            own = f"a student can override {', '.join(allowed)}" if allowed else "a student can override none"
            return f"has no {name}; its settings are {', '.join(fields)}, and {own}"
        return f"softens all students' logits alike; set distillation.{name}"

    def _student_count_problems(self, count: int) -> Iterator[str]:
        method = f"distillation.method: {self.method_name()!r}"
        least, most = self.student_limits
        if count < least:
            needed = f"{least}" if least == most else f"at least {least}"
            yield (
                f"{method} needs {needed} student{'s' if least > 1 else ''}, there is {count}; "
                "add one, or choose `independent`"
            )
        elif count > most:
            yield f"{method} is for {most} students, there are {count}; remove some, or choose another method"

    def _teacher_count_problems(self, names: list[str]) -> Iterator[str]:
        name = self.method_name()
        least, most = self.teacher_limits
        if len(names) < least:
            yield (
                f"distillation.method: {name!r} needs a teacher, there is none; add one, for example "
                "teachers: [{name: teacher, model: MODEL, weights: FILE}]"
            )
        elif len(names) > most and not most:
            yield f"teachers: {', '.join(names)}, but method {name!r} has no use for a teacher; remove `teachers`"
        elif len(names) > most:
            yield f"teachers: there are {len(names)}, but method {name!r} takes {most}; remove some"


class LayerReader(Method):
    """A method that reads hidden layers of each model."""

    depends_on_models: ClassVar[bool] = True

    stages: int = Field(default=2, ge=1, le=8, description="How many hidden layers of each model are read.")
    layers: dict[str, list[Annotated[str, Field(pattern=NOT_EMPTY)]]] = Field(
        default_factory=dict,
        description="For each student or teacher by name, the names of its layers, shallow ones first. By default, layers that divide a model's depth evenly.",
    )

    def problems(self, experiment: ExperimentSections) -> Iterator[str]:
        """Yield the needs not met, with those of the named layers."""
        yield from super().problems(experiment)
        participants = [participant.name for participant in (*experiment.students, *experiment.teachers)]
        for name, layers in self.layers.items():
            if name not in participants:
                yield f"distillation.layers.{name}: no student or teacher has this name; allowed: {', '.join(participants)}"
            elif len(layers) != self.stages:
                yield (
                    f"distillation.layers.{name}: {len(layers)} layers are not allowed; allowed are the {self.stages} of "
                    "distillation.stages"
                )


class Intermittent(Method):
    """A method that need not exchange at every step."""

    every: int = Field(
        default=1, ge=1, description="One round in this many exchanges. In the others, students learn from the labels."
    )
    start_epoch: float = Field(default=0.0, ge=0, description="Epochs before the first exchange.")

    def exchange_schedule(self, steps_per_epoch: int) -> ExchangeSchedule:
        """Return which steps exchange."""
        return ExchangeSchedule(math.ceil(self.start_epoch * steps_per_epoch), self.every)

    def problems(self, experiment: ExperimentSections) -> Iterator[str]:
        """Yield the needs not met, with that of a first exchange before the run ends."""
        yield from super().problems(experiment)
        epochs, steps_per_epoch = experiment.training.epochs, experiment.steps_per_epoch
        if self.start_epoch >= epochs:
            yield (
                f"distillation.start_epoch: {self.start_epoch:g} is not allowed; allowed is less than the {epochs} of "
                "training.epochs, as otherwise nothing is exchanged"
            )
        elif steps_per_epoch and self.exchange_schedule(steps_per_epoch).start >= epochs * steps_per_epoch:
            steps = epochs * steps_per_epoch
            yield (
                f"distillation.start_epoch: {self.start_epoch:g} is not allowed; allowed is up to "
                f"{(steps - 1) * 1000 // steps_per_epoch / 1000:g}, where the last of {steps} rounds begins, as otherwise "
                "nothing is exchanged"
            )
