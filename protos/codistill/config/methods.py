"""The experiment file's `distillation` section: the settings of every method.

A built-in method is a class here and its place in :data:`Distillation`; its aggregator and objective are found by its name.
A new KDCL ensemble is a row of :data:`KDCL_ENSEMBLES`, and a function of the same name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator

from codistill.config.base import REFERENCE, require_json_values
from codistill.config.method_base import UNLIMITED, ExperimentSections, Intermittent, LayerReader, Method

__all__ = [
    "KDCL_ENSEMBLES",
    "METHODS",
    "BornAgain",
    "CrossArchitecture",
    "Custom",
    "Dcm",
    "Distillation",
    "Dml",
    "EnsembleName",
    "EnsembleSettings",
    "Fddml",
    "Hddml",
    "Independent",
    "Kd",
    "Kdcl",
    "LogitRegression",
    "Rkd",
    "RkdAngle",
    "RkdDistance",
    "Vid",
]


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

    teacher_limits: ClassVar[tuple[int, int]] = (1, 1)

    method: Literal["kd"] = Field(default="kd", description="Knowledge distillation from a teacher.")
    weight: float = Field(
        default=0.9, ge=0, le=1, description="λ of (1−λ)·CE + λ·T²·KL: the teacher's share; the labels have the rest."
    )
    temperature: float = Field(default=4.0, gt=0, description="T of the softmax; the term is multiplied by T².")


class LogitRegression(Method):
    """Logit regression (Ba & Caruana 2014): the students fit the teacher's logits by least squares."""

    teacher_limits: ClassVar[tuple[int, int]] = (1, 1)

    method: Literal["logit_regression"] = Field(
        default="logit_regression", description="Regression to a teacher's logits."
    )
    weight: float = Field(default=1.0, ge=0, description="Weight of the mean squared difference.")
    label_weight: float = Field(default=0.0, ge=0, description="Weight of the cross-entropy with the labels.")


class BornAgain(Method):
    """Born-again networks (Furlanello et al. 2018): every student learns from its own previous generation.

    Without `teachers`, `codistill run` trains the generations one after the other. The first learns from the labels alone,
    each later one from the one before. With `teachers` there is a single generation. Give one teacher for each student,
    in the students' order and with the same model.
    """

    teacher_limits: ClassVar[tuple[int, int]] = (0, UNLIMITED)

    method: Literal["born_again"] = Field(default="born_again", description="Generations that teach the next.")
    generations: int = Field(
        default=2, ge=1, le=100, description="How many generations are trained in sequence; 1 if `teachers` are given."
    )
    weight: float = Field(default=1.0, ge=0, description="Weight of the divergence from the teacher.")
    temperature: float = Field(default=1.0, gt=0, description="T of the softmax; the term is multiplied by T².")

    def problems(self, experiment: ExperimentSections) -> Iterator[str]:
        """Yield the needs not met, with those of generations and of teachers of the same architecture."""
        yield from super().problems(experiment)
        students, teachers = experiment.students, experiment.teachers
        if teachers and self.generations != 1:
            yield (
                f"distillation.generations: {self.generations}, but `teachers` are the generation before; set it to 1, or "
                "remove `teachers`"
            )
        elif teachers and len(teachers) != len(students):
            yield f"teachers: there are {len(teachers)}, but `born_again` needs one for each of the {len(students)} students"
        elif not teachers and self.generations < 2:
            yield "distillation.generations: 1 is not allowed without `teachers`; allowed: 2 to 100"
        for position, (student, teacher) in enumerate(zip(students, teachers, strict=False)):
            if (student.model, student.model_args) != (teacher.model, teacher.model_args):
                yield (
                    f"teachers.{position}.model: {teacher.model!r} with {teacher.model_args}, but `born_again` has the "
                    f"student's own architecture: {student.model!r} with {student.model_args}"
                )


class Vid(LayerReader):
    """Variational information distillation (Ahn et al. 2019): the students' hidden layers learn to predict the teacher's."""

    teacher_limits: ClassVar[tuple[int, int]] = (1, 1)

    method: Literal["vid"] = Field(default="vid", description="Hidden layers that predict the teacher's.")
    weight: float = Field(default=1.0, ge=0, description="λ, the weight of each layer's term.")


