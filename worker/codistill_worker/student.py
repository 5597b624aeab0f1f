"""A student's loop: steps, evaluations, checkpoints and reports.

:class:`StudentLoop` is driven step by step, so that one process can drive one (a worker) or all (the in-process run).
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from codistill.config.experiment import Experiment
from codistill.config.plans import StudentPlan
from codistill.peer.base import Transport
from codistill.peer.errors import PeerError
from codistill.process.exit_codes import ExitCode
from codistill.process.watchdog import Watchdog
from codistill.rundir.storage import detail, explain, outlasts_restarts
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import decode
from codistill_worker.data import Dataset, check_batch
from codistill_worker.errors import ConfigurationError, is_devices_fault, participants_errors
from codistill_worker.participant import Participant, describe_device
from codistill_worker.training.checkpoints import Checkpoint, CheckpointStore, newest
from codistill_worker.training.trainer import StepLoss, Trainer, divergence_error
from codistill_worker.training.trial import try_training
from codistill_worker.training.users_errors import model_title, running

__all__ = ["StudentLoop"]

_log = logging.getLogger(__name__)


@dataclass
class _Sums:
    """Sums over the training steps since the last measurement; kept on the device, read when reported."""

    correct: torch.Tensor | None = None
    samples: int = 0
    steps: int = 0
    cross_entropy: torch.Tensor | None = None
    distillation: torch.Tensor | None = None

    def add(self, step: StepLoss) -> None:
        self.correct = step.correct if self.correct is None else self.correct + step.correct
        self.cross_entropy = _added(self.cross_entropy, step.cross_entropy)
        if step.distillation is not None:
            self.distillation = _added(self.distillation, step.distillation)
        self.samples += step.samples
        self.steps += 1


@dataclass
class _Pace:
    """Times of the steps since the last report, in seconds."""

    steps: list[float] = field(default_factory=list[float])
    waits: list[float] = field(default_factory=list[float])


class StudentLoop:
    """One student's way through a run.

    Args:
        experiment: the run's experiment.
        plan: the student's settings.
        dataset: the run's data.
        device: where the student is trained.
        transport: carries its outputs, its targets and its reports.
        store: of its checkpoints.
        clock: seconds that never go back.
        watchdog: ends the process if a step hangs.

    Raises:
        ConfigurationError: model, data or checkpoint cannot be used.
    """

    def __init__(
        self,
        experiment: Experiment,
        plan: StudentPlan,
        dataset: Dataset,
        device: torch.device,
        transport: Transport,
        store: CheckpointStore,
        clock: Callable[[], float] = time.monotonic,
        watchdog: Watchdog | None = None,
    ) -> None:
        check_batch(dataset, plan.training.batch_size)
        if newest(store.folder) is None:
            try_training(experiment, plan, dataset, device)
        self._model_title = model_title(experiment, plan.student)
        with running(f"{self._model_title} cannot be built again"):
            self.trainer = Trainer(experiment, plan, dataset, device)
        self._participant = Participant(
            plan.student.name,
            "student",
            experiment,
            plan.training,
            self.trainer.steps_per_epoch,
            transport,
            clock,
            watchdog,
        )
        self._plan = plan
        self._dataset = dataset
        self._store = store
        self._clock = clock
        self._sums = _Sums()
        self._pace = _Pace()
        self._best = -1.0
        self._saved_at = clock()
        self._saved_step = -1
        self._unsaved: OSError | None = None
        self._step_started: float | None = None
        with running(f"{self._model_title} cannot be restored from its checkpoint"):
            self._resume()

    @property
    def title(self) -> str:
        """The student's name for people: "student 'a'"."""
        return f"student {self.trainer.student!r}"

    @property
    def step(self) -> int:
        """The next step to train."""
        return self.trainer.step

    @property
    def done(self) -> bool:
        """Whether all steps are trained."""
        return self.step >= self.trainer.total_steps

    def errors(self) -> AbstractContextManager[None]:
        """Return the context of the student's steps, in which errors of its device get their exit codes."""
        return participants_errors(self.title, self.trainer.device, lambda: self.step)

    def join(self) -> None:
        """Open the session with the run.

        Raises:
            PeerError: the run cannot be reached, or rejects this student.
        """
        trainer = self.trainer
        response = self._participant.join(
            self._dataset,
            trainer.shapes,
            trainer.device,
            first_step=trainer.step,
            total_steps=trainer.total_steps,
            parameters=trainer.parameters,
        )
        _log.info(
            "student %s (%s, %s parameters) joined run %s on %s at step %d of %d",
            trainer.student,
            self._plan.student.model,
            f"{trainer.parameters:,}",
            response.run,
            describe_device(trainer.device),
            trainer.step,
            trainer.total_steps,
        )

    def launch_step(self) -> None:
        """Start the forward pass of the next step; a GPU computes it while the caller goes on."""
        self._step_started = self._clock()
        self._mark("the forward pass")
        with self._running("the forward pass"):
            self.trainer.launch()

    def begin_step(self) -> None:
        """Run the forward pass of the next step, unless it is launched, and publish the outputs that the method needs."""
        if not self.trainer.launched:
            self.launch_step()
        with self._running("the forward pass"):
            published = self.trainer.begin()
        if published is not None:
            self._participant.publish(published)

    def end_step(self) -> None:
        """Wait for the targets, if the step exchanges, and learn from them; measure, save and report where due."""
        self.trainer.prepare()
        waited = 0.0
        targets: dict[str, torch.Tensor] = {}
        if self.trainer.exchanges:
            began = self._clock()
            received = self._participant.receive("waiting for the targets", self.trainer.step)
            waited = self._clock() - began
            targets = {name: decode(value, f"targets.{name}") for name, value in received.targets.items()}
        self._mark("the backward pass")
        with self._running("the backward pass"):
            self._sums.add(self.trainer.finish(targets))
        if self._step_started is not None:
            self._pace.steps.append(self._clock() - self._step_started)
            self._pace.waits.append(waited)
        self._after_step()

    def finish(self) -> None:
        """Save the trained student, and leave as finished.

        Raises:
            PeerError: it cannot be saved, or the server cannot be reached.
            StorageError: the folder of its checkpoints is gone.
        """
        self._save()
        if self._unsaved is not None:
            # If it left as finished, the server would drop the rounds that are needed to train it again.
            raise PeerError(
                f"student {self.trainer.student!r} is trained, but cannot be saved to {self._store.folder}: "
                f"{explain(self._unsaved, self._store.folder)}; free disk space or check the folder's permissions, then "
                "resume the run",
                ExitCode.STORAGE if outlasts_restarts(self._unsaved) else ExitCode.ERROR,
            ) from self._unsaved
        self._report()
        self._leave(pb.LEAVE_REASON_FINISHED, f"trained {self.trainer.step} steps")

    def stop(self) -> None:
        """Save the student between two steps and leave; a later worker can resume here."""
        self.keep()
        self._report()
        self._leave(pb.LEAVE_REASON_STOPPED, f"stopped after {self.trainer.step} steps")

    def fail(self, message: str) -> None:
        """Leave because of an error; the last checkpoint stays as it is."""
        self._leave(pb.LEAVE_REASON_FAILED, message)

    def keep(self) -> None:
        """Save the student in its state before the current step."""
        self.trainer.abandon()
        self._save()

    def _mark(self, activity: str) -> None:
        self._participant.mark(activity, self.trainer.step)

    def _running(self, activity: str) -> AbstractContextManager[None]:
        """Return a context of the model's code, whose errors name the model's field, the activity and the step."""
        return running(f"{self._model_title} failed in {activity}, step {self.trainer.step}")

    def _leave(self, reason: pb.LeaveReason.ValueType, message: str) -> None:
        self._participant.leave(reason, message, self.trainer.step)

    def _resume(self) -> None:
        self._store.check()  # from now on it is the folder that the run began with
        checkpoint = self._store.load(self.trainer.student, self._participant.identity)
        if checkpoint is None:
            return
        try:
            self.trainer.restore(checkpoint.step, checkpoint.model, checkpoint.optimizer, checkpoint.extra)
        except (RuntimeError, ValueError, KeyError) as error:
            if is_devices_fault(error):
                raise
            why = " ".join(str(error).split())
            raise ConfigurationError(
                f"the checkpoint in {self._store.folder} does not fit model {self._plan.student.model!r}: {why}; was the "
                "model's code changed? choose another run folder"
            ) from error
        for measurement in checkpoint.progress["measurements"]:
            self._participant.measurements.append(pb.Measurement(**measurement))
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
        self._saved_step = checkpoint.step
        _log.info("student %s resumes from its checkpoint at step %d", self.trainer.student, checkpoint.step)

    def _after_step(self) -> None:
        trainer, training = self.trainer, self._plan.training
        epochs, rest = divmod(trainer.step, trainer.steps_per_epoch)
        if rest == 0:
            self._measure_training()
            if epochs % training.evaluate_every == 0 or self.done:
                self._evaluate()
        now = self._clock()
        if now - self._saved_at >= training.checkpoint_every and not self.done:
            self._save()
        if self._participant.report_due(now):
            self._store.check()
            self._report()

    def _measure_training(self) -> None:
        sums, self._sums = self._sums, _Sums()
        if sums.correct is None or sums.cross_entropy is None:
            return
        loss = float(sums.cross_entropy) / sums.steps
        if not math.isfinite(loss):
            raise divergence_error(self.trainer.student, self.trainer.step, f"its loss is {loss}")
        self._participant.measurements.append(
            pb.Measurement(
                split=pb.SPLIT_TRAIN,
                steps_trained=self.trainer.step,
                accuracy=int(sums.correct) / sums.samples,
                loss=loss,
                distillation_loss=None if sums.distillation is None else float(sums.distillation) / sums.steps,
            )
        )

    def _evaluate(self) -> None:
        with self._running("the evaluation"):
            score = self.trainer.evaluate(self._dataset.test, lambda: self._mark("an evaluation"))
        self._participant.measurements.append(
            pb.Measurement(
                split=pb.SPLIT_TEST, steps_trained=self.trainer.step, accuracy=score.accuracy, loss=score.loss
            )
        )
        _log.info(
            "student %s: epoch %d, test accuracy %.2f %%, loss %.4f",
            self.trainer.student,
            self.trainer.step // self.trainer.steps_per_epoch,
            100 * score.accuracy,
            score.loss,
        )
        if score.accuracy > self._best:
            self._best = score.accuracy
            try:
                with self._running("saving its best weights"):
                    self._store.save_best(self._checkpoint(with_optimizer=False))
            except OSError as error:
                self._log_unsaved("best weights", error)

    def _save(self) -> None:
        self._saved_at = self._clock()
        if self._saved_step == self.trainer.step and self._store.holds_newest:
            return
        self._mark("saving a checkpoint")
        try:
            with self._running("saving its checkpoint"):
                self._store.save(self._checkpoint(with_optimizer=True))
        except OSError as error:
            self._log_unsaved("checkpoint", error)
            self._unsaved = error
            return
        self._saved_step = self.trainer.step
        self._unsaved = None

    def _log_unsaved(self, content: str, error: OSError) -> None:
        _log.error(
            "%s of student %s at step %d cannot be written to %s: %s; what was saved before stays%s",
            content,
            self.trainer.student,
            self.trainer.step,
            self._store.folder,
            error.strerror or error,
            detail(error, self._store.folder),
        )

    def _checkpoint(self, *, with_optimizer: bool) -> Checkpoint:
        sums = self._sums
        progress: dict[str, Any] = {
            "best": self._best,
            # A worker that resumes here does not measure again what the server may not have yet.
            "measurements": [
                {descriptor.name: value for descriptor, value in measurement.ListFields()}
                for measurement in self._participant.undelivered()
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
            identity=self._participant.identity,
            step=self.trainer.step,
            model=self.trainer.model.state_dict(),
            extra=self.trainer.extra.state_dict(),
            optimizer=self.trainer.optimizer_state() if with_optimizer else {},
            progress=progress,
        )

    def _report(self) -> None:
        pace, self._pace = self._pace, _Pace()
        self._participant.report(
            self.trainer.step,
            self._store.durable_step,
            step_seconds=statistics.median(pace.steps) if pace.steps else None,
            wait_seconds=statistics.median(pace.waits) if pace.waits else None,
        )


def _added(total: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    return value.double() if total is None else total + value.double()
