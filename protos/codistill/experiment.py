"""The experiment file: its schema and its reading.

An experiment is a YAML file that is read into :class:`Experiment`. Unknown keys are refused, every error names the
path, the value and what is allowed. Everything that decides a run's numbers is in it, so two processes whose
:func:`codistill.identity.identity` agree compute the same thing; fields marked *operational* (a device, a time-out) may differ between
them and are left out of the identity.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from codistill.complaints import DEVICE, NAME, InconsistentError, lines
from codistill.distillation import BornAgain, CrossArchitecture, Distillation, DistillationOverrides, Dml, Kdcl
from codistill.sections import OPERATIONAL, REFERENCE, Section, plain_values

__all__ = [
    "DATASETS",
    "KEEPALIVE_ANSWER",
    "Augment",
    "Data",
    "Exchange",
    "Experiment",
    "ExperimentError",
    "Journal",
    "Normalize",
    "Optimizer",
    "Schedule",
    "Student",
    "StudentPlan",
    "Teacher",
    "TeacherPlan",
    "Training",
    "load",
    "parse",
]

KEEPALIVE_ANSWER = 10.0
"""Seconds that a peer has to answer a keepalive ping before its link is cut."""


class ExperimentError(ValueError):
    """An experiment that cannot be used; `problems` holds one line for each thing wrong."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))


class DatasetInfo(BaseModel):
    """What is known of a built-in data set without loading it."""

    model_config = ConfigDict(frozen=True)

    classes: int | None
    channels: int | None
    size: int | None
    about: str
    train: int | None = None
    test: int | None = None
    divided: bool = False
    """Whether train and test are drawn from one pool, so that more of one is less of the other."""


DATASETS: Mapping[str, DatasetInfo] = {
    "digits": DatasetInfo(
        classes=10,
        channels=1,
        size=8,
        train=1_347,
        test=450,
        divided=True,
        about="scikit-learn's 1,797 handwritten digits; no download",
    ),
    "mnist": DatasetInfo(classes=10, channels=1, size=28, train=60_000, test=10_000, about="torchvision's MNIST"),
    "fashion_mnist": DatasetInfo(
        classes=10, channels=1, size=28, train=60_000, test=10_000, about="torchvision's Fashion-MNIST"
    ),
    "cifar10": DatasetInfo(classes=10, channels=3, size=32, train=50_000, test=10_000, about="torchvision's CIFAR-10"),
    "cifar100": DatasetInfo(
        classes=100, channels=3, size=32, train=50_000, test=10_000, about="torchvision's CIFAR-100"
    ),
    "imagenet": DatasetInfo(
        classes=1000,
        channels=3,
        size=None,
        train=1_281_167,
        test=50_000,
        about="torchvision's ImageNet; needs `image_size`",
    ),
    "image_folder": DatasetInfo(
        classes=None,
        channels=3,
        size=None,
        about="`root`/train/CLASS/* and `root`/test/CLASS/* (or val); needs `classes` and `image_size`",
    ),
}


class Augment(Section):
    """How training images are varied."""

    crop_padding: int = Field(
        default=0,
        ge=0,
        le=16,
        description="Pixels of zero padding around an image before a random crop of its own size; 0 for none.",
    )
    flip: bool = Field(default=False, description="Mirror an image left to right with probability ½.")
    view: Literal["auto", "own", "shared"] = Field(
        default="auto",
        description="`own`: every student draws its own crop and flip of the same sample; `shared`: all see the same; `auto`: `shared` where a teacher teaches, `own` elsewhere.",
    )


class Normalize(Section):
    """Channel statistics, of pixel values scaled to 0..1."""

    mean: tuple[float, ...] = Field(description="Mean of each channel.", min_length=1, strict=False)
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        description="Standard deviation of each channel.", min_length=1, strict=False
    )

    @model_validator(mode="after")
    def _same_length(self) -> Normalize:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels, std has {len(self.std)}; give as many of each")
        return self


