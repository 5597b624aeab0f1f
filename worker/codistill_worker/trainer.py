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
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from codistill.exit_codes import ExitCode
from codistill.experiment import Experiment, Optimizer, Schedule, StudentPlan
from codistill_worker import augmentation, models, objectives
from codistill_worker.data import Dataset, Split
from codistill_worker.errors import WorkerError
from codistill_worker.randomness import Order, derive, seed_forward

__all__ = ["Outputs", "Published", "Score", "StepLoss", "Trainer", "learning_rate"]


@dataclass(frozen=True)
class Outputs:
    """A student's outputs for some samples, on the CPU.

    Attributes:
        ids: the samples' positions in the training set, [B], int64.
        labels: their classes, [B], int64.
        logits: [B, C], float32.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    logits: torch.Tensor


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
class Score:
    """How a student does on a split: share of correct samples, and mean cross-entropy in nats."""

    accuracy: float
    loss: float


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
    logits: torch.Tensor
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

    Raises:
        ConfigurationError: the model cannot be built for this data.
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
        self._half = objectives.create(plan.distillation)
        self._without_targets = objectives.labels_alone() if self._half.exchanges else self._half
        model = models.build(
            plan.student.model,
            classes=dataset.classes,
            channels=dataset.channels,
            size=dataset.height,
            args=plan.student.model_args,
            seed=derive(experiment.seed, "init", self.student),
        )
        memory = torch.channels_last if training.channels_last else torch.contiguous_format
        self.model: nn.Module = model.to(device, memory_format=memory)  # pyright: ignore[reportCallIssue]
        self._optimizer = _optimizer(self.model, training.optimizer)
        # By owner and name, as a module may put a new tensor in the place of its buffer.
        self._buffers = [
            (module, name) for module in self.model.modules() for name, _ in module.named_buffers(recurse=False)
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
        """Whether the method publishes anything."""
        return self._half.exchanges

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
        """Runs the forward pass of the next round; returns what to publish, or None if the method exchanges nothing.

        Raises:
            WorkerError: the logits are not finite any more.
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
        seed_forward(self._seed, self.student, self.round)
        logits = self._forward(prepared.images)
        self._begun = _Begun(prepared.labels, logits, buffers)
        if not self.exchanges:
            return None
        labels = self._dataset.train.labels[prepared.ids]
        return Published(self.round, Outputs(prepared.ids, labels, self._to_cpu(logits)), held_out)

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
        half = self._half if on_device else self._without_targets
        loss = half.loss(begun.logits, begun.labels, on_device)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self._optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        if self._plan.training.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._plan.training.clip_norm)
        self._optimizer.step()
        self._begun = None
        self.round += 1
        correct = (begun.logits.detach().argmax(-1) == begun.labels).sum()
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
            WorkerError: the loss is not finite any more.
        """
        self._set_threads()
        self.model.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        batches = torch.arange(len(split)).split(self._plan.training.evaluation_batch_size)
        with torch.inference_mode():
            on_batch()
            for ids, images in zip(batches, split.stream(iter(batches)), strict=True):
                labels = split.labels[ids].to(self.device, non_blocking=True)
                logits = self._forward(self._normalised(images))
                correct += (logits.argmax(-1) == labels).sum()
                on_batch()
                loss += functional.cross_entropy(logits, labels, reduction="sum").double()
        score = Score(int(correct) / len(split), float(loss) / len(split))
        if not math.isfinite(score.loss):
            raise diverged(self.student, self.round, f"its loss is {score.loss}")
        return score

    def optimizer_state(self) -> Mapping[str, Any]:
        """Returns the optimiser's state dict."""
        return self._optimizer.state_dict()

    def restore(self, round_number: int, model: Mapping[str, torch.Tensor], optimizer: Mapping[str, Any]) -> None:
        """Goes to where a checkpoint was taken; what is given stays as it is.

        Raises:
            RuntimeError, ValueError, KeyError: it is of another model or optimiser.
        """
        self.abandon()
        self.model.load_state_dict(dict(model))
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
        seed = derive(self._seed, "augment", self.student, number)
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

    def _forward(self, images: torch.Tensor) -> torch.Tensor:
        if self._plan.training.precision == "bfloat16":
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                return self.model(images).float()
        return self.model(images).float()

    def _measures_held_out(self) -> bool:
        return self._half.measures_held_out and self.round > 0 and self.round % self.rounds_per_epoch == 0

    def _held_out(self) -> Outputs:
        split = self._dataset.held_out
        if split is None:
            raise RuntimeError("the experiment holds no samples out")
        self.model.eval()
        ids = torch.arange(len(split))
        batches = ids.split(self._plan.training.evaluation_batch_size)
        with torch.inference_mode():
            logits = torch.cat([self._forward(self._normalised(images)) for images in split.stream(iter(batches))])
        return Outputs(ids, split.labels, self._to_cpu(logits))

    def _to_cpu(self, logits: torch.Tensor) -> torch.Tensor:
        """Brings logits to the CPU, and refuses those that nobody could learn from."""
        value = logits.detach()
        if self.device.type == "cuda":
            # From page-locked memory the copy runs beside what else the device does; only its end is waited for.
            landed = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            landed.copy_(value, non_blocking=True)
            torch.cuda.current_stream(self.device).synchronize()
            value = landed
        if not bool(torch.isfinite(value).all()):
            raise diverged(self.student, self.round, "its logits are not finite")
        return value

    def _learning_rate(self) -> float:
        training = self._plan.training
        return learning_rate(
            training.optimizer.lr, training.schedule, self.round, self.rounds_per_epoch, training.epochs
        )

    def _set_threads(self) -> None:
        """Other numbers of threads sum in other orders, so each student has its own, whoever shares its process."""
        threads = self._plan.training.threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def diverged(student: str, number: int, what: str) -> WorkerError:
    """Returns the error of a student that nothing more can be learnt from."""
    return WorkerError(
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


def _optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
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