class _Relational(Method):
    """A method that compares the relations among a batch's samples."""

    teacher_limits: ClassVar[tuple[int, int]] = (1, 1)
    depends_on_models: ClassVar[bool] = True

    def problems(self, experiment: ExperimentSections) -> Iterator[str]:
        """Yield the needs not met, with that of a batch that has relations to compare."""
        yield from super().problems(experiment)
        batch_size = experiment.training.batch_size
        if batch_size < 3:
            yield (
                f"training.batch_size: {batch_size} is not allowed; allowed is 3 or more, as `{self.method_name()}` compares "
                "the relations among a batch's samples, and in smaller batches all are the same"
            )


class RkdDistance(_Relational):
    """Relational distillation of distances (Park et al. 2019) between the embeddings of a batch's samples."""

    method: Literal["rkd_distance"] = Field(default="rkd_distance", description="Distances among embeddings.")
    distance_weight: float = Field(default=25.0, ge=0, description="Weight of the distances' term.")


class RkdAngle(_Relational):
    """Relational distillation of angles (Park et al. 2019) between the embeddings of a batch's samples."""

    method: Literal["rkd_angle"] = Field(default="rkd_angle", description="Angles among embeddings.")
    angle_weight: float = Field(default=50.0, ge=0, description="Weight of the angles' term.")


class Rkd(_Relational):
    """Relational distillation of distances and angles (Park et al. 2019) between embeddings."""

    method: Literal["rkd"] = Field(default="rkd", description="Distances and angles among embeddings.")
    distance_weight: float = Field(default=25.0, ge=0, description="Weight of the distances' term.")
    angle_weight: float = Field(default=50.0, ge=0, description="Weight of the angles' term.")


class _TeacherAndPeer(Method):
    """A method for two students that learn from a teacher and from each other."""

    student_limits: ClassVar[tuple[int, int]] = (2, 2)
    teacher_limits: ClassVar[tuple[int, int]] = (1, 1)

    weight: float = Field(default=1.0, ge=0, description="λ, the weight of the teacher's term.")
    peer_weight: float = Field(default=1.0, ge=0, description="β, the weight of the other student's term.")
    temperature: float = Field(default=1.0, gt=0, description="T of the teacher's term, which is multiplied by T².")


class Fddml(_TeacherAndPeer):
    """Full deep distillation mutual learning (Lukman & Yang 2022): two students learn from a teacher and each other."""

    method: Literal["fddml"] = Field(default="fddml", description="A teacher for both of two students.")


class Hddml(_TeacherAndPeer):
    """Half deep distillation mutual learning (Lukman & Yang 2022): as `fddml`, the teacher for the second student only."""

    method: Literal["hddml"] = Field(default="hddml", description="A teacher for the second of two students.")

    @classmethod
    def student_settings(cls, position: int) -> tuple[str, ...]:
        """Return none for the first student, which has no teacher: both settings are of the teacher's term."""
        return super().student_settings(position) if position else ()

    @classmethod
    def _no_effect(cls, name: str, allowed: tuple[str, ...]) -> str:
        del name, allowed
        return (
            "has no teacher for the first student, and the setting is of the teacher's term; its settings are "
            f"{', '.join(field for field in cls.model_fields if field != 'method')}, and only the second student can override "
            "weight, temperature"
        )


class Dcm(LayerReader):
    """Dense cross-layer mutual distillation (Yao & Sun 2020): classifiers on hidden layers teach one another too."""

    student_limits: ClassVar[tuple[int, int]] = (2, UNLIMITED)

    method: Literal["dcm"] = Field(default="dcm", description="Mutual learning of classifiers at several stages.")
    auxiliary_weight: float = Field(
        default=1.0, ge=0, description="α, the weight of the auxiliary classifiers' cross-entropies."
    )
    same_weight: float = Field(default=1.0, ge=0, description="β, the weight of the divergences at the same stage.")
    other_weight: float = Field(default=1.0, ge=0, description="γ, the weight of the divergences from other stages.")


class Dml(Method):
    """Deep mutual learning (Zhang et al. 2018): every student mimics the others' probabilities."""

    student_limits: ClassVar[tuple[int, int]] = (2, UNLIMITED)
    own_temperatures: ClassVar[bool] = False

    method: Literal["dml"] = Field(default="dml", description="Deep mutual learning.")
    weight: float = Field(default=1.0, ge=0, description="Weight of the mutual term.")
    temperature: float = Field(default=1.0, gt=0, description="T of the softmax; the term is multiplied by T².")


