"""The experiment file's `training` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from codistill.config.base import OPERATIONAL, Section
from codistill.config.errors import DEVICE_PATTERN, SectionError

__all__ = ["Optimizer", "Schedule", "Training"]


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
            raise SectionError(["nesterov: true, but momentum is 0; leave it out, or set momentum above 0"])
        return self


class Schedule(Section):
    """How the learning rate changes from round to round."""

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
        description="Samples of a round; the same for every student. An incomplete batch at the end of an epoch is dropped.",
    )
    optimizer: Optimizer = Field(default_factory=Optimizer, description="The optimiser.")
    schedule: Schedule = Field(default_factory=Schedule, description="How the learning rate changes.")
    clip_norm: float | None = Field(
        default=None, gt=0, description="Scale gradients down to this norm; off by default."
    )
    device: str = Field(
        default="auto",
        pattern=DEVICE_PATTERN,
        description="`auto`, `cpu`, `cuda` or `cuda:N`. `auto` is a GPU if there is one, and must be if one was granted; students are spread over the GPUs.",
        json_schema_extra=OPERATIONAL,
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="`bfloat16` runs the forward pass under autocast."
    )
    channels_last: bool = Field(
        default=False, description="Keep images and weights in channels-last memory order: faster on recent GPUs."
    )
    tf32: bool = Field(
        default=False,
        description="Let a GPU round the factors of float32 products and convolutions to TF32, 10 bits of mantissa instead of 23. That is faster, and moves results by about 1e-3 from a CPU's. Off, CPU and GPU agree as closely as float32 can.",
    )
    threads: int = Field(
        default=1,
        ge=1,
        le=256,
        description="CPU threads of each worker. Part of the experiment, because another number gives other bits.",
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
        description="Seconds after which an activity counts as hung, and its process is ended. Such an activity is a forward or backward pass, a batch of an evaluation, or the writing of a checkpoint. A turn of the server's event loop is one too. A process without any heartbeat for this long also counts as hung. The command that started it then kills it and starts it again.",
        json_schema_extra=OPERATIONAL,
    )

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Training:
        if self.schedule.warmup_epochs >= self.epochs:
            raise SectionError(
                [
                    (
                        f"schedule.warmup_epochs: {self.schedule.warmup_epochs:g} is not allowed; allowed is less than the "
                        f"{self.epochs} of training.epochs, or the rate never gets to its peak"
                    )
                ]
            )
        return self
