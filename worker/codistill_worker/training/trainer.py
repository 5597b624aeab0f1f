"""One student's training step, in two parts around the exchange.

:meth:`Trainer.begin` runs the forward pass and returns the outputs to publish. :meth:`Trainer.finish` takes the targets,
runs the backward pass and updates the weights. In between the outputs travel over gRPC, or within the process. A step
depends on the experiment, the student's name, the step and the weights alone: on no generator's state and no clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from codistill.config.experiment import Experiment
from codistill.config.plans import StudentPlan
from codistill.methods import Objective, Step, StudentContext, label_loss
from codistill.peer.draws import derive
from codistill.peer.errors import PeerError
from codistill.peer.order import Order
from codistill.process.exit_codes import ExitCode
from codistill.process.randomness import seed_generators
from codistill_worker import methods, models
from codistill_worker.data import Dataset, Split, augmentation
from codistill_worker.training import weights
from codistill_worker.training.devices import forward_pass, place_model, set_kernels, to_cpu
from codistill_worker.training.evaluation import Score, evaluate
from codistill_worker.training.optim import build_optimizer, learning_rate, load_state
from codistill_worker.training.outputs import (
    Outputs,
    Published,
    check_outputs,
    image_shape,
    output_shapes,
    teacher_shapes,
)
from codistill_worker.training.rollback import Rollback
from codistill_worker.training.users_errors import model_title
from codistill_worker.transfers import all_finite, upload

__all__ = ["StepLoss", "Trainer", "divergence_error"]


@dataclass(frozen=True)
class StepLoss:
    """The losses of a step, as scalars on the student's device, which the caller may read later.

    Attributes:
        correct: samples of the batch that the student classified correctly.
        samples: samples in the batch.
        cross_entropy: mean over the batch, in nats.
        distillation: the method's weighted term; None without one.
    """

    correct: torch.Tensor
    samples: int
    cross_entropy: torch.Tensor
    distillation: torch.Tensor | None


@dataclass(frozen=True)
class _Prepared:
    """A step's batch.

    Attributes:
        step: whose batch it is.
        ids: of the samples, int64 of shape [B], on the CPU.
        host_labels: the samples' labels, int64 of shape [B], on the CPU.
        labels: the same on the device.
        images: ready for the model, on the device.
    """

    step: int
    ids: torch.Tensor
    host_labels: torch.Tensor
    labels: torch.Tensor
    images: torch.Tensor


@dataclass(frozen=True)
class _Begun:
    """A step between its forward and its backward pass."""

    labels: torch.Tensor
    outputs: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class _Unpublished:
    """The part of a launched step that is not published yet; the outputs of the held-out samples are on the device."""

    ids: torch.Tensor
    labels: torch.Tensor
    held_out: Outputs | None


class Trainer:
    """One student: its model, its optimiser and its current step.

    Args:
        experiment: the run's experiment.
        plan: the student's settings.
        dataset: the run's data, on `device`.
        device: where the student is trained.

    Attributes:
        step: the next step to train; the steps before it are in the weights.
        model: the student.
        objective: the method's loss, and the network that computes its inputs.
        extra: modules that the method trains besides the model; empty for most methods.
        shapes: of the outputs that the student publishes, without the samples, by name.

    Raises:
        ConfigurationError: the model cannot be built for this data, or has no layer that the method names.
    """

    def __init__(self, experiment: Experiment, plan: StudentPlan, dataset: Dataset, device: torch.device) -> None:
        training = plan.training
        self.student = plan.student.name
        self.device = device
        self.step = 0
        self._experiment = experiment
        self._plan = plan
        self._dataset = dataset
        self._order = Order(experiment.seed, len(dataset.train), training.batch_size)
        self._exchange_schedule = plan.distillation.exchange_schedule(self._order.steps_per_epoch)
        shape = image_shape(dataset)
        model = models.build(
            plan.student.model,
            **shape,
            args=plan.student.model_args,
            seed=derive(experiment.seed, "init", self.student),
            title=model_title(experiment, plan.student),
        )
        self.model: nn.Module = place_model(model, device, training)
        teachers = partial(teacher_shapes, experiment, shape)
        seed = derive(experiment.seed, "objective", self.student)
        context = StudentContext(self.student, self.model, shape, teachers, seed)
        self.objective: Objective = methods.create(plan.distillation, context)
        self.extra: nn.Module = self.objective.extra.to(device)
        self.shapes = {
            name: dims
            for name, dims in output_shapes(self.objective.network, shape, device).items()
            if name in self.objective.publishes
        }
        self._checked = {"logits": (dataset.classes,), **self.shapes}
        self._trained = nn.ModuleList([self.model, self.extra])
        self._optimizer = build_optimizer(self._trained, training.optimizer)
        self._rollback = Rollback(self._trained)
        self._moded = list(dict.fromkeys([*self.model.modules(), *self.objective.network.modules()]))
        self._batches: Iterator[torch.Tensor] = iter(())
        self._streaming_from = -1
        self._prepared: _Prepared | None = None
        self._begun: _Begun | None = None
        self._unpublished: _Unpublished | None = None

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps in an epoch."""
        return self._order.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """The number of steps in the run."""
        return self._plan.training.epochs * self.steps_per_epoch

    @property
    def exchanges(self) -> bool:
        """Whether the next step exchanges anything."""
        return self._plan.distillation.exchanges and self._exchange_schedule.exchanges(self.step)

    @property
    def launched(self) -> bool:
        """Whether the next step is launched, and not begun yet."""
        return self._unpublished is not None

    @property
    def parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def prepare(self) -> None:
        """Load the batch of the next step to begin, while the targets of the current one are on their way."""
        upcoming = self.step if self._begun is None else self.step + 1
        if upcoming < self.total_steps and (self._prepared is None or self._prepared.step != upcoming):
            self._prepared = self._prepare(upcoming)

    def launch(self) -> None:
        """Start the forward pass of the next step, without waiting for a GPU to compute it; :meth:`begin` follows."""
        if self._begun is not None:
            raise RuntimeError(f"step {self.step} is begun already; finish or abandon it")
        set_kernels(self._plan.training)
        prepared = self._prepared
        if prepared is None or prepared.step != self.step:
            prepared = self._prepare(self.step)
        self._prepared = None
        self._rollback.keep()
        held_out = self._held_out() if self._measures_held_out() else None
        if not all(module.training for module in self._moded):  # setting the mode costs more than to look at it
            self.model.train()
            self.objective.network.train()
        self._seed("forward")
        outputs = self._outputs(prepared.images)
        self._begun = _Begun(prepared.labels, outputs)
        self._unpublished = _Unpublished(prepared.ids, prepared.host_labels, held_out)

    def begin(self) -> Published | None:
        """Run the forward pass of the next step, unless it is launched.

        Returns:
            What to publish, or None if the step exchanges nothing.

        Raises:
            PeerError: the outputs are not finite any more.
        """
        if not self.launched:
            self.launch()
        begun, unpublished = self._begun, self._unpublished
        assert begun is not None  # noqa: S101 - launch set both
        assert unpublished is not None  # noqa: S101
        self._unpublished = None
        if not self.exchanges:
            return None
        held_out = unpublished.held_out
        if held_out is not None:
            held_out = replace(held_out, arrays=self._published(held_out.arrays))
        batch = Outputs(unpublished.ids, unpublished.labels, self._published(begun.outputs))
        return Published(self.step, batch, held_out)

    def finish(self, targets: Mapping[str, torch.Tensor]) -> StepLoss:
        """Run the backward pass of the step that was begun and update the weights.

        Args:
            targets: the method's named arrays, on the CPU; empty where nothing is exchanged, and for a round that
                closed without targets.
        """
        begun = self._begun
        if begun is None:
            raise RuntimeError("no step is begun")
        set_kernels(self._plan.training)
        on_device = {name: upload(value, self.device) for name, value in targets.items()}
        epoch = self.step / self.steps_per_epoch
        step = Step(begun.outputs, begun.labels, on_device, epoch, self._plan.training.epochs)
        self._seed("loss")
        without_targets = self._plan.distillation.exchanges and not on_device
        loss = label_loss(step) if without_targets else self.objective.loss(step)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self._optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        if self._plan.training.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._trained.parameters(), self._plan.training.clip_norm)
        self._optimizer.step()
        self._begun = None
        self.step += 1
        correct = (begun.outputs["logits"].detach().argmax(-1) == begun.labels).sum()
        return StepLoss(correct, len(begun.labels), loss.cross_entropy, loss.distillation)

    def abandon(self) -> None:
        """Undo :meth:`begin`, so that this process or another can begin the step again."""
        if self._begun is None:
            return
        self._rollback.restore()
        self._begun = self._unpublished = None

    def evaluate(self, split: Split, on_batch: Callable[[], None] = lambda: None) -> Score:
        """Return the student's score on a split, without augmentation.

        Args:
            split: the samples.
            on_batch: called before each batch.

        Raises:
            PeerError: the loss is not finite any more.
        """
        set_kernels(self._plan.training)
        self._seed("evaluation")
        score = evaluate(self.model, self._dataset, split, self._plan.training, self.device, on_batch)
        if not math.isfinite(score.loss):
            raise divergence_error(self.student, self.step, f"its loss is {score.loss}")
        return score

    def optimizer_state(self) -> Mapping[str, Any]:
        """Return the optimiser's state dict."""
        return self._optimizer.state_dict()

    def restore(
        self,
        step: int,
        model: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, Any],
        extra: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        """Restore the state of a checkpoint, which is copied.

        Raises:
            RuntimeError, ValueError, KeyError: the state is of another model or optimiser.
        """
        self.abandon()
        weights.load(self.model, model)
        self.extra.load_state_dict(dict(extra))
        load_state(self._optimizer, optimizer)
        self.step = step

    def _seed(self, purpose: str) -> None:
        """Seed what a model and a method draw from; students in one process would share its state."""
        seed_generators(derive(self._experiment.seed, purpose, self.student, self.step))

    def _prepare(self, step: int) -> _Prepared:
        if self._streaming_from != step:
            self._batches = self._dataset.train.stream(
                self._order.samples(upcoming) for upcoming in range(step, self.total_steps)
            )
        images = next(self._batches)
        self._streaming_from = step + 1
        ids = self._order.samples(step)
        seed = augmentation.view_seed(self._experiment, self.student, step)
        images = augmentation.augment(images, ids, self._plan.data.augment, seed)
        host_labels = self._dataset.train.labels[ids]
        return _Prepared(step, ids, host_labels, upload(host_labels, self.device), self._normalise(images))

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        return self._dataset.normalise(images, channels_last=self._plan.training.channels_last)

    def _outputs(self, images: torch.Tensor) -> Mapping[str, torch.Tensor]:
        with forward_pass(self.device, self._plan.training):
            outputs = self.objective.network(images)
            check_outputs(outputs, self._checked, len(images), self.model)
            return {name: value.float() for name, value in outputs.items()}

    def _measures_held_out(self) -> bool:
        return self.objective.measures_held_out and self.step > 0 and self.step % self.steps_per_epoch == 0

    def _held_out(self) -> Outputs:
        """Return the outputs of the held-out samples, on the device."""
        split = self._dataset.held_out
        if split is None:
            raise RuntimeError("the experiment holds no samples out")
        self.model.eval()
        self.objective.network.eval()
        self._seed("held_out")
        ids = torch.arange(len(split))
        batches = ids.split(self._plan.training.evaluation_batch_size)
        with torch.inference_mode():
            by_batch = [self._outputs(self._normalise(images)) for images in split.stream(iter(batches))]
        outputs = {name: torch.cat([batch[name] for batch in by_batch]) for name in self.objective.publishes}
        return Outputs(ids, split.labels, outputs)

    def _published(self, outputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Return the outputs to publish, on the CPU; raise PeerError if they are not finite."""
        arrays = to_cpu({name: outputs[name] for name in self.objective.publishes}, self.device)
        for name, value in arrays.items():
            if not all_finite(value):
                raise divergence_error(self.student, self.step, f"its {name} are not finite")
        return arrays

    def _learning_rate(self) -> float:
        training = self._plan.training
        return learning_rate(training.optimizer.lr, training.schedule, self.step, self.steps_per_epoch, training.epochs)


def divergence_error(student: str, step: int, problem: str) -> PeerError:
    """Return the error of a student whose outputs or loss are not finite."""
    return PeerError(
        f"student {student!r} has diverged in step {step}: {problem}; lower training.optimizer.lr, or set "
        "training.clip_norm",
        ExitCode.DIVERGED,
    )