@dataclass(frozen=True)
class EnsembleSettings:
    """The properties of a KDCL ensemble.

    Attributes:
        about: a phrase for the documentation on how the target is made.
        heavy: whether one target takes milliseconds; the server then makes it beside its event loop.
        held_out: whether weights are measured on held-out samples; `data.held_out` must then set some aside.
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
"""The ensembles of KDCL, by name."""

if TYPE_CHECKING:
    EnsembleName = str
else:  # A type checker cannot read the names from the table.
    EnsembleName = Literal[tuple(KDCL_ENSEMBLES)]


class Kdcl(Method):
    """Collaborative learning (Guo et al. 2020): every student learns from one ensemble's soft target."""

    student_limits: ClassVar[tuple[int, int]] = (2, UNLIMITED)

    method: Literal["kdcl"] = Field(default="kdcl", description="Collaborative learning with an ensemble.")
    ensemble: EnsembleName = Field(
        default="min_logit",
        description=f"How the target is made: {'; '.join(f'`{name}`: {row.about}' for name, row in KDCL_ENSEMBLES.items())}.",
    )
    weight: float = Field(default=1.0, ge=0, description="λ, the weight of the distillation term.")
    temperature: float = Field(default=2.0, gt=0, description="T of the softmax; the term is multiplied by T².")

    @classmethod
    def variants(cls) -> Mapping[str, Mapping[str, Any]]:
        """Return the settings that choose each ensemble, by title."""
        return {f"{cls.method_name()}/{name}": {"ensemble": name} for name in KDCL_ENSEMBLES}

    @property
    def title(self) -> str:
        """The method with its ensemble."""
        return f"{self.method}/{self.ensemble}"

    def problems(self, experiment: ExperimentSections) -> Iterator[str]:
        """Yield the needs not met, with that of held-out samples."""
        yield from super().problems(experiment)
        if KDCL_ENSEMBLES[self.ensemble].held_out and not experiment.data.held_out:
            yield (
                f"data.held_out: 0, but the `{self.ensemble}` ensemble measures its weights on held-out samples; set it, for "
                "example to 1000"
            )


class CrossArchitecture(Intermittent):
    """Cross-architecture distillation, after Gao et al. (2019): now and then the students learn from their mean.

    The term's weight rises from 0 at `start_epoch` to `weight` at `full_epoch`. Interval, curve and aggregation are this
    project's reading of 'discontinuous distillation with progressively enhanced constraints'.
    """

    student_limits: ClassVar[tuple[int, int]] = (2, UNLIMITED)
    own_temperatures: ClassVar[bool] = False

    method: Literal["cross_architecture"] = Field(
        default="cross_architecture", description="Discontinuous distillation with a rising constraint."
    )
    every: int = Field(
        default=5, ge=1, description="One step in this many exchanges. In the others, students learn from the labels."
    )
    weight: float = Field(default=1.0, ge=0, description="Weight of the distillation term once it has risen.")
    temperature: float = Field(default=2.0, gt=0, description="T of the softmax; the term is multiplied by T².")
    rise: Literal["linear", "sigmoid", "step"] = Field(
        default="linear", description="How the weight rises: evenly; slowly at both ends; in four steps."
    )
    full_epoch: float | None = Field(
        default=None, gt=0, description="The epoch at which the weight has risen; by default the end of training."
    )

    def problems(self, experiment: ExperimentSections) -> Iterator[str]:
        """Yield the needs not met, with that of an epoch at which the weight has risen."""
        yield from super().problems(experiment)
        if self.full_epoch is not None and self.full_epoch <= self.start_epoch:
            yield (
                f"distillation.full_epoch: {self.full_epoch:g} is not allowed; allowed is more than the "
                f"{self.start_epoch:g} of distillation.start_epoch"
            )


class Custom(Intermittent):
    """Your own pair: `server` makes targets, `worker` the loss. See docs/methods.md."""

    teacher_limits: ClassVar[tuple[int, int]] = (0, UNLIMITED)
    depends_on_models: ClassVar[bool] = True

    method: Literal["custom"] = Field(default="custom", description="Your own pair.")
    server: str = Field(description="`package.module:callable` that gets `parameters` and returns an aggregator.")
    worker: str = Field(description="`package.module:callable` that gets `parameters` and returns an objective.")
    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="Keyword arguments of both callables: text, finite numbers, lists, maps.",
    )

    @classmethod
    def variants(cls) -> Mapping[str, Mapping[str, Any]]:
        """Return nothing: an aggregator and an objective have no defaults."""
        return {}

    @property
    def title(self) -> str:
        """The method with the objective's name."""
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
        return require_json_values(value)


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


METHODS: Mapping[str, type[Method]] = {
    settings.method_name(): settings for settings in get_args(get_args(Distillation)[0])
}
"""The settings of every method, by its name."""
