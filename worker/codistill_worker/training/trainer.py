"""One student's training step, in two halves around the exchange.

:meth:`Trainer.begin` runs the forward pass and returns what the student publishes; :meth:`Trainer.finish` takes the
targets, runs the backward pass and moves the weights. Between the two the outputs travel: over gRPC where the student
has a process of its own, within the process where it has not. What a step computes depends on the experiment, the
student's name, the round and the weights, and on nothing else: no generator's state, no clock.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from codistill.config.experiment import Experiment
from codistill.config.plans import StudentPlan
from codistill.config.training import Optimizer, Schedule
from codistill.peer.draws import derive
from codistill.peer.errors import PeerError
from codistill.peer.order import Order
from codistill.process.exit_codes import ExitCode
from codistill_worker import methods, models
from codistill_worker.data import Dataset, Split, augmentation
from codistill_worker.randomness import seed_forward
from codistill_worker.training import weights
from codistill_worker.training.evaluation import (
    Score,
    autocast,
    evaluate,
    image_shape,
    output_shapes,
    placed,
    set_threads,
    teacher_shapes,
    to_cpu,
    view_of,
)

__all__ = ["Outputs", "Published", "StepLoss", "Trainer", "learning_rate"]


@dataclass(frozen=True)
class Outputs:
    """What is published for some samples, on the CPU.

    Attributes:
        ids: the samples' positions in the training set, [B], int64.
        labels: their classes, [B], int64.
        arrays: the named outputs, each [B, ...], float32; none of a student that only learns.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    arrays: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Published:
    """What a student publishes in a round: its batch, and in some rounds the held-out samples."""

    round: int
    batch: Outputs
    held_out: Outputs | None = None


@dataclass(frozen=True)
class StepLoss:
    """What a step came to, as scalars on the student's device, so that reading them is the caller's choice.

    Attributes:
        correct: samples of the batch that the student classified correctly.
        samples: samples in the batch.
        cross_entropy: mean over the batch, in nats.
        distillation: the method's weighted term; None where there is none.
    """

    correct: torch.Tensor
    samples: int
    cross_entropy: torch.Tensor
    distillation: torch.Tensor | None


@dataclass(frozen=True)
class _Prepared:
    """A round's batch, ready on the device."""

    round: int
    ids: torch.Tensor
    labels: torch.Tensor
    images: torch.Tensor


@dataclass(frozen=True)
class _Begun:
    """A round between its two halves."""

    labels: torch.Tensor
    outputs: Mapping[str, torch.Tensor]
    buffers: list[torch.Tensor]


