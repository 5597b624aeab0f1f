"""The experiment file as a whole: what its sections must be to each other, and its reading.

An experiment is a YAML file that is read into :class:`Experiment`. Unknown keys are refused, every error names the
path, the value and what is allowed. Everything that decides a run's numbers is in it, so two processes whose
:func:`codistill.config.fingerprint.identity` agree compute the same thing; fields marked *operational* (a device, a time-out) may differ between
them and are left out of the identity.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import Field, ValidationError, model_validator

from codistill.config.base import Section
from codistill.config.data import DATASETS, Data
from codistill.config.errors import NAME, InconsistentError, lines
from codistill.config.exchange import Exchange
from codistill.config.methods import (
    KDCL_ENSEMBLES,
    BornAgain,
    CrossArchitecture,
    Custom,
    Distillation,
    Dml,
    Kdcl,
    Rkd,
    RkdAngle,
    RkdDistance,
)
from codistill.config.participants import Student, StudentPlan, Teacher, TeacherPlan
from codistill.config.training import Training

__all__ = ["Experiment", "ExperimentError", "load", "parse"]


class ExperimentError(ValueError):
    """An experiment that cannot be used; `problems` holds one line for each thing wrong."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))


class Experiment(Section):
    """One run: what is learnt, by whom, and how they teach one another."""

    name: str = Field(pattern=NAME, description="Names the run folder and the metrics.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Everything random in a run follows from it.")
    data: Data = Field(description="What the students learn.")
    training: Training = Field(description="How they learn.")
    distillation: Distillation = Field(
        default_factory=Kdcl, description="How they teach one another; `method` chooses which keys there are."
    )
    exchange: Exchange = Field(default_factory=Exchange, description="How workers and server speak.")
    students: tuple[Student, ...] = Field(
        min_length=1,
        max_length=256,
        strict=False,
        description="Who learns. The order is that of every table, and of an ensemble's reduction.",
    )
    teachers: tuple[Teacher, ...] = Field(
        default=(), max_length=256, strict=False, description="Whom they learn from, where the method has teachers."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        problems = list(self._problems())
        if problems:
            raise InconsistentError(problems)
        return self

    def _problems(self) -> Iterator[str]:
        yield from self._name_problems()
        method = self.distillation
        yield from method.problems(self.names, self.teacher_names, self.training.epochs)
        everybody = len(self.participants)
        if self.exchange.on_absence == "proceed" and method.exchanges and self.exchange.quorum > everybody:
            whom = "students and teachers" if self.teachers else "students"
            yield f"exchange.quorum: {self.exchange.quorum} is not allowed; allowed: 2 to the {everybody} {whom}"
        if isinstance(method, Kdcl) and KDCL_ENSEMBLES[method.ensemble].held_out and not self.data.held_out:
            yield (
                f"data.held_out: 0, but the `{method.ensemble}` ensemble measures its weights on held-out samples; set it, "
                "for example to 1000"
            )
        yield from self._data_problems()
        if isinstance(method, Rkd | RkdAngle | RkdDistance) and self.training.batch_size < 3:
            yield (
                f"training.batch_size: {self.training.batch_size} is not allowed; allowed is 3 or more, as "
                f"`{method.method}` compares the relations among a batch's samples, and fewer all have the same"
            )
        if isinstance(method, BornAgain):
            for position, (student, teacher) in enumerate(zip(self.students, self.teachers, strict=False)):
                if (student.model, student.model_args) != (teacher.model, teacher.model_args):
                    yield (
                        f"teachers.{position}.model: {teacher.model!r} with {teacher.model_args}, but `born_again` has the "
                        f"student's own architecture: {student.model!r} with {student.model_args}"
                    )
        for position, student in enumerate(self.students):
            if isinstance(method, Dml | CrossArchitecture) and student.distillation.temperature is not None:
                yield (
                    f"students.{position}.distillation.temperature: {student.distillation.temperature}, but `{method.method}` "
                    "softens all students' logits alike; set distillation.temperature"
                )
            if self.shared_view and student.data.augment:
                yield (
                    f"students.{position}.data.augment: {', '.join(student.data.augment)}, but all see the same view of a "
                    "sample; set data.augment, or data.augment.view: own"
                )
            try:
                self._plan(student)
            except ValidationError as error:
                yield from (f"students.{position}.{line}" for line in lines(error, StudentPlan))

    def _name_problems(self) -> Iterator[str]:
        """Yields names that are given twice."""
        seen: dict[str, tuple[str, str]] = {}
        named = [(f"students.{position}", each.name) for position, each in enumerate(self.students)]
        named += [(f"teachers.{position}", each.name) for position, each in enumerate(self.teachers)]
        for place, name in named:
            first, like = seen.setdefault(name.casefold(), (place, name))
            if first != place:
                alike = "" if name == like else ", as file systems may tell no case apart"
                yield f"{place}.name: {name!r} is the name of {first} already{alike}; give each its own"

    def _data_problems(self) -> Iterator[str]:
        """Yields what does not fit the data set, as far as its size is known without loading it."""
        data, known = self.data, DATASETS.get(self.data.dataset)
        if data.normalize is not None and known is not None and known.channels is not None:
            given = len(data.normalize.mean)
            if given != known.channels:
                yield f"data.normalize: {given} channels, but the images of {data.dataset} have {known.channels}"
        train, test = (known.train, known.test) if known is not None else (None, None)
        if known is not None and train is not None and test is not None:
            wanted = data.train_size or train
            most = train + test - 1 if known.divided else train
            if wanted > most:
                yield f"data.train_size: {wanted} is more than {data.dataset} has to train on; allowed: 1 to {most}"
                return
            left = train + test - wanted if known.divided else test
            if (data.test_size or 0) > left:
                yield f"data.test_size: {data.test_size} is more than {data.dataset} has to test on; allowed: 1 to {left}"
        samples = data.train_size or train
        if samples is None:
            return
        trained = max(samples - data.held_out, 0)
        if data.train_size is None and not trained:
            yield f"data.held_out: {data.held_out} leaves nothing of {samples} training samples; allowed: 0 to {samples - 1}"
        elif trained < self.training.batch_size:
            yield (
                f"training.batch_size: {self.training.batch_size} is larger than the {trained} training samples "
                f"({'data.train_size' if data.train_size else f'{samples} of {data.dataset}'} less data.held_out)"
            )
        else:
            yield from self._start_problems(trained // self.training.batch_size)

    def _start_problems(self, rounds_per_epoch: int) -> Iterator[str]:
        """Yields a start within the last epoch that no round comes after."""
        method, rounds = self.distillation, self.training.epochs * rounds_per_epoch
        if not isinstance(method, CrossArchitecture | Custom) or method.start_epoch >= self.training.epochs:
            return
        if method.exchange_schedule(rounds_per_epoch).start >= rounds:
            yield (
                f"distillation.start_epoch: {method.start_epoch:g} is not allowed; allowed is up to "
                f"{(rounds - 1) * 1000 // rounds_per_epoch / 1000:g}, where the last of {rounds} rounds begins, or nothing is ever "
                "exchanged"
            )

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
        """The names of all that take part in an exchange: the students, then the teachers."""
        return (*self.names, *self.teacher_names)

    @property
    def shared_view(self) -> bool:
        """Whether all see the same crop and flip of a sample."""
        view = self.data.augment.view
        return view == "shared" or (view == "auto" and bool(self.teachers))

    def plan(self, name: str) -> StudentPlan:
        """Returns the settings of one student, overrides applied.

        Raises:
            KeyError: there is no student of that name.
        """
        student = next((each for each in self.students if each.name == name), None)
        if student is None:
            raise KeyError(name)
        return self._plan(student)

    def _plan(self, student: Student) -> StudentPlan:
        overrides = student.model_dump(include={"training", "data", "distillation"}, exclude_unset=True)
        sections: dict[str, Any] = {}
        for section in ("data", "training", "distillation"):
            base = getattr(self, section).model_dump()
            own = {key: value for key, value in overrides.get(section, {}).items() if value is not None}
            if section == "distillation":  # a method without the parameter has nothing to override
                own = {key: value for key, value in own.items() if key in base}
            sections[section] = _merge(base, own)
        return StudentPlan.model_validate({"student": student, **sections})

    def teacher_plan(self, name: str) -> TeacherPlan:
        """Returns the settings of one teacher, overrides applied.

        Raises:
            KeyError: there is no teacher of that name.
        """
        teacher = next((each for each in self.teachers if each.name == name), None)
        if teacher is None:
            raise KeyError(name)
        own = teacher.training.model_dump(exclude_none=True)
        training = self.training.model_copy(update=own)
        return TeacherPlan(teacher=teacher, data=self.data, training=training, distillation=self.distillation)

    def replace(self, **changes: Any) -> Experiment:
        """Returns the experiment with top-level fields replaced, validated again.

        Raises:
            ExperimentError: a change does not fit the schema or the other fields.
        """
        return _validated({**dict(self), **changes}, self.name)

    def to_yaml(self) -> str:
        """Returns the resolved experiment as a file that reads back equal."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load(path: str | Path) -> Experiment:
    """Reads an experiment file.

    Raises:
        ExperimentError: the file cannot be read, is not YAML, or does not fit the schema.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ExperimentError(str(path), [f"cannot be read: {error.strerror or error}"]) from error
    except UnicodeDecodeError as error:
        raise ExperimentError(str(path), [f"is not UTF-8 text: {error.reason} at byte {error.start}"]) from error
    return parse(text, str(path))


def parse(text: str, source: str = "experiment") -> Experiment:
    """Reads an experiment from YAML text; `source` names it in errors.

    Raises:
        ExperimentError: the text is not YAML or does not fit the schema.
    """
    try:
        document = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 0b and 0x_ look like numbers to YAML and are none
        where = getattr(error, "problem_mark", None)
        place = f" at line {where.line + 1}, column {where.column + 1}" if where is not None else ""
        what = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ExperimentError(source, [f"is not YAML: {what}{place}"]) from error
    if not isinstance(document, dict):
        kind = "empty" if document is None else f"a {type(document).__name__}"
        raise ExperimentError(source, [f"is {kind}; expected the keys {', '.join(Experiment.model_fields)}"])
    return _validated(cast("dict[Any, Any]", document), source)


class _Loader(yaml.SafeLoader):
    """Reads YAML safely, takes 1e-3 for a number and a date for text, and refuses a key given twice."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        # Here, as later the keys of a merge (<<) stand among a mapping's own, which may well repeat them.
        node: Any = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(None, None, f"key {key.value!r} is given twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(  # YAML 1.1 wants a dot in a number with an exponent; nobody expects that
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _merge(base: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        inner = merged.get(key)
        merged[key] = (
            _merge(cast("dict[str, Any]", inner), value)
            if isinstance(inner, dict) and isinstance(value, dict)
            else value
        )
    return merged


def _validated(document: dict[Any, Any], source: str) -> Experiment:
    try:
        return Experiment.model_validate(document)
    except ValidationError as error:
        raise ExperimentError(source, lines(error, Experiment)) from error
