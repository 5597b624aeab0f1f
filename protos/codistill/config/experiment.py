"""The experiment file as a whole: its sections, how they must fit each other, and how it is read.

:func:`load` reads a YAML file into an :class:`Experiment`. Unknown keys are rejected. Every error names the path, the
value and what is allowed. An experiment decides all of a run's numbers: two processes with the same
:func:`codistill.config.fingerprint.identity` compute the same. Fields marked *operational* (a device, a time-out) may
differ between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import Field, ValidationError, ValidationInfo, model_validator

from codistill.config.base import Section
from codistill.config.data import Data
from codistill.config.errors import NAME_PATTERN, SectionError, problem_lines, word_lines
from codistill.config.exchange import Exchange
from codistill.config.methods import Distillation, Kdcl
from codistill.config.participants import Student, Teacher
from codistill.config.plans import StudentPlan, TeacherPlan
from codistill.config.strict_yaml import LONGEST, Document, DocumentTooLargeError, dump_yaml, parse_yaml
from codistill.config.training import Training

__all__ = ["Experiment", "ExperimentError", "load", "parse"]


class ExperimentError(ValueError):
    """An experiment that cannot be used.

    Attributes:
        source: the file, or whatever else names the experiment.
        problems: a line for each thing wrong, with its path in the experiment.
    """

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))


class Experiment(Section):
    """One run: what is learnt, by whom, and how they teach one another."""

    name: str = Field(pattern=NAME_PATTERN, description="Names the run folder and the metrics.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Everything random in a run follows from it.")
    data: Data = Field(description="What the students learn.")
    training: Training = Field(description="How they learn.")
    distillation: Distillation = Field(
        default_factory=Kdcl, description="How they teach one another. `method` decides which keys there are."
    )
    exchange: Exchange = Field(default_factory=Exchange, description="How workers and server communicate.")
    students: tuple[Student, ...] = Field(
        min_length=1,
        max_length=256,
        strict=False,
        description="Who learns. Every table and an ensemble's reduction keep this order.",
    )
    teachers: tuple[Teacher, ...] = Field(
        default=(), max_length=256, strict=False, description="From whom they learn, if the method has teachers."
    )

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Experiment:
        problems = list(self._problems(info.context or Document(None)))
        if problems:
            raise SectionError(problems)
        return self

    def _problems(self, read: Document) -> Iterator[str]:
        yield from self._name_problems()
        yield from self.distillation.problems(self)
        yield from self._quorum_problems()
        yield from self.data.size_problems(self.training.batch_size)
        for position, student in enumerate(self.students):
            if "view" in student.data.augment:
                yield (
                    f"students.{position}.data.augment.view: {student.data.augment['view']!r}, but one view is chosen for all; "
                    "set data.augment.view"
                )
            elif self.shared_view and student.data.augment:
                yield (
                    f"students.{position}.data.augment: {', '.join(student.data.augment)}, but all see the same view of a "
                    "sample; set data.augment, or data.augment.view: own"
                )
            try:
                self._plan(student)
            except ValidationError as error:
                own = read.within("students", str(position))
                yield from (f"students.{position}.{line}" for line in problem_lines(error, StudentPlan, own))

    def _name_problems(self) -> Iterator[str]:
        """Yield a line for each name that is given twice."""
        seen: dict[str, tuple[str, str]] = {}
        named = [(f"students.{position}", student.name) for position, student in enumerate(self.students)]
        named += [(f"teachers.{position}", teacher.name) for position, teacher in enumerate(self.teachers)]
        for path, name in named:
            first_path, first_name = seen.setdefault(name.casefold(), (path, name))
            if first_path != path:
                reason = "" if name == first_name else ", because file systems may ignore case"
                yield f"{path}.name: {name!r} is already the name of {first_path}{reason}; give each its own"

    def _quorum_problems(self) -> Iterator[str]:
        participants, quorum = len(self.participants), self.exchange.quorum
        if self.exchange.on_absence == "proceed" and self.distillation.exchanges and quorum > participants:
            kinds = "students and teachers" if self.teachers else "students"
            yield f"exchange.quorum: {quorum} is not allowed; allowed: 2 to the {participants} {kinds}"

    @property
    def names(self) -> tuple[str, ...]:
        """The students' names, in order."""
        return tuple(student.name for student in self.students)

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """The teachers' names, in order."""
        return tuple(teacher.name for teacher in self.teachers)

    @property
    def participants(self) -> tuple[str, ...]:
        """The names of the students, then of the teachers."""
        return (*self.names, *self.teacher_names)

    @property
    def devices(self) -> tuple[str, ...]:
        """`training.device` of each participant, in order."""
        return tuple(each.training.device or self.training.device for each in (*self.students, *self.teachers))

    @property
    def shared_view(self) -> bool:
        """Whether all students and teachers see the same crop and flip of a sample."""
        view = self.data.augment.view
        return view == "shared" or (view == "auto" and bool(self.teachers))

    @property
    def steps_per_epoch(self) -> int | None:
        """Training steps of an epoch; None where the data set's size is not known without loading it."""
        samples = self.data.training_samples
        return None if samples is None else samples // self.training.batch_size

    def plan(self, name: str) -> StudentPlan:
        """Return the settings of one student, overrides applied.

        Raises:
            KeyError: there is no student of that name.
        """
        student = next((student for student in self.students if student.name == name), None)
        if student is None:
            raise KeyError(name)
        return self._plan(student)

    def _plan(self, student: Student) -> StudentPlan:
        overrides = student.model_dump(include={"training", "data", "distillation"}, exclude_unset=True)
        sections: dict[str, Any] = {}
        for section in ("data", "training", "distillation"):
            base = getattr(self, section).model_dump()
            own = {key: value for key, value in overrides.get(section, {}).items() if value is not None}
            if section == "distillation":  # the method's own check reports the others, once
                own = {key: value for key, value in own.items() if key in base}
            sections[section] = _merge(base, own)
        return StudentPlan.model_validate({"student": student, **sections})

    def teacher_plan(self, name: str) -> TeacherPlan:
        """Return the settings of one teacher, overrides applied.

        Raises:
            KeyError: there is no teacher of that name.
        """
        teacher = next((teacher for teacher in self.teachers if teacher.name == name), None)
        if teacher is None:
            raise KeyError(name)
        own = teacher.training.model_dump(exclude_none=True)
        training = self.training.model_copy(update=own)
        return TeacherPlan(teacher=teacher, data=self.data, training=training, distillation=self.distillation)

    def replace(self, **changes: Any) -> Experiment:
        """Return the experiment with top-level fields replaced, validated again.

        Raises:
            ExperimentError: a change does not fit the schema or the other fields.
        """
        return _validated({**dict(self), **changes}, self.name)

    def with_method(self, distillation: Distillation, **changes: Any) -> Experiment:
        """Return the experiment with another method and top-level fields replaced, validated again.

        Overrides of a student that the method does not have are left out.

        Raises:
            ExperimentError: the method or a change does not fit the schema or the other fields.
        """
        students = tuple(
            student.model_copy(
                update={"distillation": student.distillation.only(distillation.student_settings(position))}
            )
            for position, student in enumerate(self.students)
        )
        return self.replace(distillation=distillation, students=students, **changes)

    def to_yaml(self) -> str:
        """Return the resolved experiment as a file that reads back equal."""
        return dump_yaml(self.model_dump(mode="json"))