class Trainer:
    """One student: its model, its optimiser, and the round it is at.

    Args:
        experiment: the run's experiment.
        plan: the student's settings.
        dataset: the run's data, on `device`.
        device: where the student is trained.

    Attributes:
        round: the next round to train; the rounds before it are in the weights.
        model: the student.
        extra: what the method trains besides it; empty for most methods.
        shapes: of what the student publishes, without the samples, by name.

    Raises:
        ConfigurationError: the model cannot be built for this data, or has no layer that the method names.
    """

    def __init__(self, experiment: Experiment, plan: StudentPlan, dataset: Dataset, device: torch.device) -> None:
        training = plan.training
        self.student = plan.student.name
        self.device = device
        self.round = 0
        self._seed = experiment.seed
        self._plan = plan
        self._dataset = dataset
        self._order = Order(experiment.seed, len(dataset.train), training.batch_size)
        self._exchange_schedule = plan.distillation.exchange_schedule(self._order.rounds_per_epoch)
        self._view = view_of(experiment, self.student)
        shape = image_shape(dataset)
        model = models.build(
            plan.student.model,
            **shape,
            args=plan.student.model_args,
            seed=derive(experiment.seed, "init", self.student),
        )
        self.model: nn.Module = placed(model, device, training)
        teachers = partial(teacher_shapes, experiment, shape)
        seed = derive(experiment.seed, "objective", self.student)
        subject = methods.StudentContext(self.student, self.model, shape, teachers, seed)
        self._half = methods.create(plan.distillation, subject)
        self.extra: nn.Module = self._half.extra.to(device)
        self.shapes = {
            name: dims
            for name, dims in output_shapes(self._half.network, shape, device).items()
            if name in self._half.publishes
        }
        self._trained = nn.ModuleList([self.model, self.extra])
        self._optimizer = _optimizer(self._trained, training.optimizer)
        # By owner and name, as a module may put a new tensor in the place of its buffer.
        self._buffers = [
            (module, name) for module in self._trained.modules() for name, _ in module.named_buffers(recurse=False)
        ]
        self._batches: Iterator[torch.Tensor] = iter(())
        self._streaming_from = -1
        self._prepared: _Prepared | None = None
        self._begun: _Begun | None = None

    @property
    def rounds_per_epoch(self) -> int:
        """How many rounds an epoch has."""
        return self._order.rounds_per_epoch

    @property
    def total_rounds(self) -> int:
        """After how many rounds the student is trained."""
        return self._plan.training.epochs * self.rounds_per_epoch

    @property
    def exchanges(self) -> bool:
        """Whether the next round exchanges anything."""
        return self._plan.distillation.exchanges and self._exchange_schedule.exchanges(self.round)

    @property
    def parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def prepare(self) -> None:
        """Readies the batch of the round after the one that is begun, while its targets are on their way."""
        upcoming = self.round if self._begun is None else self.round + 1
        if upcoming < self.total_rounds and (self._prepared is None or self._prepared.round != upcoming):
            self._prepared = self._prepare(upcoming)

    def begin(self) -> Published | None:
        """Runs the forward pass of the next round; returns what to publish, or None if the round exchanges nothing.

        Raises:
            PeerError: the outputs are not finite any more.
        """
        if self._begun is not None:
            raise RuntimeError(f"round {self.round} is begun already; finish or abandon it")
        self._set_threads()
        prepared = self._prepared
        if prepared is None or prepared.round != self.round:
            prepared = self._prepare(self.round)
        self._prepared = None
        held_out = self._held_out() if self._measures_held_out() else None
        # Batch statistics move in the forward pass; should the round be abandoned, they must not have.
        buffers: list[torch.Tensor] = [getattr(module, name).detach().clone() for module, name in self._buffers]
        self.model.train()
        self._half.network.train()
        seed_forward(self._seed, self.student, self.round)
        outputs = self._outputs(prepared.images)
        self._begun = _Begun(prepared.labels, outputs, buffers)
        if not self.exchanges:
            return None
        labels = self._dataset.train.labels[prepared.ids]
        return Published(self.round, Outputs(prepared.ids, labels, self._published(outputs)), held_out)

    def finish(self, targets: Mapping[str, torch.Tensor]) -> StepLoss:
        """Runs the backward pass of the round that was begun and moves the weights.

        Args:
            targets: the method's named arrays, on the CPU; empty where nothing is exchanged, and for a round that
                closed without targets.
        """
        begun = self._begun
        if begun is None:
            raise RuntimeError("no round is begun")
        self._set_threads()
        on_device = {name: value.to(self.device, non_blocking=True) for name, value in targets.items()}
        epoch = self.round / self.rounds_per_epoch
        step = methods.Step(begun.outputs, begun.labels, on_device, epoch, self._plan.training.epochs)
        alone = self._plan.distillation.exchanges and not on_device
        loss = methods.labels_alone(step) if alone else self._half.loss(step)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self._optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        if self._plan.training.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._trained.parameters(), self._plan.training.clip_norm)
        self._optimizer.step()
        self._begun = None
        self.round += 1
        correct = (begun.outputs["logits"].detach().argmax(-1) == begun.labels).sum()
        return StepLoss(correct, len(begun.labels), loss.cross_entropy, loss.distillation)

    def abandon(self) -> None:
        """Undoes what :meth:`begin` did, so that the round can be begun again, by this process or another."""
        if self._begun is None:
            return
        with torch.no_grad():
            for (module, name), before in zip(self._buffers, self._begun.buffers, strict=True):
                getattr(module, name).copy_(before)
        self._begun = None

    def evaluate(self, split: Split, on_batch: Callable[[], None] = lambda: None) -> Score:
        """Measures the student on a split, without augmentation.

        Args:
            split: the samples.
            on_batch: called before each batch.

        Raises:
            PeerError: the loss is not finite any more.
        """
        self._set_threads()
        score = evaluate(self.model, self._dataset, split, self._plan.training, self.device, on_batch)
        if not math.isfinite(score.loss):
            raise diverged(self.student, self.round, f"its loss is {score.loss}")
        return score

    def optimizer_state(self) -> Mapping[str, Any]:
        """Returns the optimiser's state dict."""
        return self._optimizer.state_dict()

    def restore(
        self,
        round_number: int,
        model: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, Any],
        extra: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        """Goes to where a checkpoint was taken; what is given stays as it is.

        Raises:
            RuntimeError, ValueError, KeyError: it is of another model or optimiser.
        """
        self.abandon()
        weights.load(self.model, model)
        self.extra.load_state_dict(dict(extra))
        # A copy, as the optimiser would go on working in the very tensors that it is given.
        self._optimizer.load_state_dict(copy.deepcopy(dict(optimizer)))
        self.round = round_number

    def _prepare(self, number: int) -> _Prepared:
        if self._streaming_from != number:
            self._batches = self._dataset.train.stream(
                self._order.samples(each) for each in range(number, self.total_rounds)
            )
        images = next(self._batches)
        self._streaming_from = number + 1
        ids = self._order.samples(number)
        seed = derive(self._seed, "augment", self._view, number)
        images = augmentation.augment(images, ids, self._plan.data.augment, seed)
        labels = self._dataset.train.labels[ids].to(self.device, non_blocking=True)
        return _Prepared(number, ids, labels, self._normalised(images))

    def _normalised(self, images: torch.Tensor) -> torch.Tensor:
        return augmentation.normalise(
            images,
            self._dataset.mean,
            self._dataset.std,
            dtype=torch.float32,
            channels_last=self._plan.training.channels_last,
        )

    def _outputs(self, images: torch.Tensor) -> Mapping[str, torch.Tensor]:
        with autocast(self.device, self._plan.training):
            return {name: value.float() for name, value in self._half.network(images).items()}

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        with autocast(self.device, self._plan.training):
            return self.model(images).float()

    def _measures_held_out(self) -> bool:
        return self._half.measures_held_out and self.round > 0 and self.round % self.rounds_per_epoch == 0

    def _held_out(self) -> Outputs:
        split = self._dataset.held_out
        if split is None:
            raise RuntimeError("the experiment holds no samples out")
        self.model.eval()
        self._half.network.eval()
        ids = torch.arange(len(split))
        batches = ids.split(self._plan.training.evaluation_batch_size)
        with torch.inference_mode():
            parts = [self._outputs(self._normalised(images)) for images in split.stream(iter(batches))]
        whole = {name: torch.cat([part[name] for part in parts]) for name in self._half.publishes}
        return Outputs(ids, split.labels, self._published(whole))

    def _published(self, outputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Brings outputs to the CPU, and refuses those that nobody could learn from."""
        arrays = to_cpu({name: outputs[name] for name in self._half.publishes}, self.device)
        for name, value in arrays.items():
            if not bool(torch.isfinite(value).all()):
                raise diverged(self.student, self.round, f"its {name} are not finite")
        return arrays

    def _learning_rate(self) -> float:
        training = self._plan.training
        return learning_rate(
            training.optimizer.lr, training.schedule, self.round, self.rounds_per_epoch, training.epochs
        )

    def _set_threads(self) -> None:
        set_threads(self._plan.training)


def diverged(student: str, number: int, what: str) -> PeerError:
    """Returns the error of a student that nothing more can be learnt from."""
    return PeerError(
        f"student {student!r} has diverged in round {number}: {what}; lower training.optimizer.lr, or set "
        "training.clip_norm",
        ExitCode.DIVERGED,
    )


def learning_rate(peak: float, schedule: Schedule, number: int, rounds_per_epoch: int, epochs: int) -> float:
    """Returns the learning rate of a round, a pure function of its number.

    Args:
        peak: the highest rate.
        schedule: the rate's course.
        number: the round.
        rounds_per_epoch: rounds in an epoch.
        epochs: epochs in the run.
    """
    warmup = schedule.warmup_epochs * rounds_per_epoch
    if number < warmup:
        return peak * (number + 1) / (warmup + 1)
    if schedule.name == "cosine":
        share = (number - warmup) / max(epochs * rounds_per_epoch - warmup, 1)
        return schedule.min_lr + (peak - schedule.min_lr) * 0.5 * (1 + math.cos(math.pi * share))
    if schedule.name == "steps":
        return peak * schedule.gamma ** sum(number >= milestone * rounds_per_epoch for milestone in schedule.milestones)
    return peak


def _optimizer(trained: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if not settings.decay_norm_and_bias:  # biases and normalisation weights are the ones of one dimension or none
        groups = [
            {"params": [parameter for parameter in parameters if parameter.ndim > 1]},
            {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        return torch.optim.SGD(
            groups,
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.weight_decay,
        )
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
