"""The experiment file's `distillation` section: the methods, their parameters, and what each needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, field_validator

from codistill.config.base import REFERENCE, Section, plain_values
from codistill.config.schedule import EVERY_STEP, ExchangeSchedule

__all__ = [
    "KDCL_ENSEMBLES",
    "BornAgain",
    "CrossArchitecture",
    "Custom",
    "Dcm",
    "Distillation",
    "DistillationOverrides",
    "Dml",
    "EnsembleName",
    "EnsembleSettings",
    "Fddml",
    "Hddml",
    "Independent",
    "Kd",
    "Kdcl",
    "LogitRegression",
    "Method",
    "Rkd",
    "RkdAngle",
    "RkdDistance",
    "Vid",
]

_MANY = 256


class Method(Section):
    """What all methods have.

    Attributes:
        students: how many students the method is for, least and most.
        teachers: how many teachers.
        reads_layers: whether it reads what models compute on their way to the logits.
    """

    students: ClassVar[tuple[int, int]] = (1, _MANY)
    teachers: ClassVar[tuple[int, int]] = (0, 0)
    reads_layers: ClassVar[bool] = False

    @property
    def exchanges(self) -> bool:
        """Whether students publish or learn anything."""
        return True

    @property
    def title(self) -> str:
        """The method with its variant."""
        return cast("str", getattr(self, "method"))  # noqa: B009 - each subclass declares its own literal

    def exchange_schedule(self, rounds_per_epoch: int) -> ExchangeSchedule:
        """Returns which rounds exchange."""
        del rounds_per_epoch
        return EVERY_STEP

    def problems(self, students: Sequence[str], teachers: Sequence[str], epochs: int) -> Iterator[str]:
        """Yields what of the run does not meet the method's needs, each with its path in the experiment."""
        del epochs
        name = cast("str", getattr(self, "method"))  # noqa: B009 - as above
        method = f"distillation.method: {name!r}"
        least, most = self.students
        if len(students) < least:
            yield (
                f"{method} needs {_at_least(least, most)} student{'s' if least > 1 else ''}, there is {len(students)}; "
                "add one, or choose `independent`"
            )
        elif len(students) > most:
            yield f"{method} is for {most} students, there are {len(students)}; remove some, or choose another method"
        least, most = self.teachers
        if len(teachers) < least:
            yield (
                f"{method} needs a teacher, there is none; add one, for example "
                "teachers: [{name: teacher, model: MODEL, weights: FILE}]"
            )
        elif len(teachers) > most and not most:
            yield f"teachers: {', '.join(teachers)}, but method {name!r} has no use for a teacher; remove `teachers`"
        elif len(teachers) > most:
            yield f"teachers: there are {len(teachers)}, but method {name!r} takes {most}; remove some"


class Independent(Method):
    """Every student alone, on the labels: the baseline of every comparison. Nothing is exchanged."""

    method: Literal["independent"] = Field(default="independent", description="Each student alone.")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="ε of y' = (1−ε)·onehot + ε/C.")

    @property
    def exchanges(self) -> bool:
        """Whether students publish or learn anything."""
        return False


class Kd(Method):
    """Knowledge distillation (Hinton et al. 2015): the students learn from a teacher's softened probabilities."""

    teachers: ClassVar[tuple[int, int]] = (1, 1)

    method: Literal["kd"] = Field(default="kd", description="Knowledge distillation from a teacher.")
    weight: float = Field(
        default=0.9, ge=0, le=1, description="λ of (1−λ)·CE + λ·T²·KL: the teacher's share; the labels have the rest."
    )
    temperature: float = Field(default=4.0, gt=0, description="T of the softmax; the term is multiplied by T².")


class LogitRegression(Method):
    """Logit regression (Ba & Caruana 2014): the students' logits are to be the teacher's, by least squares."""

    teachers: ClassVar[tuple[int, int]] = (1, 1)

    method: Literal["logit_regression"] = Field(
        default="logit_regression", description="Regression to a teacher's logits."
    )
    weight: float = Field(default=1.0, ge=0, description="Weight of the mean squared difference.")
    label_weight: float = Field(default=0.0, ge=0, description="Weight of the cross-entropy with the labels.")