def load(path: str | Path) -> Experiment:
    """Read an experiment file.

    Raises:
        ExperimentError: the file cannot be read, is too large, is not YAML, or does not fit the schema.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            read = file.read(4 * LONGEST + 1)  # a character has up to four bytes
        if len(read) > 4 * LONGEST:
            raise ExperimentError(
                str(path), [f"is too large: over {4 * LONGEST:,} bytes; is it the experiment's file?"]
            )
        text = read.decode("utf-8")
    except OSError as error:
        raise ExperimentError(str(path), [f"cannot be read: {error.strerror or error}"]) from error
    except UnicodeDecodeError as error:
        raise ExperimentError(str(path), [f"is not UTF-8 text: {error.reason} at byte {error.start}"]) from error
    return parse(text, str(path))


def parse(text: str, source: str = "experiment") -> Experiment:
    """Read an experiment from YAML text; `source` names it in errors.

    Raises:
        ExperimentError: the text is too large, is not YAML, or does not fit the schema.
    """
    try:
        read = parse_yaml(text)
    except DocumentTooLargeError as error:
        raise ExperimentError(source, [f"is too large: {error}"]) from error
    except ValueError as error:
        raise ExperimentError(source, [f"is not YAML: {error}"]) from error
    document = read.value
    if not isinstance(document, dict):
        kind = "empty" if document is None else f"a {type(document).__name__}"
        raise ExperimentError(source, [f"is {kind}; expected the keys {', '.join(Experiment.model_fields)}"])
    experiment = _validated(cast("dict[Any, Any]", document), source, read)
    problems = word_lines(read, ())
    if problems:
        raise ExperimentError(source, problems)
    return experiment


def _merge(base: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `own` in their places; maps are merged key by key."""
    merged = dict(base)
    for key, value in own.items():
        inner = merged.get(key)
        merged[key] = (
            _merge(cast("dict[str, Any]", inner), value)
            if isinstance(inner, dict) and isinstance(value, dict)
            else value
        )
    return merged


def _validated(document: dict[Any, Any], source: str, read: Document | None = None) -> Experiment:
    try:
        return Experiment.model_validate(document, context=read)
    except ValidationError as error:
        lines = problem_lines(error, Experiment, read)
        raise ExperimentError(source, [*lines, *(word_lines(read, lines) if read else [])]) from error
