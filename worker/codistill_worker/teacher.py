"""A teacher's loop: it publishes, and learns nothing.

Nothing that happens in the run changes a teacher's outputs. So it computes those of several rounds in one forward pass,
ahead of time. The rounds' numbers alone decide which go together, so a restarted teacher gives the same bits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch

from codistill.config.experiment import Experiment
from codistill.config.plans import TeacherPlan
from codistill.methods import StudentContext
from codistill.peer.base import Transport
from codistill.peer.draws import derive
from codistill.peer.errors import PeerError
from codistill.peer.order import Order
from codistill.process.randomness import seed_generators
from codistill.process.watchdog import Watchdog
from codistill.v1 import distillation_pb2 as pb
from codistill_worker import methods, models
from codistill_worker.data import Dataset, augmentation, check_batch
from codistill_worker.errors import ConfigurationError, participants_errors
from codistill_worker.participant import Participant, describe_device
from codistill_worker.training import weights
from codistill_worker.training.devices import forward_pass, place_model, set_kernels, to_cpu
from codistill_worker.training.evaluation import evaluate
from codistill_worker.training.outputs import Outputs, Published, check_outputs, image_shape, output_shapes
from codistill_worker.training.users_errors import explained, model_title, running, users_place
from codistill_worker.transfers import all_finite

__all__ = ["TeacherLoop"]

_log = logging.getLogger(__name__)


class TeacherLoop:
    """One teacher's way through a run; driven like a :class:`codistill_worker.student.StudentLoop`.

    Args:
        experiment: the run's experiment.
        plan: the teacher's settings.
        dataset: the run's data.
        device: where the teacher is run.
        transport: carries its outputs and its reports.
        clock: seconds that never go back.
        watchdog: ends the process if a step hangs.

    Attributes:
        step: the step of the next round to publish in.

    Raises:
        ConfigurationError: its model, weights or layers cannot be used.
    """

    def __init__(
        self,
        experiment: Experiment,
        plan: TeacherPlan,
        dataset: Dataset,
        device: torch.device,
        transport: Transport,
        clock: Callable[[], float] = time.monotonic,
        watchdog: Watchdog | None = None,
    ) -> None:
        training, teacher, shape = plan.training, plan.teacher, image_shape(dataset)
        check_batch(dataset, training.batch_size)
        self.step = 0
        self._experiment = experiment
        self._model_title = model_title(experiment, teacher)
        self._plan = plan
        self._dataset = dataset
        self._device = device
        self._clock = clock
        self._order = Order(experiment.seed, len(dataset.train), training.batch_size)
        self._participant = Participant(
            teacher.name,
            "teacher",
            experiment,
            training,
            self._order.steps_per_epoch,
            transport,
            clock,
            watchdog,
        )
        self._exchange_schedule = plan.distillation.exchange_schedule(self._order.steps_per_epoch)
        self._total_steps = training.epochs * self._order.steps_per_epoch
        self._rounds_per_pass = max(1, training.evaluation_batch_size // training.batch_size)
        model = models.build(teacher.model, **shape, args=teacher.model_args, seed=0, title=self._model_title)
        trained = weights.read(Path(teacher.weights), teacher.name)
        weights.apply(trained, model, teacher.weights, teacher.model, dataset.classes)
        self._digest = bytes.fromhex(weights.digest(trained))
        self._model = place_model(model, device, training)
        context = StudentContext(teacher.name, self._model, shape, dict)
        self._network = methods.teacher_network(plan.distillation, context)
        self._shapes = output_shapes(self._network, shape, device)
        self._network.eval()
        self._model.eval()
        self._ready: dict[int, Published] = {}

    @property
    def title(self) -> str:
        """The teacher's name for people: "teacher 't'"."""
        return f"teacher {self._plan.teacher.name!r}"

    @property
    def done(self) -> bool:
        """Whether nothing is left to publish."""
        return self.step >= self._total_steps

    def errors(self) -> AbstractContextManager[None]:
        """Return the context of the teacher's steps, in which errors of its device get their exit codes."""
        return participants_errors(self.title, self._device, lambda: self.step)

    def join(self) -> None:
        """Open the session with the run, and begin at its frontier.

        Before that, it computes its first outputs, so that what they show ends no run that has begun.

        Raises:
            ConfigurationError: its model cannot compute them, or computes others each time.
            PeerError: the run cannot be reached, or rejects this teacher.
        """
        self._try_outputs()
        response = self._participant.join(
            self._dataset,
            self._shapes,
            self._device,
            first_step=0,
            total_steps=self._total_steps,
            parameters=sum(parameter.numel() for parameter in self._model.parameters()),
            weights_sha256=self._digest,
        )
        self.step = min(self._exchange_schedule.step_of(response.frontier), self._total_steps)
        self._ready = {step: published for step, published in self._ready.items() if step >= self.step}
        _log.info(
            "teacher %s (%s) joined run %s on %s at step %d of %d",
            self._plan.teacher.name,
            self._plan.teacher.model,
            response.run,
            describe_device(self._device),
            self.step,
            self._total_steps,
        )
        self._evaluate()

    def launch_step(self) -> None:
        """Compute the outputs of the next round, unless they are there."""
        self._prepare_running(self.step)

    def begin_step(self) -> None:
        """Publish the outputs of the next round."""
        self._prepare_running(self.step)
        self._participant.publish(self._ready.pop(self.step))

    def end_step(self) -> None:
        """Compute the outputs of the next round, then wait for the end of this one."""
        schedule, published = self._exchange_schedule, self.step
        following = schedule.step_of(schedule.rounds_before(published) + 1)
        self._prepare_running(following)
        self._participant.receive("waiting for the round's end", published)
        self.step = min(following, self._total_steps)
        if self._participant.report_due(self._clock()):
            self._report()

    def finish(self) -> None:
        """Leave as finished, at the end of the run."""
        self._report()
        self._leave(pb.LEAVE_REASON_FINISHED, f"taught {self._total_steps} steps")

    def stop(self) -> None:
        """Leave between two steps; a later worker can resume here."""
        self._report()
        self._leave(pb.LEAVE_REASON_STOPPED, f"stopped at step {self.step}")

    def fail(self, message: str) -> None:
        """Leave because of an error."""
        self._leave(pb.LEAVE_REASON_FAILED, message)

    def keep(self) -> None:
        """Do nothing: a teacher has nothing to save."""

    def _prepare_running(self, step: int) -> None:
        """Compute as :meth:`_prepare`; name the teacher in an error."""
        with running(f"{self._model_title} failed in the forward pass, step {step}"):
            self._prepare(step)

    def _prepare(self, step: int) -> None:
        """Compute the outputs of a step, and of the steps that go with it, unless they are there."""
        if step in self._ready or step >= self._total_steps:
            return
        self._mark("the forward pass")
        set_kernels(self._plan.training)
        schedule, together = self._exchange_schedule, self._rounds_per_pass
        first = schedule.rounds_before(step) // together * together
        steps = [schedule.step_of(round_number) for round_number in range(first, first + together)]
        steps = [exchanging for exchanging in steps if exchanging < self._total_steps]
        batches = [self._order.samples(exchanging) for exchanging in steps]
        streamed = zip(steps, batches, self._dataset.train.stream(iter(batches)), strict=True)
        images = torch.cat([self._augmented(images, ids, exchanging) for exchanging, ids, images in streamed])
        normalised = self._dataset.normalise(images, channels_last=self._plan.training.channels_last)
        self._seed("forward", steps[0])
        with torch.inference_mode(), forward_pass(self._device, self._plan.training):
            outputs = self._network(normalised)
        check_outputs(outputs, self._shapes, len(normalised), self._model)
        arrays = to_cpu({name: value.float() for name, value in outputs.items()}, self._device)
        for name, value in arrays.items():
            if not all_finite(value):
                raise PeerError(
                    f"teacher {self._plan.teacher.name!r}: its {name} are not finite in steps {steps[0]} to {steps[-1]}; "
                    "its weights are damaged, give others"
                )
        by_round = {name: value.split(len(batches[0])) for name, value in arrays.items()}
        labels = self._dataset.train.labels
        for position, (exchanging, ids) in enumerate(zip(steps, batches, strict=True)):
            if exchanging >= step:
                of_round = {name: values[position] for name, values in by_round.items()}
                self._ready[exchanging] = Published(exchanging, Outputs(ids, labels[ids], of_round))

    def _try_outputs(self) -> None:
        """Compute the outputs of the first rounds twice; keep them."""
        place = partial(users_place, self._plan.teacher.model)
        computed: list[dict[int, Published]] = []
        with explained(f"{self._model_title} cannot compute its outputs", place):
            for _ in range(2):
                self._ready = {}
                self._prepare(0)
                computed.append(self._ready)
        for number, first in computed[0].items():
            for name, value in first.batch.arrays.items():
                if self._device.type == "cpu" and not torch.equal(value, computed[1][number].batch.arrays[name]):
                    raise ConfigurationError(
                        f"{self._model_title} gives other {name} for the same images each time; let its "
                        "outputs depend on its images and weights alone, and draw random numbers from torch, random or "
                        "numpy.random themselves, which are seeded for each forward pass"
                    )

    def _seed(self, purpose: str, step: int) -> None:
        """Seed what a model draws from; the participants of one process would share its state."""
        seed_generators(derive(self._experiment.seed, purpose, self._plan.teacher.name, step))

    def _augmented(self, images: torch.Tensor, ids: torch.Tensor, step: int) -> torch.Tensor:
        seed = augmentation.view_seed(self._experiment, self._plan.teacher.name, step)
        return augmentation.augment(images, ids, self._plan.data.augment, seed)

    def _evaluate(self) -> None:
        set_kernels(self._plan.training)
        self._seed("evaluation", 0)
        with running(f"{self._model_title} failed in the evaluation"):
            score = evaluate(
                self._model,
                self._dataset,
                self._dataset.test,
                self._plan.training,
                self._device,
                lambda: self._mark("an evaluation"),
            )
        self._participant.measurements.append(
            pb.Measurement(split=pb.SPLIT_TEST, accuracy=score.accuracy, loss=score.loss)
        )
        self._report()

    def _report(self) -> None:
        self._participant.report(self.step, self.step)

    def _leave(self, reason: pb.LeaveReason.ValueType, message: str) -> None:
        self._participant.leave(reason, message, self.step)

    def _mark(self, activity: str) -> None:
        self._participant.mark(activity, self.step)
