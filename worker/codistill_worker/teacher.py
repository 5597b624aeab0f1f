"""A teacher's loop: it publishes, and learns nothing.

Nothing that happens in the run changes a teacher's outputs. So it computes those of several rounds in one forward pass,
ahead of time. The rounds' numbers alone decide which go together, so a restarted teacher gives the same bits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
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
from codistill_worker.errors import ConfigurationError
from codistill_worker.participant import Participant, describe_device
from codistill_worker.training import weights
from codistill_worker.training.devices import autocast, place_model, set_threads, to_cpu
from codistill_worker.training.evaluation import evaluate
from codistill_worker.training.outputs import Outputs, Published, image_shape, output_shapes
from codistill_worker.training.users_errors import explained

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
        round: the next round to publish in.

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
        self.round = 0
        self._experiment = experiment
        self._plan = plan
        self._dataset = dataset
        self._device = device
        self._clock = clock
        self._participant = Participant(teacher.name, "teacher", experiment, training, transport, clock, watchdog)
        self._order = Order(experiment.seed, len(dataset.train), training.batch_size)
        self._exchange_schedule = plan.distillation.exchange_schedule(self._order.rounds_per_epoch)
        self._total_rounds = training.epochs * self._order.rounds_per_epoch
        self._rounds_per_pass = max(1, training.evaluation_batch_size // training.batch_size)
        model = models.build(teacher.model, **shape, args=teacher.model_args, seed=0)
        trained = weights.read(Path(teacher.weights), teacher.name)
        weights.apply(trained, model, teacher.weights, teacher.model, dataset.classes)
        self._digest = weights.digest(trained)
        self._model = place_model(model, device, training)
        context = StudentContext(teacher.name, self._model, shape, dict)
        self._network = methods.teacher_network(plan.distillation, context)
        self._shapes = output_shapes(self._network, shape, device)
        self._network.eval()
        self._model.eval()
        self._ready: dict[int, Published] = {}

    @property
    def done(self) -> bool:
        """Whether nothing is left to publish."""
        return self.round >= self._total_rounds

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
            first_round=0,
            total_rounds=self._total_rounds,
            parameters=sum(parameter.numel() for parameter in self._model.parameters()),
            weights=self._digest,
        )
        self.round = min(response.frontier, self._total_rounds)
        self._ready = {number: published for number, published in self._ready.items() if number >= self.round}
        _log.info(
            "teacher %s (%s) joined run %s on %s at round %d of %d",
            self._plan.teacher.name,
            self._plan.teacher.model,
            response.run,
            describe_device(self._device),
            self.round,
            self._total_rounds,
        )
        self._evaluate()

    def begin_round(self) -> None:
        """Publish the outputs of the next round that exchanges."""
        self._prepare(self.round)
        self._participant.publish(self._ready.pop(self.round))

    def end_round(self) -> None:
        """Compute the outputs of the next exchange, then wait for the end of the round."""
        published = self.round
        following = self._exchange_schedule.round(self._exchange_schedule.exchanges_before(published) + 1)
        self._prepare(following)
        self._participant.receive("waiting for the round's end", published)
        self.round = min(following, self._total_rounds)
        if self._participant.report_due(self._clock()):
            self._report()

    def finish(self) -> None:
        """Leave as finished, at the end of the run."""
        self._report()
        self._leave(pb.LEAVE_REASON_FINISHED, f"taught {self._total_rounds} rounds")

    def stop(self) -> None:
        """Leave between two rounds; a later worker can resume here."""
        self._report()
        self._leave(pb.LEAVE_REASON_STOPPED, f"stopped at round {self.round}")

    def fail(self, message: str) -> None:
        """Leave because of an error."""
        self._leave(pb.LEAVE_REASON_FAILED, message)

    def keep(self) -> None:
        """Do nothing: a teacher has nothing to save."""

    def _prepare(self, round_number: int) -> None:
        """Compute the outputs of a round, and of the rounds that go with it, unless they are there."""
        if round_number in self._ready or round_number >= self._total_rounds:
            return
        self._mark("the forward pass")
        set_threads(self._plan.training)
        schedule, together = self._exchange_schedule, self._rounds_per_pass
        first = schedule.exchanges_before(round_number) // together * together
        rounds = [schedule.round(exchange) for exchange in range(first, first + together)]
        rounds = [exchanging for exchanging in rounds if exchanging < self._total_rounds]
        batches = [self._order.samples(exchanging) for exchanging in rounds]
        streamed = zip(rounds, batches, self._dataset.train.stream(iter(batches)), strict=True)
        images = torch.cat([self._augmented(images, ids, exchanging) for exchanging, ids, images in streamed])
        normalised = self._dataset.normalise(images, channels_last=self._plan.training.channels_last)
        self._seed("forward", rounds[0])
        with torch.inference_mode(), autocast(self._device, self._plan.training):
            outputs = self._network(normalised)
        arrays = to_cpu({name: value.float() for name, value in outputs.items()}, self._device)
        for name, value in arrays.items():
            if not bool(torch.isfinite(value).all()):
                raise PeerError(
                    f"teacher {self._plan.teacher.name!r}: its {name} are not finite in rounds {rounds[0]} to {rounds[-1]}; "
                    "its weights are damaged, give others"
                )
        by_round = {name: value.split(len(batches[0])) for name, value in arrays.items()}
        labels = self._dataset.train.labels
        for position, (exchanging, ids) in enumerate(zip(rounds, batches, strict=True)):
            if exchanging >= round_number:
                of_round = {name: values[position] for name, values in by_round.items()}
                self._ready[exchanging] = Published(exchanging, Outputs(ids, labels[ids], of_round))

    def _try_outputs(self) -> None:
        """Compute the outputs of the first rounds twice; keep them."""
        teacher = self._plan.teacher
        where = f"teachers.{self._experiment.teacher_names.index(teacher.name)}.model: {teacher.model!r}"
        computed: list[dict[int, Published]] = []
        with explained(f"{where} of teacher {teacher.name!r} cannot compute its outputs"):
            for _ in range(2):
                self._ready = {}
                self._prepare(0)
                computed.append(self._ready)
        for number, first in computed[0].items():
            for name, value in first.batch.arrays.items():
                if self._device.type == "cpu" and not torch.equal(value, computed[1][number].batch.arrays[name]):
                    raise ConfigurationError(
                        f"{where} of teacher {teacher.name!r} gives other {name} for the same images each time; let its "
                        "outputs depend on its images and weights alone, and draw random numbers from torch, random or "
                        "numpy.random themselves, which are seeded for each forward pass"
                    )

    def _seed(self, purpose: str, round_number: int) -> None:
        """Seed what a model draws from; the participants of one process would share its state."""
        seed_generators(derive(self._experiment.seed, purpose, self._plan.teacher.name, round_number))

    def _augmented(self, images: torch.Tensor, ids: torch.Tensor, round_number: int) -> torch.Tensor:
        seed = augmentation.view_seed(self._experiment, self._plan.teacher.name, round_number)
        return augmentation.augment(images, ids, self._plan.data.augment, seed)

    def _evaluate(self) -> None:
        set_threads(self._plan.training)
        self._seed("evaluation", 0)
        score = evaluate(
            self._model,
            self._dataset,
            self._dataset.test,
            self._plan.training,
            self._device,
            lambda: self._mark("an evaluation"),
        )
        self._participant.measurements.append(
            pb.Measurement(split=pb.SPLIT_TEST, round=0, accuracy=score.accuracy, loss=score.loss)
        )
        self._report()

    def _report(self) -> None:
        self._participant.report(self.round, self.round / self._order.rounds_per_epoch, self.round)

    def _leave(self, reason: pb.LeaveReason.ValueType, message: str) -> None:
        self._participant.leave(reason, message, self.round)

    def _mark(self, activity: str) -> None:
        self._participant.mark(activity, self.round)