class BornAgain(Method):
    """Born-again networks (Furlanello et al. 2018): every student learns from its own previous generation.

    Without `teachers`, `codistill run` trains the generations one after the other: the first on the labels alone, each
    later one taught by the one before. With `teachers`, one for each student in the students' order and of the same
    model, it is one generation.
    """

    teachers: ClassVar[tuple[int, int]] = (0, _MANY)

    method: Literal["born_again"] = Field(default="born_again", description="Generations that teach the next.")
    generations: int = Field(
        default=2, ge=1, le=100, description="How many are trained in sequence; 1 where `teachers` are given."
    )
    weight: float = Field(default=1.0, ge=0, description="Weight of the divergence from the teacher.")
    temperature: float = Field(default=1.0, gt=0, description="T of the softmax; the term is multiplied by T².")

    def problems(self, students: Sequence[str], teachers: Sequence[str], epochs: int) -> Iterator[str]:
        """Yields what of the run does not meet the method's needs, each with its path in the experiment."""
        yield from super().problems(students, teachers, epochs)
        if teachers and self.generations != 1:
            yield (
                f"distillation.generations: {self.generations}, but `teachers` are the generation before; set it to 1, or "
                "remove `teachers`"
            )
        elif teachers and len(teachers) != len(students):
            yield f"teachers: there are {len(teachers)}, but `born_again` needs one for each of the {len(students)} students"
        elif not teachers and self.generations < 2:
            yield "distillation.generations: 1 is not allowed without `teachers`; allowed: 2 to 100"


class _Layered(Method):
    """A method that reads hidden layers."""

    reads_layers: ClassVar[bool] = True

    stages: int = Field(default=2, ge=1, le=8, description="How many hidden layers of each model are read.")
    layers: dict[str, list[str]] = Field(
        default_factory=dict,
        description="By the name of a student or teacher, the names of its layers, shallow ones first; of one that is not named, layers that divide its depth evenly.",
    )

    def problems(self, students: Sequence[str], teachers: Sequence[str], epochs: int) -> Iterator[str]:
        """Yields what of the run does not meet the method's needs, each with its path in the experiment."""
        yield from super().problems(students, teachers, epochs)
        everybody = [*students, *teachers]
        for name, layers in self.layers.items():
            if name not in everybody:
                yield f"distillation.layers.{name}: there is nobody of this name; allowed: {', '.join(everybody)}"
            elif len(layers) != self.stages:
                yield (
                    f"distillation.layers.{name}: {len(layers)} layers are not allowed; allowed are the {self.stages} of "
                    "distillation.stages"
                )


class Vid(_Layered):
    """Variational information distillation (Ahn et al. 2019): hidden layers are to tell of the teacher's."""

    teachers: ClassVar[tuple[int, int]] = (1, 1)

    method: Literal["vid"] = Field(default="vid", description="Hidden layers that tell of the teacher's.")
    weight: float = Field(default=1.0, ge=0, description="λ, the weight of each layer's term.")


class RkdDistance(Method):
    """Relational distillation of distances (Park et al. 2019) between the embeddings of a batch's samples."""

    teachers: ClassVar[tuple[int, int]] = (1, 1)
    reads_layers: ClassVar[bool] = True

    method: Literal["rkd_distance"] = Field(default="rkd_distance", description="Distances among embeddings.")
    distance_weight: float = Field(default=25.0, ge=0, description="Weight of the distances' term.")


class RkdAngle(Method):
    """Relational distillation of angles (Park et al. 2019) between the embeddings of a batch's samples."""

    teachers: ClassVar[tuple[int, int]] = (1, 1)
    reads_layers: ClassVar[bool] = True

    method: Literal["rkd_angle"] = Field(default="rkd_angle", description="Angles among embeddings.")
    angle_weight: float = Field(default=50.0, ge=0, description="Weight of the angles' term.")


class Rkd(Method):
    """Relational distillation of distances and angles (Park et al. 2019) between embeddings."""

    teachers: ClassVar[tuple[int, int]] = (1, 1)
    reads_layers: ClassVar[bool] = True

    method: Literal["rkd"] = Field(default="rkd", description="Distances and angles among embeddings.")
    distance_weight: float = Field(default=25.0, ge=0, description="Weight of the distances' term.")
    angle_weight: float = Field(default=50.0, ge=0, description="Weight of the angles' term.")