class Data(Section):
    """What the students learn."""

    dataset: str = Field(
        description="One of `"
        + "`, `".join(DATASETS)
        + "`, or `package.module:callable`, which every process calls and which must return the same in each: seed whatever it draws."
    )
    root: str = Field(
        default="data",
        description="Folder that holds the data set's files; not used by `digits`.",
        json_schema_extra=OPERATIONAL,
    )
    download: bool = Field(
        default=False,
        description="Let torchvision download the data set into `root` if it is not there.",
        json_schema_extra=OPERATIONAL,
    )
    classes: int | None = Field(
        default=None,
        ge=2,
        le=1_000_000,
        description="Number of classes; known for the built-in sets, needed for the others.",
    )
    image_size: int | None = Field(
        default=None, ge=4, le=1024, description="Height and width that images of files are resized and cropped to."
    )
    train_size: int | None = Field(
        default=None,
        ge=1,
        description="Train on this many samples, drawn by `split_seed`; all by default. `digits` has no test split of its own: it trains on 1,347 by default and tests on the rest.",
    )
    test_size: int | None = Field(
        default=None, ge=1, description="Test on this many samples, drawn by `split_seed`; all by default."
    )
    held_out: int = Field(
        default=0,
        ge=0,
        description="Training samples set aside, on which `kdcl` with the `general` ensemble measures its weights once an epoch.",
    )
    split_seed: int = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="Seed of `train_size`, `test_size` and `held_out`; apart from `seed`, so that runs with other seeds use the same split.",
    )
    augment: Augment = Field(default_factory=Augment, description="How training images are varied.")
    normalize: Normalize | None = Field(
        default=None,
        description="Channel statistics; measured on the training samples by default (ImageNet's for `imagenet`).",
    )
    memory_limit_gib: float = Field(
        default=4.0,
        gt=0,
        description="Decoded images up to this size are kept on the device as uint8; a larger set streams from disk.",
        json_schema_extra=OPERATIONAL,
    )
    loader_workers: int = Field(
        default=2,
        ge=0,
        le=256,
        description="Threads that decode images where the set streams from disk.",
        json_schema_extra=OPERATIONAL,
    )

    @field_validator("dataset")
    @classmethod
    def _known(cls, value: str) -> str:
        return _name_or_reference(value, DATASETS, "data set")

    @model_validator(mode="after")
    def _complete(self) -> Data:
        known = DATASETS.get(self.dataset)
        if known is not None and known.classes is not None and self.classes not in (None, known.classes):
            raise ValueError(f"classes: {self.classes}, but {self.dataset} has {known.classes}; leave it out")
        if (known is None or known.classes is None) and self.classes is None:
            raise ValueError(f"dataset {self.dataset} needs `classes`, its number of classes")
        if known is not None and known.size is None and self.image_size is None:
            raise ValueError(f"dataset {self.dataset} needs `image_size`, the height and width to resize images to")
        return self

    @property
    def class_count(self) -> int:
        """The number of classes, given or known."""
        known = DATASETS.get(self.dataset)
        count = self.classes or (known.classes if known else None)
        assert count is not None  # noqa: S101 - _complete saw to it
        return count


class Optimizer(Section):
    """The student's optimiser, one of torch.optim's."""

    name: Literal["sgd", "adamw"] = Field(default="sgd", description="`sgd` or `adamw`.")
    lr: float = Field(default=0.1, gt=0, description="Peak learning rate.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of `sgd`; not used by `adamw`.")
    nesterov: bool = Field(default=False, description="Nesterov momentum of `sgd`.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="Decay rates of `adamw`'s moments.", strict=False
    )
    weight_decay: float = Field(default=5e-4, ge=0, description="Weight decay.")
    decay_norm_and_bias: bool = Field(default=True, description="Decay biases and normalisation weights too.")

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Optimizer:
        if self.name == "sgd" and self.nesterov and not self.momentum:
            raise InconsistentError(["nesterov: true, but momentum is 0; leave it out, or set momentum above 0"])
        return self


class Schedule(Section):
    """How the learning rate moves, per round."""

    name: Literal["constant", "cosine", "steps"] = Field(
        default="cosine", description="`constant`; `cosine` down to `min_lr`; `steps`: times `gamma` at each milestone."
    )
    warmup_epochs: float = Field(default=0.0, ge=0, description="Epochs of linear rise from 0 to the peak.")
    min_lr: float = Field(default=0.0, ge=0, description="Where `cosine` ends.")
    milestones: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(), description="Epochs at which `steps` lowers the rate.", strict=False
    )
    gamma: float = Field(default=0.1, gt=0, le=1, description="What `steps` multiplies the rate by.")

    @model_validator(mode="after")
    def _steps_have_milestones(self) -> Schedule:
        if self.name == "steps" and not self.milestones:
            raise ValueError("schedule `steps` needs `milestones`, the epochs at which it lowers the rate")
        return self


