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
from codistill.config.methods import Custom
from codistill.config.plans import StudentPlan
from codistill.peer.errors import PeerError
from codistill.peer.order import Order
from codistill.process import plugins
from codistill.process.exit_codes import ExitCode
from codistill.process.randomness import seeded
from codistill.process.unsaved import Unsaved, digest, unsaved_state
from codistill.wire.tensors import decode, encode
from codistill_worker.data import Dataset, MemorySplit
from codistill_worker.errors import ConfigurationError
from codistill_worker.methods.stand_ins import stand_in_targets
from codistill_worker.training.checkpoints import Checkpoint, serialize
from codistill_worker.training.devices import forward_pass, set_kernels
from codistill_worker.training.outputs import check_output, image_shape, teacher_shapes
from codistill_worker.training.trainer import Trainer
from codistill_worker.training.users_errors import explained, model_title, users_place

__all__ = ["try_training"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _State:
    """Digests of a student after a step: of what a checkpoint holds and the student's score, and of everything else."""

    saved: str
    unsaved: Unsaved


@dataclass(frozen=True)
class _Tried:
    """The traces of a student that trained two steps: its state as built, after each step, and the first one's checkpoint."""

    built: Mapping[str, str]
    checkpoint: Checkpoint
    undisturbed: _State
    targets: Mapping[str, torch.Tensor]


def try_training(experiment: Experiment, plan: StudentPlan, dataset: Dataset, device: torch.device) -> None:
    """Train a copy of a student for two steps; repeat the second from a checkpoint, in that copy and in a new one.

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
    where = model_title(experiment, plan.student)
    batch = _first_batch(experiment, plan, dataset)
    place = partial(_users_places, plan)
    try:
        with seeded(0), explained(f"{where} cannot train a step on a batch of {plan.training.batch_size}", place):
            tried = _try_copy(experiment, plan, batch, device, where)
            gc.collect()
            trainer = Trainer(experiment, plan, batch, device)
            _check_built(tried.built, _built(trainer), where)
            _restore(trainer, tried.checkpoint, plan, where)
            _train(trainer, tried.targets)
            resumed = _state(trainer, batch)
            _compare(tried.undisturbed, resumed, device, where)
            _warn_of_counters(tried.undisturbed, resumed, where)
    except PeerError as error:
        if error.code is not ExitCode.DIVERGED:
            raise
        _log.debug("the trial step of student %s ended early: %s", plan.student.name, error)
    finally:
        trainer = None
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def _first_batch(experiment: Experiment, plan: StudentPlan, dataset: Dataset) -> Dataset:
    """Return a data set of the student's first batch alone, in place of the training and the test samples."""
    ids = Order(experiment.seed, len(dataset.train), plan.training.batch_size).samples(0)
    images = dataset.train.images(ids)
    split = MemorySplit(images, dataset.train.labels[ids])
    return replace(dataset, train=split, test=split)


def _try_copy(experiment: Experiment, plan: StudentPlan, batch: Dataset, device: torch.device, where: str) -> _Tried:
    """Train two steps, and repeat the second in the same copy after a step that was abandoned."""
    trainer = Trainer(experiment, plan, batch, device)
    built, layout = _built(trainer), _layout(trainer)
    _check_generators(_unsaved(trainer), where)
    _check_outputs(trainer, plan, batch, where)
    targets = _targets(experiment, plan, batch, trainer)
    _train(trainer, targets)
    _check_layout(layout, _layout(trainer), where)
    checkpoint = _checkpoint(trainer, where)
    _train(trainer, targets)
    undisturbed = _state(trainer, batch)
    _check_layout(layout, _layout(trainer), where)
    _check_generators(undisturbed.unsaved, where)
    _restore(trainer, checkpoint, plan, where)
    trainer.begin()
    trainer.abandon()
    _train(trainer, targets)
    _compare(undisturbed, _state(trainer, batch), device, where)
    return _Tried(built, checkpoint, undisturbed, targets)


def _train(trainer: Trainer, targets: Mapping[str, torch.Tensor]) -> None:
    trainer.step = 0  # there is one batch
    trainer.begin()
    trainer.finish(targets)


def _restore(trainer: Trainer, checkpoint: Checkpoint, plan: StudentPlan, where: str) -> None:
    with explained(f"{where} cannot be restored from its checkpoint", partial(users_place, plan.student.model)):
        trainer.restore(0, checkpoint.model, checkpoint.optimizer, checkpoint.extra)


def _check_outputs(trainer: Trainer, plan: StudentPlan, batch: Dataset, where: str) -> None:
    """Reject a model that returns something else than its logits while it trains, or that has nothing to train."""
    if not trainer.parameters:
        raise ConfigurationError(
            f"{where} has nothing to train: none of its parameters has requires_grad; return a model with parameters"
        )
    images = batch.train.images(torch.arange(len(batch.train)))
    normalised = batch.normalise(images, channels_last=plan.training.channels_last)
    set_kernels(plan.training)
    trainer.model.train()
    with forward_pass(trainer.device, plan.training):
        logits = trainer.model(normalised)
    check_output("logits", logits, (len(batch.train), batch.classes), trainer.model, trains=True)


def _built(trainer: Trainer) -> dict[str, str]:
    """Return digests of a student that was just built, by the name for people."""
    states = {"": trainer.model.state_dict(), "extra.": trainer.extra.state_dict()}
    saved = {f"{prefix}{name}": value for prefix, state in states.items() for name, value in state.items()}
    held = _unsaved(trainer).held
    return {f"{name!r}": digest(value) for name, value in saved.items()} | {
        name: value for name, value in held.items() if name.startswith(("buffer", "attribute"))
    }


def _check_built(first: Mapping[str, str], second: Mapping[str, str], where: str) -> None:
    """Reject a model that has other values each time it is built with one seed."""
    differing = [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)]
    if differing:
        raise ConfigurationError(
            f"{where} begins with other numbers each time it is built: {plugins.shorten(sorted(differing))}; draw initial "
            "values from torch, random or numpy.random themselves, which are seeded, and keep no count of models built"
        )


