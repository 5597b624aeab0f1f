"""A teacher's course through a run: it publishes, and learns nothing.

It computes several rounds' outputs in one forward pass, ahead of time, as nothing that happens in the run changes them.
Which rounds go together follows from their numbers alone, so a teacher that was started again gives the same bits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from codistill import PROTOCOL_VERSION
from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity
from codistill.config.plans import TeacherPlan
from codistill.peer.base import Transport
from codistill.peer.draws import derive
from codistill.peer.errors import PeerError
from codistill.peer.order import Order
from codistill.process.watchdog import Watchdog
from codistill.v1 import distillation_pb2 as pb
from codistill_worker import methods, models
from codistill_worker.data import Dataset, augmentation, check_batch
from codistill_worker.student import contribution, describe
from codistill_worker.training import weights
from codistill_worker.training.evaluation import (
    autocast,
    evaluate,
    image_shape,
    output_shapes,
    placed,
    set_threads,
    to_cpu,
    view_of,
)
from codistill_worker.training.trainer import Outputs, Published

__all__ = ["TeacherLoop"]

_log = logging.getLogger(__name__)
_REPORT_SECONDS = 1.0
_CALLS_SECONDS = 60.0  # of calls that are under way when a limit of the exchange is reached


class TeacherLoop:
    """One teacher on its way through a run; driven as a :class:`codistill_worker.student.StudentLoop` is.

    Args:
        experiment: the run's experiment.
        plan: the teacher's settings.
        dataset: the run's data.
        device: where the teacher is run.
        exchange: what it publishes through.
        clock: seconds that never go back.
        watchdog: is told what the teacher is at.

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
        exchange: Transport,
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
        self._exchange = exchange
        self._clock = clock
        self._watchdog = watchdog or Watchdog()
        self._view = view_of(experiment, teacher.name)
        self._order = Order(experiment.seed, len(dataset.train), training.batch_size)
        self._exchange_schedule = plan.distillation.exchange_schedule(self._order.rounds_per_epoch)
        self._total = training.epochs * self._order.rounds_per_epoch
        self._at_once = max(1, training.evaluation_batch_size // training.batch_size)
        model = models.build(teacher.model, **shape, args=teacher.model_args, seed=0)
        read = weights.read(Path(teacher.weights), teacher.name)
        weights.apply(read, model, teacher.weights, teacher.model, dataset.classes)
        self._digest = weights.digest(read)
        self._model = placed(model, device, training)
        subject = methods.StudentContext(teacher.name, self._model, shape, dict)
        self._network = methods.teacher_network(plan.distillation, subject)
        self._shapes = output_shapes(self._network, shape, device)
        self._network.eval()
        self._model.eval()
        self._ready: dict[int, Published] = {}
        self._measurements: list[pb.Measurement] = []
        self._reported_at = clock()

    @property
    def done(self) -> bool:
        """Whether nothing is left to publish."""
        return self.round >= self._total

    def join(self) -> None:
        """Opens the session with the run, and begins at its frontier.

        Raises:
            PeerError: the run cannot be reached, or refuses this teacher.
        """
        dataset, name = self._dataset, self._plan.teacher.name
        request = pb.JoinRequest(
            protocol_version=PROTOCOL_VERSION,
            student=name,
            experiment=identity(self._experiment),
            data=pb.DataFingerprint(
                digest=dataset.fingerprint(), train_samples=len(dataset.train), classes=dataset.classes
            ),
            outputs={name: pb.Shape(dims=dims) for name, dims in self._shapes.items()},
            total_rounds=self._total,
            parameters=sum(parameter.numel() for parameter in self._model.parameters()),
            device=describe(self._device),
            weights=self._digest,
        )
        self._begin("joining the run", self._experiment.exchange.connect_timeout + _CALLS_SECONDS)
        response = self._exchange.join(request)
        self.round = min(response.frontier, self._total)
        _log.info(
            "teacher %s (%s) joined run %s on %s at round %d of %d",
            name,
            self._plan.teacher.model,
            response.run,
            describe(self._device),
            self.round,
            self._total,
        )
        self._evaluate()

    def begin_round(self) -> None:
        """Publishes the outputs of the next round that exchanges."""
        self._prepare(self.round)
        self._exchange.send(contribution(self._ready.pop(self.round), self._experiment.exchange.dtype))

    def end_round(self) -> None:
        """Waits for the round's end; meanwhile computes what comes next."""
        published = self.round
        following = self._exchange_schedule.round(self._exchange_schedule.exchanges_before(published) + 1)
        self._prepare(following)
        self._begin("waiting for the round's end", self._longest_exchange)
        self._exchange.receive(published)
        self.round = min(following, self._total)
        if self._clock() - self._reported_at >= _REPORT_SECONDS:
            self._report()

    def finish(self) -> None:
        """Says goodbye; the run is over."""
        self._report()
        self._leave(pb.LEAVE_REASON_FINISHED, f"taught {self._total} rounds")

    def stop(self) -> None:
        """Leaves between two rounds; a later worker goes on."""
        self._report()
        self._leave(pb.LEAVE_REASON_STOPPED, f"stopped at round {self.round}")

    def fail(self, message: str) -> None:
        """Leaves because of an error."""
        self._leave(pb.LEAVE_REASON_FAILED, message)

    def keep(self) -> None:
        """Saves nothing, as nothing was learnt."""

    def _prepare(self, number: int) -> None:
        """Computes the outputs of a round, and of those that go with it, unless they are there."""
        if number in self._ready or number >= self._total:
            return
        self._begin("the forward pass")
        set_threads(self._plan.training)
        first = self._exchange_schedule.exchanges_before(number) // self._at_once * self._at_once
        rounds = [self._exchange_schedule.round(each) for each in range(first, first + self._at_once)]
        rounds = [each for each in rounds if each < self._total]
        ids = [self._order.samples(each) for each in rounds]
        streamed = zip(rounds, ids, self._dataset.train.stream(iter(ids)), strict=True)
        images = torch.cat([self._augmented(images, samples, each) for each, samples, images in streamed])
        with torch.inference_mode(), autocast(self._device, self._plan.training):
            found = self._network(self._normalised(images))
        arrays = to_cpu({name: value.float() for name, value in found.items()}, self._device)
        for name, value in arrays.items():
            if not bool(torch.isfinite(value).all()):
                raise PeerError(
                    f"teacher {self._plan.teacher.name!r}: its {name} are not finite in rounds {rounds[0]} to {rounds[-1]}; "
                    "its weights are damaged, give others"
                )
        parts = {name: value.split(len(ids[0])) for name, value in arrays.items()}
        labels = self._dataset.train.labels
        for place, (each, samples) in enumerate(zip(rounds, ids, strict=True)):
            if each >= number:
                mine = {name: split[place] for name, split in parts.items()}
                self._ready[each] = Published(each, Outputs(samples, labels[samples], mine))

    def _augmented(self, images: torch.Tensor, ids: torch.Tensor, number: int) -> torch.Tensor:
        seed = derive(self._experiment.seed, "augment", self._view, number)
        return augmentation.augment(images, ids, self._plan.data.augment, seed)

    def _normalised(self, images: torch.Tensor) -> torch.Tensor:
        dataset, channels_last = self._dataset, self._plan.training.channels_last
        return augmentation.normalise(
            images, dataset.mean, dataset.std, dtype=torch.float32, channels_last=channels_last
        )

    def _evaluate(self) -> None:
        set_threads(self._plan.training)
        score = evaluate(
            self._model,
            self._dataset,
            self._dataset.test,
            self._plan.training,
            self._device,
            lambda: self._begin("an evaluation"),
        )
        self._measurements.append(
            pb.Measurement(split=pb.SPLIT_TEST, round=0, accuracy=score.accuracy, loss=score.loss)
        )
        self._report()

    def _report(self) -> None:
        self._reported_at = self._clock()
        measurements, self._measurements = self._measurements, []
        self._begin("reporting", self._longest_exchange)
        self._exchange.report(
            pb.ReportRequest(
                round=self.round,
                epoch=self.round / self._order.rounds_per_epoch,
                durable_round=self.round,
                measurements=measurements,
            )
        )

    def _leave(self, reason: pb.LeaveReason.ValueType, message: str) -> None:
        self._begin("saying goodbye", self._longest_exchange)
        self._exchange.leave(reason, message)

    @property
    def _longest_exchange(self) -> float:
        return self._experiment.exchange.give_up_after + _CALLS_SECONDS

    def _begin(self, what: str, legal: float = 0.0) -> None:
        """Tells the watchdog what begins, and for how long that may wait for others."""
        limit = legal + self._plan.training.hang_after
        self._watchdog.begin(f"teacher {self._plan.teacher.name!r} at {what}, round {self.round}", limit)
