"""A student's whole course: rounds, evaluations, checkpoints and reports, through an exchange.

:class:`StudentLoop` is driven round by round, so that one process can drive one (a worker) or all (the in-process run).
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from codistill import PROTOCOL_VERSION
from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity
from codistill.config.plans import StudentPlan
from codistill.peer.base import Transport
from codistill.peer.errors import PeerError
from codistill.process.watchdog import Watchdog
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import decode, encode
from codistill_worker.data import Dataset, check_batch
from codistill_worker.errors import ConfigurationError
from codistill_worker.training.checkpoints import Checkpoint, CheckpointStore
from codistill_worker.training.trainer import Outputs, Published, StepLoss, Trainer, diverged

__all__ = ["StudentLoop", "contribution", "describe"]

_log = logging.getLogger(__name__)
_REPORT_SECONDS = 1.0
_CALLS_SECONDS = 60.0  # of calls that are under way when a limit of the exchange is reached


@dataclass
class _Sums:
    """What training steps came to since the last measurement; kept on the device, read when reported."""

    correct: torch.Tensor | None = None
    samples: int = 0
    steps: int = 0
    cross_entropy: torch.Tensor | None = None
    distillation: torch.Tensor | None = None

    def add(self, step: StepLoss) -> None:
        self.correct = step.correct if self.correct is None else self.correct + step.correct
        self.cross_entropy = _plus(self.cross_entropy, step.cross_entropy)
        if step.distillation is not None:
            self.distillation = _plus(self.distillation, step.distillation)
        self.samples += step.samples
        self.steps += 1


@dataclass
class _Pace:
    """Times of the steps since the last report, in seconds."""

    steps: list[float] = field(default_factory=list[float])
    waits: list[float] = field(default_factory=list[float])


class StudentLoop:
    """One student on its way through a run.

    Args:
        experiment: the run's experiment.
        plan: the student's settings.
        dataset: the run's data.
        device: where the student is trained.
        exchange: what it exchanges its outputs through.
        store: where its checkpoints go.
        clock: seconds that never go back.
        watchdog: is told what the student is at.

    Raises:
        ConfigurationError: model, data or checkpoint cannot be used.
    """

    def __init__(
        self,
        experiment: Experiment,
        plan: StudentPlan,
        dataset: Dataset,
        device: torch.device,
        exchange: Transport,
        store: CheckpointStore,
        clock: Callable[[], float] = time.monotonic,
        watchdog: Watchdog | None = None,
    ) -> None:
        check_batch(dataset, plan.training.batch_size)
        self.trainer = Trainer(experiment, plan, dataset, device)
        self._experiment = experiment
        self._identity = identity(experiment)
        self._plan = plan
        self._dataset = dataset
        self._exchange = exchange
        self._store = store
        self._clock = clock
        self._watchdog = watchdog or Watchdog()
        self._sums = _Sums()
        self._pace = _Pace()
        self._measurements: list[pb.Measurement] = []
        self._best = -1.0
        self._reported_at = self._saved_at = clock()
        self._saved_round = -1
        self._step_started: float | None = None
        self._resume()

    @property
    def round(self) -> int:
        """The next round to train."""
        return self.trainer.round

    @property
    def done(self) -> bool:
        """Whether all rounds are trained."""
        return self.round >= self.trainer.total_rounds

    def join(self) -> None:
        """Opens the session with the run.

        Raises:
            PeerError: the run cannot be reached, or refuses this student.
        """
        trainer, dataset = self.trainer, self._dataset
        request = pb.JoinRequest(
            protocol_version=PROTOCOL_VERSION,
            student=trainer.student,
            experiment=self._identity,
            data=pb.DataFingerprint(
                digest=dataset.fingerprint(), train_samples=len(dataset.train), classes=dataset.classes
            ),
            outputs={name: pb.Shape(dims=dims) for name, dims in trainer.shapes.items()},
            first_round=trainer.round,
            total_rounds=trainer.total_rounds,
            parameters=trainer.parameters,
            device=describe(trainer.device),
        )
        self._begin("joining the run", self._experiment.exchange.connect_timeout + _CALLS_SECONDS)
        response = self._exchange.join(request)
        _log.info(
            "student %s (%s, %s parameters) joined run %s on %s at round %d of %d",
            trainer.student,
            self._plan.student.model,
            f"{trainer.parameters:,}",
            response.run,
            describe(trainer.device),
            trainer.round,
            trainer.total_rounds,
        )

    def begin_round(self) -> None:
        """Runs the forward pass of the next round and publishes what the method wants."""
        self._step_started = self._clock()
        self._begin("the forward pass")
        published = self.trainer.begin()
        if published is not None:
            self._exchange.send(contribution(published, self._experiment.exchange.dtype))

    def end_round(self) -> None:
        """Waits for the round's targets, learns from them, and does what is due: measure, save, report."""
        self.trainer.prepare()
        waited = 0.0
        targets: dict[str, torch.Tensor] = {}
        if self.trainer.exchanges:
            asked = self._clock()
            self._begin("waiting for the targets", self._longest_exchange)
            reply = self._exchange.receive(self.trainer.round)
            waited = self._clock() - asked
            targets = {name: decode(value, f"targets.{name}") for name, value in reply.targets.items()}
        self._begin("the backward pass")
        self._sums.add(self.trainer.finish(targets))
        if self._step_started is not None:
            self._pace.steps.append(self._clock() - self._step_started)
            self._pace.waits.append(waited)
        self._after_round()

    def finish(self) -> None:
        """Saves the trained student and says goodbye.

        Raises:
            PeerError: it cannot be saved; or the server cannot be told.
        """
        self._save()
        if self._saved_round != self.trainer.round:
            # Were it to leave as finished, the server would drop the rounds that it needs to be trained again.
            raise PeerError(
                f"student {self.trainer.student!r} is trained, but cannot be saved to {self._store.folder}; free disk space "
                "or check the folder's permissions, then resume the run"
            )
        self._report()
        self._leave(pb.LEAVE_REASON_FINISHED, f"trained {self.trainer.round} rounds")

    def stop(self) -> None:
        """Saves the student between two rounds and leaves; a later worker goes on from here."""
        self.keep()
        self._report()
        self._leave(pb.LEAVE_REASON_STOPPED, f"stopped after {self.trainer.round} rounds")

    def fail(self, message: str) -> None:
        """Leaves because of an error; the last checkpoint stays what it was."""
        self._leave(pb.LEAVE_REASON_FAILED, message)

    def keep(self) -> None:
        """Saves the student as it was before the round under way."""
        self.trainer.abandon()
        self._save()

    @property
    def _longest_exchange(self) -> float:
        return self._experiment.exchange.give_up_after + _CALLS_SECONDS

    def _begin(self, what: str, legal: float = 0.0) -> None:
        """Tells the watchdog what begins, and for how long that may wait for others."""
        trainer = self.trainer
        limit = legal + self._plan.training.hang_after
        self._watchdog.begin(f"student {trainer.student!r} at {what}, round {trainer.round}", limit)

    def _leave(self, reason: pb.LeaveReason.ValueType, message: str) -> None:
        self._begin("saying goodbye", self._longest_exchange)
        self._exchange.leave(reason, message)

    def _resume(self) -> None:
        checkpoint = self._store.load(self.trainer.student, self._identity)
        if checkpoint is None:
            return
        try:
            self.trainer.restore(checkpoint.round, checkpoint.model, checkpoint.optimizer, checkpoint.extra)
        except (RuntimeError, ValueError, KeyError) as error:
            why = " ".join(str(error).split())
            raise ConfigurationError(
                f"the checkpoint in {self._store.folder} does not fit model {self._plan.student.model!r}: {why}; was the "
                "model's code changed? choose another run folder"
            ) from error
        for each in checkpoint.progress["measurements"]:
            self._measurements.append(pb.Measurement(**each))
        self._best = float(checkpoint.progress["best"])
        sums = checkpoint.progress["sums"]
        if sums["steps"]:
            self._sums = _Sums(
                correct=torch.tensor(sums["correct"], device=self.trainer.device),
                samples=sums["samples"],
                steps=sums["steps"],
                cross_entropy=torch.tensor(sums["cross_entropy"], device=self.trainer.device, dtype=torch.float64),
                distillation=None
                if sums["distillation"] is None
                else torch.tensor(sums["distillation"], device=self.trainer.device, dtype=torch.float64),
            )
        self._saved_round = checkpoint.round
        _log.info("student %s goes on from its checkpoint at round %d", self.trainer.student, checkpoint.round)

    def _after_round(self) -> None:
        trainer, training = self.trainer, self._plan.training
        epochs, rest = divmod(trainer.round, trainer.rounds_per_epoch)
        if rest == 0:
            self._measure_training()
            if epochs % training.evaluate_every == 0 or self.done:
                self._evaluate()
        now = self._clock()
        if now - self._saved_at >= training.checkpoint_every and not self.done:
            self._save()
        if now - self._reported_at >= _REPORT_SECONDS:
            self._report()

    def _measure_training(self) -> None:
        sums, self._sums = self._sums, _Sums()
        if sums.correct is None or sums.cross_entropy is None:
            return
        loss = float(sums.cross_entropy) / sums.steps
        if not math.isfinite(loss):
            raise diverged(self.trainer.student, self.trainer.round, f"its loss is {loss}")
        self._measurements.append(
            pb.Measurement(
                split=pb.SPLIT_TRAIN,
                round=self.trainer.round,
                accuracy=int(sums.correct) / sums.samples,
                loss=loss,
                distillation_loss=None if sums.distillation is None else float(sums.distillation) / sums.steps,
            )
        )

    def _evaluate(self) -> None:
        score = self.trainer.evaluate(self._dataset.test, lambda: self._begin("an evaluation"))
        self._measurements.append(
            pb.Measurement(split=pb.SPLIT_TEST, round=self.trainer.round, accuracy=score.accuracy, loss=score.loss)
        )
        _log.info(
            "student %s: epoch %d, test accuracy %.2f %%, loss %.4f",
            self.trainer.student,
            self.trainer.round // self.trainer.rounds_per_epoch,
            100 * score.accuracy,
            score.loss,
        )
        if score.accuracy > self._best:
            self._best = score.accuracy
            try:
                self._store.save_best(self._checkpoint(with_optimizer=False))
            except OSError as error:
                self._log_unsaved("best weights", error)

    def _save(self) -> None:
        self._saved_at = self._clock()
        if self._saved_round == self.trainer.round:
            return
        self._begin("saving a checkpoint")
        try:
            self._store.save(self._checkpoint(with_optimizer=True))
        except OSError as error:
            self._log_unsaved("checkpoint", error)
            return
        self._saved_round = self.trainer.round

    def _log_unsaved(self, what: str, error: OSError) -> None:
        _log.error(
            "%s of student %s at round %d cannot be written to %s: %s; what was saved before stays",
            what,
            self.trainer.student,
            self.trainer.round,
            self._store.folder,
            error.strerror or error,
        )

    def _checkpoint(self, *, with_optimizer: bool) -> Checkpoint:
        sums = self._sums
        progress: dict[str, Any] = {
            "best": self._best,
            # What the server may not have yet; a worker that resumes here would not measure it again.
            "measurements": [
                {descriptor.name: value for descriptor, value in each.ListFields()}
                for each in (*self._exchange.undelivered(), *self._measurements)
            ],
            "sums": {
                "correct": 0 if sums.correct is None else int(sums.correct),
                "samples": sums.samples,
                "steps": sums.steps,
                "cross_entropy": 0.0 if sums.cross_entropy is None else float(sums.cross_entropy),
                "distillation": None if sums.distillation is None else float(sums.distillation),
            },
        }
        return Checkpoint(
            student=self.trainer.student,
            identity=self._identity,
            round=self.trainer.round,
            model=self.trainer.model.state_dict(),
            extra=self.trainer.extra.state_dict(),
            optimizer=self.trainer.optimizer_state() if with_optimizer else {},
            progress=progress,
        )

    def _report(self) -> None:
        self._reported_at = self._clock()
        pace, self._pace = self._pace, _Pace()
        measurements, self._measurements = self._measurements, []
        self._begin("reporting", self._longest_exchange)
        self._exchange.report(
            pb.ReportRequest(
                round=self.trainer.round,
                epoch=self.trainer.round / self.trainer.rounds_per_epoch,
                durable_round=self._store.durable_round,
                measurements=measurements,
                step_seconds=statistics.median(pace.steps) if pace.steps else 0.0,
                wait_seconds=statistics.median(pace.waits) if pace.waits else 0.0,
            )
        )


def contribution(published: Published, dtype: str) -> pb.Contribution:
    """Returns what is published in a round as a message, its arrays in the experiment's dtype."""
    return pb.Contribution(
        round=published.round,
        batch=_samples(published.batch, dtype),
        held_out=None if published.held_out is None else _samples(published.held_out, dtype),
    )


def _samples(outputs: Outputs, dtype: str) -> pb.Samples:
    return pb.Samples(
        ids=encode(outputs.ids, "int64"),
        labels=encode(outputs.labels, "int64"),
        outputs={name: encode(value, dtype) for name, value in outputs.arrays.items()},
    )


def _plus(sum_so_far: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    return value.double() if sum_so_far is None else sum_so_far + value.double()


def describe(device: torch.device) -> str:
    """Returns a device's name as reports show it."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)