class Training(Section):
    """How a student learns."""

    epochs: int = Field(ge=1, le=1_000_000, description="Passes over the training samples.")
    batch_size: int = Field(
        default=64,
        ge=1,
        le=1_000_000,
        description="Samples of a round; the same for every student. What is left of an epoch is dropped.",
    )
    optimizer: Optimizer = Field(default_factory=Optimizer, description="The optimiser.")
    schedule: Schedule = Field(default_factory=Schedule, description="The learning rate's course.")
    clip_norm: float | None = Field(
        default=None, gt=0, description="Scale gradients down to this norm; off by default."
    )
    device: str = Field(
        default="auto",
        pattern=DEVICE,
        description="`auto` (a GPU where there is one, spread over the students), `cpu`, `cuda` or `cuda:N`.",
        json_schema_extra=OPERATIONAL,
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="`bfloat16` runs the forward pass under autocast."
    )
    channels_last: bool = Field(
        default=False, description="Keep images and weights in channels-last memory order: faster on recent GPUs."
    )
    threads: int = Field(
        default=1,
        ge=1,
        le=256,
        description="CPU threads of each worker. Part of the experiment, as another number gives other bits.",
    )
    evaluate_every: int = Field(
        default=1,
        ge=1,
        description="Epochs between two evaluations on the test split; the last epoch is always evaluated.",
    )
    evaluation_batch_size: int = Field(default=500, ge=1, description="Samples of one forward pass of an evaluation.")
    checkpoint_every: float = Field(
        default=30.0,
        ge=0,
        description="Seconds between two checkpoints; 0 for one after every round. The last round is always saved.",
        json_schema_extra=OPERATIONAL,
    )
    hang_after: float = Field(
        default=600.0,
        gt=0,
        description="Seconds after which a forward or backward pass, a batch of an evaluation, or the writing of a checkpoint counts as hung and the process is ended; the same for a turn of the server's event loop. Also seconds without any sign of life after which a process counts as hung to the command that started it, and is killed and started again.",
        json_schema_extra=OPERATIONAL,
    )

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Training:
        if self.schedule.warmup_epochs >= self.epochs:
            raise InconsistentError(
                [
                    (
                        f"schedule.warmup_epochs: {self.schedule.warmup_epochs:g} is not allowed; allowed is less than the "
                        f"{self.epochs} of training.epochs, or the rate never gets to its peak"
                    )
                ]
            )
        return self


class Journal(Section):
    """The closed rounds on the server's disk."""

    durability: Literal["process", "power"] = Field(
        default="process",
        description="`process`: a closed round survives the death of every process; `power`: of the machine too, at the cost of a sync per round.",
    )
    keep: Literal["needed", "all"] = Field(
        default="needed",
        description="`needed`: rounds back to the oldest that a student's checkpoint still needs; `all`: every round, so that students added at the end of `students` later learn the whole run from the journal.",
    )


class Exchange(Section):
    """How workers and server speak."""

    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32",
        description="Element type of logits and targets on the wire. `float16` halves the traffic and moves a target's probabilities by less than 1e-3 while logits are within ±8.",
    )
    connect_timeout: float = Field(
        default=30.0,
        gt=0,
        description="Seconds that a worker tries to reach a server that it has never reached.",
        json_schema_extra=OPERATIONAL,
    )
    give_up_after: float = Field(
        default=600.0,
        gt=0,
        description="Seconds that a worker waits for one round's targets, or for a server that went away, before it ends.",
        json_schema_extra=OPERATIONAL,
    )
    on_absence: Literal["wait", "proceed"] = Field(
        default="wait",
        description="`wait`: a round waits for every student, and a run in which processes died ends with the same bits; `proceed`: it closes at its deadline without those that are away, and they catch up from the journal.",
        json_schema_extra=OPERATIONAL,
    )
    quorum: int = Field(
        default=2,
        ge=2,
        description="With `proceed`: contributions that a round needs to be given targets; below it the students learn from the labels alone for that round.",
        json_schema_extra=OPERATIONAL,
    )
    round_deadline: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        default="auto",
        description="With `proceed`: seconds from a round's first contribution until it goes on without the absent; `auto` is median + 10·MAD of the recent rounds' lags, from 2 s up to `evict_after`.",
        json_schema_extra=OPERATIONAL,
    )
    evict_after: float = Field(
        default=30.0,
        gt=0,
        description="With `proceed`: seconds of silence after which an absent student's session is ended, and for which a student that has not joined yet is waited for.",
        json_schema_extra=OPERATIONAL,
    )
    keepalive: float = Field(
        default=30.0,
        ge=5,
        le=240,
        description="Seconds between the pings that find a peer which vanished without a word; it has 10 s to answer.",
        json_schema_extra=OPERATIONAL,
    )
    waiting_notice: float = Field(
        default=5.0,
        gt=0,
        description="Seconds between the server's notices to those who wait.",
        json_schema_extra=OPERATIONAL,
    )
    journal: Journal = Field(
        default_factory=Journal, description="The closed rounds on the server's disk.", json_schema_extra=OPERATIONAL
    )

    @model_validator(mode="after")
    def _nested(self) -> Exchange:
        """Checks that the shorter waits end before the longer ones, so that each can do its part."""
        waits = [("waiting_notice", self.waiting_notice), ("give_up_after", self.give_up_after)]
        if self.on_absence == "proceed":
            waits = [
                *([("round_deadline", self.round_deadline)] if self.round_deadline != "auto" else []),
                ("evict_after", self.evict_after),
                (f"keepalive + {KEEPALIVE_ANSWER:g}", self.keepalive + KEEPALIVE_ANSWER),
                ("give_up_after", self.give_up_after),
            ]
        for (name, shorter), (longer_name, longer) in pairwise(waits):
            if shorter >= longer:
                raise ValueError(f"{name}: {shorter} s must be shorter than {longer_name}: {longer} s")
        return self