def _layout(trainer: Trainer) -> dict[str, tuple[object, ...]]:
    """Return the type and shape of each entry that a checkpoint holds, and the identity of each parameter."""
    entries: dict[str, tuple[object, ...]] = {}
    for prefix, module in (("", trainer.model), ("extra.", trainer.extra)):
        for name, value in module.state_dict(keep_vars=True).items():
            is_tensor = isinstance(value, torch.Tensor)
            entries[prefix + name] = (value.dtype, list(value.shape)) if is_tensor else ()
        for name, parameter in module.named_parameters(remove_duplicate=False):
            entries[f"{prefix}{name} (parameter)"] = (id(parameter),)
    return entries


def _check_layout(before: Mapping[str, object], after: Mapping[str, object], where: str) -> None:
    """Reject a model whose forward pass makes or reshapes what a checkpoint holds: a new process could not load it."""
    names = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    changed = sorted({name.removesuffix(" (parameter)") for name in names})
    if changed:
        raise ConfigurationError(
            f"{where} makes, replaces or reshapes {plugins.shorten([repr(name) for name in changed])} in its forward pass: "
            "the optimizer would not train a parameter so made, and a resumed run could not load its checkpoint; make it in "
            "__init__, or run a dummy batch there; a buffer that depends on the batch needs persistent=False"
        )


def _check_generators(unsaved: Unsaved, where: str) -> None:
    """Reject a student that holds a generator of its own: a use after the second step would not show in a trial."""
    if unsaved.generators:
        held = ", ".join(f"{name} ({kind})" for name, kind in unsaved.generators.items())
        raise ConfigurationError(
            f"{where} cannot resume with the same numbers: it holds a generator of random numbers whose state no checkpoint "
            f"holds: {held}; draw random numbers from torch, random or numpy.random themselves, which are seeded at each step"
        )


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


def _unsaved(trainer: Trainer) -> Unsaved:
    objective = getattr(trainer.objective, "checked", trainer.objective)
    return unsaved_state(
        {"": trainer.model, "extra": trainer.extra}, {"network": objective.network}, {"objective": objective}
    )


def _state(trainer: Trainer, batch: Dataset) -> _State:
    saved = [dict(trainer.model.state_dict()), dict(trainer.extra.state_dict()), dict(trainer.optimizer_state())]
    unsaved = _unsaved(trainer)
    score = trainer.evaluate(batch.test)
    return _State(digest([*saved, score.accuracy, score.loss]), unsaved)


def _differing(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    return [name for name in {**first, **second} if first.get(name) != second.get(name)]


def _compare(undisturbed: _State, repeated: _State, device: torch.device, where: str) -> None:
    """Reject a student whose step from a checkpoint is not the step that it was.

    A GPU's kernels may give other bits each time. What differs there is a fault of the student only if it is a buffer, or if
    all that was saved is the same. Numbers and texts may count or measure; they are a fault if the weights differ too.
    """
    lost = _differing(undisturbed.unsaved.held, repeated.unsaved.held)
    same = undisturbed.saved == repeated.saved
    if not same and device.type != "cpu":
        lost = [name for name in lost if name.startswith("buffer")]
        if not lost:
            _log.warning("%s: the same step on %s gave other bits; a resumed run may end with others", where, device)
            return
    elif not same:
        counted = _differing(undisturbed.unsaved.plain, repeated.unsaved.plain)
        lost += [name for name in counted if name not in lost]
    if lost:
        raise ConfigurationError(
            f"{where} cannot resume with the same numbers: {plugins.shorten(lost)} changes while it trains, and no checkpoint "
            "holds it; keep it in a persistent buffer (register_buffer), and draw random numbers from torch, random or "
            "numpy.random themselves, which are seeded at each step"
        )
    if not same:
        raise ConfigurationError(
            f"{where} cannot resume with the same numbers: the same step from the same checkpoint gave other weights; let "
            "its numbers depend on its images, its parameters and its persistent buffers alone, and draw random ones from "
            "torch, random or numpy.random themselves, which are seeded at each step"
        )


def _warn_of_counters(undisturbed: _State, repeated: _State, where: str) -> None:
    """Name the numbers and texts that differ although the weights are the same."""
    plain = _differing(undisturbed.unsaved.plain, repeated.unsaved.plain)
    if plain:
        _log.warning(
            "%s: %s changes while it trains, and no checkpoint holds it: a resumed run begins it anew; if the weights ever "
            "depend on it, keep it in a persistent buffer (register_buffer)",
            where,
            plugins.shorten(plain),
        )


def _users_places(plan: StudentPlan) -> str:
    """Return where the user's model and method are written, for an error that no line of theirs raised."""
    settings = plan.distillation
    references = [plan.student.model, *([settings.worker] if isinstance(settings, Custom) else [])]
    return " or ".join(dict.fromkeys(place for place in map(users_place, references) if place))


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
