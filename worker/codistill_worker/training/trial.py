"""One training step and one save before a student joins its run, to find the errors that only training meets.

The trial has a trainer of its own, which is dropped before the student is built. So nothing of it is left in the student,
and no memory is needed for two. It trains on the student's first batch, with targets of the right shapes that mean nothing.

The step is then repeated from a checkpoint. A checkpoint that does not hold everything shows in other numbers.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from codistill.config.experiment import Experiment
from codistill.config.plans import StudentPlan
from codistill.peer.errors import PeerError
from codistill.peer.order import Order
from codistill.process.exit_codes import ExitCode
from codistill.process.randomness import seeded
from codistill.wire.tensors import decode, encode
from codistill_worker.data import Dataset, MemorySplit
from codistill_worker.errors import ConfigurationError
from codistill_worker.methods.stand_ins import stand_in_targets
from codistill_worker.training.checkpoints import Checkpoint, serialize
from codistill_worker.training.devices import autocast, set_threads
from codistill_worker.training.outputs import check_output, image_shape, teacher_shapes
from codistill_worker.training.trainer import Trainer
from codistill_worker.training.unsaved import digest, unsaved_state
from codistill_worker.training.users_errors import explained, model_field

__all__ = ["try_training"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _State:
    """Digests of a student after a step: of what a checkpoint holds and the student's score, and of everything else."""

    saved: str
    unsaved: Mapping[str, str]


def try_training(experiment: Experiment, plan: StudentPlan, dataset: Dataset, device: torch.device) -> None:
    """Train a copy of a student for a step, save it, and repeat the step from what was saved.

    The global generators of the CPU stay as they were. A student that diverges meanwhile is left to the run, which says so.

    Args:
        experiment: the run's experiment.
        plan: the student's settings.
        dataset: the run's data.
        device: where the student will be trained.

    Raises:
        ConfigurationError: the student cannot be trained or saved, or a step from a checkpoint is another step. The text
            names the student and, where there is one, the user's line.
    """
    student = plan.student
    where = model_field(experiment, student.name)
    batch = _first_batch(experiment, plan, dataset)
    try:
        with seeded(0), explained(f"{where} cannot train a step on a batch of {plan.training.batch_size}"):
            trainer = Trainer(experiment, plan, batch, device)
            _check_outputs(trainer, plan, batch, where)
            _check_steps(trainer, _targets(experiment, plan, batch, trainer), batch, where)
    except PeerError as error:
        if error.code is not ExitCode.DIVERGED:
            raise
        _log.debug("the trial step of student %s ended early: %s", student.name, error)
    finally:
        trainer = None
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def _first_batch(experiment: Experiment, plan: StudentPlan, dataset: Dataset) -> Dataset:
    """Return a data set of the student's first batch alone, in place of the training and the test samples."""
    ids = Order(experiment.seed, len(dataset.train), plan.training.batch_size).samples(0)
    images = dataset.train.images(ids)
    split = MemorySplit(images, dataset.train.labels[ids], images.device)
    return replace(dataset, train=split, test=split)


def _check_outputs(trainer: Trainer, plan: StudentPlan, batch: Dataset, where: str) -> None:
    """Reject a model that returns something else than its logits while it trains, or that has nothing to train."""
    if not trainer.parameters:
        raise ConfigurationError(
            f"{where} has nothing to train: none of its parameters has requires_grad; return a model with parameters"
        )
    images = batch.train.images(torch.arange(len(batch.train)))
    normalised = batch.normalise(images, channels_last=plan.training.channels_last)
    set_threads(plan.training)
    trainer.model.train()
    with torch.no_grad(), autocast(trainer.device, plan.training):
        logits = trainer.model(normalised)
    check_output("logits", logits, (len(batch.train), batch.classes), trainer.model)


