"""The experiment file's `students` and `teachers`, and the settings that each may override."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from pydantic import Field, field_validator

from codistill.config.base import OPERATIONAL, Section, require_json_values, require_whole_path
from codistill.config.errors import DEVICE_PATTERN, NAME_PATTERN, NOT_EMPTY

__all__ = ["DistillationOverrides", "Student", "Teacher"]


class TrainingOverrides(Section):
    """The keys of `training` that one student may override."""

    optimizer: dict[str, Any] = Field(default_factory=dict, description="Keys of `training.optimizer`.")
    schedule: dict[str, Any] = Field(default_factory=dict, description="Keys of `training.schedule`.")
    clip_norm: float | None = Field(default=None, gt=0, description="As in `training`.")
    device: str | None = Field(
        default=None,
        pattern=DEVICE_PATTERN,
        description="As in `training`.",
        json_schema_extra=OPERATIONAL,
    )
    precision: Literal["float32", "bfloat16"] | None = Field(default=None, description="As in `training`.")
    channels_last: bool | None = Field(default=None, description="As in `training`.")
    threads: int | None = Field(default=None, ge=1, le=256, description="As in `training`.")


class DataOverrides(Section):
    """The keys of `data` that one student may override."""

    augment: dict[str, Any] = Field(default_factory=dict, description="Keys of `data.augment`.")


class DistillationOverrides(Section):
    """The keys of `distillation` that one student may override, where the method has them."""

    weight: float | None = Field(default=None, ge=0, description="Weight of the method's term.")
    temperature: float | None = Field(default=None, gt=0, description="T of the softmax of this student's term.")

    def given(self) -> dict[str, float]:
        """Return the settings that have a value, by name."""
        return self.model_dump(exclude_none=True)

    def only(self, names: Collection[str]) -> DistillationOverrides:
        """Return the settings of these names alone; equal to this where no other has a value."""
        if self.given().keys() <= set(names):
            return self
        return DistillationOverrides(**{name: value for name, value in self.given().items() if name in names})


class Student(Section):
    """One student: a model, and the settings in which it differs from the others."""

    name: str = Field(
        pattern=NAME_PATTERN,
        description="Letters, digits, `_`, `.` and `-`; names its folder and its metrics.",
    )
    model: str = Field(
        pattern=NOT_EMPTY, description="A built-in name, `torchvision:NAME`, `timm:NAME` or `package.module:callable`."
    )
    model_args: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the model: text, finite numbers, lists, maps."
    )
    training: TrainingOverrides = Field(
        default_factory=TrainingOverrides, description="Overrides of `training` for this student."
    )
    data: DataOverrides = Field(default_factory=DataOverrides, description="Overrides of `data` for this student.")
    distillation: DistillationOverrides = Field(
        default_factory=DistillationOverrides, description="Overrides of `distillation` for this student."
    )

    @field_validator("model_args")
    @classmethod
    def _representable(cls, value: dict[str, Any]) -> dict[str, Any]:
        return require_json_values(value)


class TeacherTraining(Section):
    """The keys of `training` that a teacher may override. They say how it is run, because it learns nothing."""

    device: str | None = Field(
        default=None, pattern=DEVICE_PATTERN, description="As in `training`.", json_schema_extra=OPERATIONAL
    )
    precision: Literal["float32", "bfloat16"] | None = Field(default=None, description="As in `training`.")
    channels_last: bool | None = Field(default=None, description="As in `training`.")
    threads: int | None = Field(default=None, ge=1, le=256, description="As in `training`.")


class Teacher(Section):
    """One teacher: a model with weights that never change."""

    name: str = Field(
        pattern=NAME_PATTERN,
        description="Letters, digits, `_`, `.` and `-`; names its folder and its metrics, so no student may have the same name.",
    )
    model: str = Field(pattern=NOT_EMPTY, description="As a student's.")
    model_args: dict[str, Any] = Field(default_factory=dict, description="As a student's.")
    weights: str = Field(
        pattern=NOT_EMPTY,
        description="A run's folder or one of its checkpoints, or a file of plain weights: `.safetensors`, or a state dict as `torch.save` writes it.",
        json_schema_extra=OPERATIONAL,
    )
    training: TeacherTraining = Field(default_factory=TeacherTraining, description="How it is run.")

    _whole = field_validator("weights")(require_whole_path)

    @field_validator("model_args")
    @classmethod
    def _representable(cls, value: dict[str, Any]) -> dict[str, Any]:
        return require_json_values(value)