class TrainingOverrides(Section):
    """What of `training` one student may have of its own."""

    optimizer: dict[str, Any] = Field(default_factory=dict, description="Keys of `training.optimizer`.")
    schedule: dict[str, Any] = Field(default_factory=dict, description="Keys of `training.schedule`.")
    clip_norm: float | None = Field(default=None, gt=0, description="As in `training`.")
    device: str | None = Field(
        default=None,
        pattern=DEVICE,
        description="As in `training`.",
        json_schema_extra=OPERATIONAL,
    )
    precision: Literal["float32", "bfloat16"] | None = Field(default=None, description="As in `training`.")
    channels_last: bool | None = Field(default=None, description="As in `training`.")
    threads: int | None = Field(default=None, ge=1, le=256, description="As in `training`.")


class DataOverrides(Section):
    """What of `data` one student may have of its own."""

    augment: dict[str, Any] = Field(default_factory=dict, description="Keys of `data.augment`.")


class Student(Section):
    """One student: a model, and whatever it does differently from the others."""

    name: str = Field(
        pattern=NAME,
        description="Letters, digits, `_`, `.` and `-`; names its folder and its metrics.",
    )
    model: str = Field(description="A built-in name, `torchvision:NAME`, `timm:NAME` or `package.module:callable`.")
    model_args: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the model: text, finite numbers, lists, maps."
    )
    training: TrainingOverrides = Field(
        default_factory=TrainingOverrides, description="What this student trains differently."
    )
    data: DataOverrides = Field(default_factory=DataOverrides, description="What this student sees differently.")
    distillation: DistillationOverrides = Field(
        default_factory=DistillationOverrides, description="What this student distils differently."
    )

    @field_validator("model_args")
    @classmethod
    def _representable(cls, value: dict[str, Any]) -> dict[str, Any]:
        return plain_values(value)


class TeacherTraining(Section):
    """What of `training` a teacher has of its own: how it is run, as it learns nothing."""

    device: str | None = Field(
        default=None, pattern=DEVICE, description="As in `training`.", json_schema_extra=OPERATIONAL
    )
    precision: Literal["float32", "bfloat16"] | None = Field(default=None, description="As in `training`.")
    channels_last: bool | None = Field(default=None, description="As in `training`.")
    threads: int | None = Field(default=None, ge=1, le=256, description="As in `training`.")


class Teacher(Section):
    """One teacher: a model with weights that never change."""

    name: str = Field(
        pattern=NAME,
        description="Letters, digits, `_`, `.` and `-`; names its folder and its metrics, so no student may have it.",
    )
    model: str = Field(description="As a student's.")
    model_args: dict[str, Any] = Field(default_factory=dict, description="As a student's.")
    weights: str = Field(
        description="A run's folder or one of its checkpoints, or a file of plain weights: `.safetensors`, or a state dict as `torch.save` writes it.",
        json_schema_extra=OPERATIONAL,
    )
    training: TeacherTraining = Field(default_factory=TeacherTraining, description="How it is run.")

    @field_validator("model_args")
    @classmethod
    def _representable(cls, value: dict[str, Any]) -> dict[str, Any]:
        return plain_values(value)


class TeacherPlan(Section):
    """One teacher's settings with every override applied; see :meth:`Experiment.teacher_plan`."""

    teacher: Teacher
    data: Data
    training: Training
    distillation: Distillation


class StudentPlan(Section):
    """One student's settings with every override applied; see :meth:`Experiment.plan`."""

    student: Student
    data: Data
    training: Training
    distillation: Distillation


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
        if isinstance(self.distillation, Kdcl) and self.distillation.ensemble == "general" and not self.data.held_out:
            yield "data.held_out: 0, but the `general` ensemble measures its weights on held-out samples; set it, for example to 1000"
        yield from self._data_problems()
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


_T = TypeVar("_T")


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


def _name_or_reference(value: str, known: Mapping[str, _T], what: str) -> str:
    if value in known or REFERENCE.fullmatch(value):
        return value
    close = difflib.get_close_matches(value, known, 1)
    hint = f"did you mean {close[0]!r}? Allowed" if close else "allowed"
    raise ValueError(f"unknown {what}; {hint}: {', '.join(known)}, or package.module:callable")


def _validated(document: dict[Any, Any], source: str) -> Experiment:
    try:
        return Experiment.model_validate(document)
    except ValidationError as error:
        raise ExperimentError(source, lines(error, Experiment)) from error