def _check_steps(trainer: Trainer, targets: Mapping[str, torch.Tensor], batch: Dataset, where: str) -> None:
    """Train two steps; repeat the second from a checkpoint of the first, and compare."""
    trainer.begin()
    trainer.finish(targets)
    checkpoint = _checkpoint(trainer, where)
    trainer.step = 0  # there is one batch
    trainer.begin()
    trainer.finish(targets)
    undisturbed = _state(trainer, batch)
    with explained(f"{where} cannot be restored from its checkpoint"):
        trainer.restore(0, checkpoint.model, checkpoint.optimizer, checkpoint.extra)
    trainer.begin()
    trainer.abandon()
    trainer.begin()
    trainer.finish(targets)
    _compare(undisturbed, _state(trainer, batch), trainer.device, where)


def _checkpoint(trainer: Trainer, where: str) -> Checkpoint:
    """Return a copy on the CPU of all that a checkpoint holds, after serialising it once."""
    with explained(f"{where} cannot be saved"):
        states = {"model": trainer.model.state_dict(), "extra": trainer.extra.state_dict()}
    for state in states.values():
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                raise ConfigurationError(
                    f"{where} cannot be saved: {name!r} in its state_dict is a {type(value).__name__}; allowed are tensors: "
                    "let get_extra_state return a tensor, or keep the value in a buffer (register_buffer)"
                )
    copied: dict[str, Any] = {name: _copied(dict(state)) for name, state in states.items()}
    checkpoint = Checkpoint(
        student=trainer.student,
        identity="",
        step=trainer.step,
        progress={},
        optimizer=_copied(dict(trainer.optimizer_state())),
        **copied,
    )
    with explained(f"{where} cannot be saved"):
        serialize(checkpoint)
    return checkpoint


def _copied(value: Any) -> Any:
    """Return a copy of nested values, with tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value


def _state(trainer: Trainer, batch: Dataset) -> _State:
    saved = [dict(trainer.model.state_dict()), dict(trainer.extra.state_dict()), dict(trainer.optimizer_state())]
    objective = getattr(trainer.objective, "checked", trainer.objective)
    unsaved = unsaved_state(
        {"": trainer.model, "extra": trainer.extra}, {"network": objective.network}, {"objective": objective}
    )
    score = trainer.evaluate(batch.test)
    return _State(digest([*saved, score.accuracy, score.loss]), unsaved)


def _compare(undisturbed: _State, repeated: _State, device: torch.device, where: str) -> None:
    """Reject a student whose step from a checkpoint is not the step that it was.

    A GPU's kernels may give other bits each time. What differs there is a fault of the student only if it is a buffer, or if
    all that was saved is the same.
    """
    lost = [name for name, value in undisturbed.unsaved.items() if repeated.unsaved.get(name) != value]
    lost += [name for name in repeated.unsaved if name not in undisturbed.unsaved]
    same = undisturbed.saved == repeated.saved
    if not same and device.type != "cpu":
        lost = [name for name in lost if name.startswith("buffer")]
        if not lost:
            _log.warning("%s: the same step on %s gave other bits; a resumed run may end with others", where, device)
            return
    if lost:
        raise ConfigurationError(
            f"{where} cannot resume with the same numbers: {', '.join(lost)} changes while it trains, and no checkpoint "
            "holds it; keep it in a persistent buffer (register_buffer), and draw random numbers from torch, random or "
            "numpy.random themselves, which are seeded at each step"
        )
    if not same:
        raise ConfigurationError(
            f"{where} cannot resume with the same numbers: the same step from the same checkpoint gave other weights; let "
            "its numbers depend on its images, its parameters and its persistent buffers alone, and draw random ones from "
            "torch, random or numpy.random themselves, which are seeded at each step"
        )


def _targets(experiment: Experiment, plan: StudentPlan, batch: Dataset, trainer: Trainer) -> Mapping[str, torch.Tensor]:
    """Return targets that mean nothing, rounded as the wire rounds them."""
    targets = stand_in_targets(
        plan.distillation,
        trainer.student,
        experiment.names,
        experiment.teacher_names,
        batch.train.labels,
        batch.classes,
        trainer.shapes,
        partial(teacher_shapes, experiment, image_shape(batch)),
    )
    return {name: decode(encode(value, experiment.exchange.dtype), name) for name, value in targets.items()}