class _TaughtMutual(Method):
    students: ClassVar[tuple[int, int]] = (2, 2)
    teachers: ClassVar[tuple[int, int]] = (1, 1)

    weight: float = Field(default=1.0, ge=0, description="λ, the weight of the teacher's term.")
    peer_weight: float = Field(default=1.0, ge=0, description="β, the weight of the other student's term.")
    temperature: float = Field(default=1.0, gt=0, description="T of the teacher's term, which is multiplied by T².")


class Fddml(_TaughtMutual):
    """Full deep distillation mutual learning (Lukman & Yang 2022): two students learn from a teacher and each other."""

    method: Literal["fddml"] = Field(default="fddml", description="A teacher for both of two students.")


class Hddml(_TaughtMutual):
    """Half deep distillation mutual learning (Lukman & Yang 2022): as `fddml`, the teacher for the first student only."""

    method: Literal["hddml"] = Field(default="hddml", description="A teacher for the first of two students.")


class Dcm(_Layered):
    """Dense cross-layer mutual distillation (Yao & Sun 2020): classifiers on hidden layers teach one another too."""

    students: ClassVar[tuple[int, int]] = (2, _MANY)

    method: Literal["dcm"] = Field(default="dcm", description="Mutual learning of classifiers at several stages.")
    auxiliary_weight: float = Field(default=1.0, ge=0, description="α, of the auxiliary classifiers' cross-entropies.")
    same_weight: float = Field(default=1.0, ge=0, description="β, of the divergences at the same stage.")
    other_weight: float = Field(default=1.0, ge=0, description="γ, of the divergences from other stages.")


class Dml(Method):
    """Deep mutual learning (Zhang et al. 2018): every student mimics the others' probabilities."""

    students: ClassVar[tuple[int, int]] = (2, _MANY)

    method: Literal["dml"] = Field(default="dml", description="Deep mutual learning.")
    weight: float = Field(default=1.0, ge=0, description="Weight of the mutual term.")
    temperature: float = Field(default=1.0, gt=0, description="T of the softmax; the term is multiplied by T².")


@dataclass(frozen=True)
class EnsembleSettings:
    """What is known of a KDCL ensemble besides its function.

    Attributes:
        about: how it makes the target, for the documentation.
        heavy: whether one target takes milliseconds, so that the server makes it beside its event loop.
        held_out: whether it measures weights on held-out samples, which `data.held_out` must then set aside.
    """

    about: str
    heavy: bool = False
    held_out: bool = False


KDCL_ENSEMBLES: Mapping[str, EnsembleSettings] = {
    "naive": EnsembleSettings("the best student's logits"),
    "linear": EnsembleSettings("the best combination", heavy=True),
    "min_logit": EnsembleSettings("the least margins"),
    "general": EnsembleSettings("weights measured on held-out samples", held_out=True),
}
"""The ensembles that KDCL may use, by name. Each has a function in `codistill_server.ensembles.kdcl`."""

if TYPE_CHECKING:
    EnsembleName = str
else:  # The names are known only once the table above is read.
    EnsembleName = Literal[tuple(KDCL_ENSEMBLES)]


class Kdcl(Method):
    """Collaborative learning (Guo et al. 2020): every student learns from one ensemble's soft target."""

    students: ClassVar[tuple[int, int]] = (2, _MANY)

    method: Literal["kdcl"] = Field(default="kdcl", description="Collaborative learning with an ensemble.")
    ensemble: EnsembleName = Field(
        default="min_logit",
        description=f"How the target is made: {'; '.join(row.about for row in KDCL_ENSEMBLES.values())}.",
    )
    weight: float = Field(default=1.0, ge=0, description="λ, the weight of the distillation term.")
    temperature: float = Field(default=2.0, gt=0, description="T of the softmax; the term is multiplied by T².")

    @property
    def title(self) -> str:
        """The method with its variant."""
        return f"{self.method}/{self.ensemble}"


