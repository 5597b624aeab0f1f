"""The costs of a step of several students: one forward pass each, and nobody else's weights.

Both are mistakes of public implementations: 2·K² forward passes a step, and gradients that leak into another student.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from codistill.methods.aggregator import RoundInputs
from codistill_server.methods import create
from codistill_worker.methods import losses
from codistill_worker.training.outputs import Published
from codistill_worker.training.trainer import Trainer

MORE = {"cross_architecture": {"every": 1}}
STUDENTS = [{"name": name, "model": "mlp", "model_args": {"hidden": 8}} for name in ("a", "b", "c")]


class Counter:
    """Counts the forward passes of models: how often the first layer of each is called."""

    def __init__(self, *models: nn.Module) -> None:
        self.calls = 0
        for model in models:
            first = next(each for each in model.modules() if isinstance(each, nn.Linear))
            first.register_forward_hook(self._called)

    def _called(self, *_: Any) -> None:
        self.calls += 1


def wasteful_step(models: list[nn.Module], images: torch.Tensor) -> None:
    """Deep mutual learning as it should not be: every pair computes both of its sides again."""
    for own in models:
        for other in models:
            losses.distillation(own(images), target=other(images), temperature=1).backward()


def leaking_step(models: list[nn.Module], images: torch.Tensor) -> None:
    """As it should not be either: the target keeps its graph."""
    own, other = (model(images) for model in models[:2])
    losses.logit_regression(own - other, target=torch.zeros_like(own)).backward()


def one_pass_each(step: Callable[[], object], models: list[nn.Module]) -> bool:
    counter = Counter(*models)
    step()
    return counter.calls == len(models)


def begun(trainer: Trainer) -> Published:
    published = trainer.begin()
    assert published is not None
    return published


def others_are_left_alone(step: Callable[[], object], others: list[nn.Module]) -> bool:
    step()
    return all(parameter.grad is None for model in others for parameter in model.parameters())


def together(tiny: Any, student: Any, method: str) -> tuple[list[Trainer], Callable[[list[Published]], list[Any]]]:
    """Return the students' trainers, and what makes each one's targets of what all have published."""
    experiment = tiny(students=STUDENTS, distillation={"method": method, **MORE.get(method, {})})
    aggregator = create(experiment.distillation, experiment.names, ())
    assert aggregator is not None

    def targets(published: list[Published]) -> list[Any]:
        inputs = RoundInputs(
            students=experiment.names,
            outputs={name: torch.stack([each.batch.arrays[name] for each in published]) for name in aggregator.student},
            labels=published[0].batch.labels,
        )
        made = aggregator.targets(inputs)
        return [(made.each or {}).get(name, made.shared) for name in experiment.names]

    return [student(experiment, name) for name in experiment.names], targets


@pytest.mark.parametrize("method", ["dml", "kdcl", "cross_architecture", "dcm"])
def test_a_step_is_one_forward_pass_of_each_student(tiny: Any, student: Any, method: str) -> None:
    trainers, targets = together(tiny, student, method)

    def step_of_each_student() -> None:
        for trainer, given in zip(trainers, targets([begun(each) for each in trainers]), strict=True):
            trainer.finish(given)

    assert one_pass_each(step_of_each_student, [each.model for each in trainers])


@pytest.mark.parametrize("method", ["dml", "kdcl", "cross_architecture", "dcm"])
def test_a_step_moves_its_own_student_alone(tiny: Any, student: Any, method: str) -> None:
    trainers, targets = together(tiny, student, method)
    given = targets([begun(each) for each in trainers])
    assert not any(array.requires_grad for arrays in given for array in arrays.values())
    assert others_are_left_alone(lambda: trainers[0].finish(given[0]), [each.model for each in trainers[1:]])


def test_both_mistakes_would_be_found() -> None:
    models: list[nn.Module] = [nn.Linear(4, 3) for _ in range(3)]
    images = torch.ones(2, 4)
    counter = Counter(*models)
    wasteful_step(models, images)
    assert counter.calls == 2 * 3**2
    assert not one_pass_each(lambda: wasteful_step(models, images), models)
    fresh: list[nn.Module] = [nn.Linear(4, 3) for _ in range(2)]
    assert not others_are_left_alone(lambda: leaking_step(fresh, images), fresh[1:])