class _Sometimes(Method):
    """A method that need not exchange in every round."""

    every: int = Field(default=1, ge=1, description="One round in so many exchanges; the others learn from the labels.")
    start_epoch: float = Field(default=0.0, ge=0, description="Epochs before the first exchange.")

    def exchange_schedule(self, rounds_per_epoch: int) -> ExchangeSchedule:
        """Returns which rounds exchange."""
        return ExchangeSchedule(math.ceil(self.start_epoch * rounds_per_epoch), self.every)

    def problems(self, students: Sequence[str], teachers: Sequence[str], epochs: int) -> Iterator[str]:
        """Yields what of the run does not meet the method's needs, each with its path in the experiment."""
        yield from super().problems(students, teachers, epochs)
        if self.start_epoch >= epochs:
            yield (
                f"distillation.start_epoch: {self.start_epoch:g} is not allowed; allowed is less than the {epochs} of "
                "training.epochs, or nothing is ever exchanged"
            )


class CrossArchitecture(_Sometimes):
    """Cross-architecture distillation, after Gao et al. (2019): now and then the students learn from their mean.

    The term's weight rises from 0 at `start_epoch` to `weight` at `full_epoch`. Interval, curve and aggregation are this
    project's reading of 'discontinuous distillation with progressively enhanced constraints'.
    """

    students: ClassVar[tuple[int, int]] = (2, _MANY)

    method: Literal["cross_architecture"] = Field(
        default="cross_architecture", description="Discontinuous distillation with a rising constraint."
    )
    every: int = Field(default=5, ge=1, description="One round in so many exchanges; the others learn from the labels.")
    weight: float = Field(default=1.0, ge=0, description="Weight of the distillation term once it has risen.")
    temperature: float = Field(default=2.0, gt=0, description="T of the softmax; the term is multiplied by T².")
    rise: Literal["linear", "sigmoid", "step"] = Field(
        default="linear", description="How the weight rises: evenly; slowly at both ends; in four steps."
    )
    full_epoch: float | None = Field(
        default=None, gt=0, description="The epoch at which the weight has risen; the last one's end by default."
    )

    def problems(self, students: Sequence[str], teachers: Sequence[str], epochs: int) -> Iterator[str]:
        """Yields what of the run does not meet the method's needs, each with its path in the experiment."""
        yield from super().problems(students, teachers, epochs)
        if self.full_epoch is not None and self.full_epoch <= self.start_epoch:
            yield (
                f"distillation.full_epoch: {self.full_epoch:g} is not allowed; allowed is more than the "
                f"{self.start_epoch:g} of distillation.start_epoch"
            )


class Custom(_Sometimes):
    """A pair of your own: `server` makes targets, `worker` the loss. See docs/methods.md."""

    teachers: ClassVar[tuple[int, int]] = (0, _MANY)

    method: Literal["custom"] = Field(default="custom", description="A pair of your own.")
    server: str = Field(description="`package.module:callable` that is given `parameters` and returns a server half.")
    worker: str = Field(description="`package.module:callable` that is given `parameters` and returns a worker half.")
    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="Keyword arguments of both callables: text, finite numbers, lists, maps.",
    )

    @property
    def title(self) -> str:
        """The method with its variant."""
        return f"{self.method}/{self.worker}"

    @field_validator("server", "worker")
    @classmethod
    def _reference(cls, value: str) -> str:
        if not REFERENCE.fullmatch(value):
            raise ValueError("is not of the form package.module:callable")
        return value

    @field_validator("parameters")
    @classmethod
    def _representable(cls, value: dict[str, Any]) -> dict[str, Any]:
        return plain_values(value)


Distillation = Annotated[
    Independent
    | Kd
    | LogitRegression
    | BornAgain
    | Vid
    | RkdDistance
    | RkdAngle
    | Rkd
    | Fddml
    | Hddml
    | Dml
    | Dcm
    | Kdcl
    | CrossArchitecture
    | Custom,
    Field(discriminator="method"),
]


class DistillationOverrides(Section):
    """What of `distillation` one student may have of its own."""

    weight: float | None = Field(default=None, ge=0, description="Weight of the method's term.")
    temperature: float | None = Field(default=None, gt=0, description="T of the softmax of this student's term.")


def _at_least(least: int, most: int) -> str:
    return f"{least}" if least == most else f"at least {least}"
