"""The optimiser's groups, and the learning rate of each step."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codistill.config.training import Schedule
from codistill_worker.training.optim import learning_rate
from worker.support import STUDENTS, Answer, MakeStudent, Tiny


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("name", STUDENTS)
def test_norms_and_biases_decay_if_asked_to(name: str, everything: bool, tiny: Tiny, student: MakeStudent) -> None:
    """With no gradient at all, only decay moves a weight."""
    trainer = student(
        tiny(
            training__optimizer={"name": "sgd", "lr": 0.5, "weight_decay": 0.1, "decay_norm_and_bias": everything},
            training__schedule={"name": "constant"},
        ),
        name,
    )
    for value in trainer.model.parameters():
        value.data.fill_(1.0)
        value.grad = torch.zeros_like(value)
    for group in trainer._optimizer.param_groups:
        group["lr"] = 0.5
    trainer._optimizer.step()
    for label, value in trainer.model.named_parameters():
        decayed = value.ndim > 1 or everything
        assert bool((value < 1).all()) == decayed, label
    groups = trainer.optimizer_state()["param_groups"]
    assert sum(len(group["params"]) for group in groups) == len(list(trainer.model.parameters()))


def test_the_learning_rate_that_the_optimiser_gets(tiny: Tiny, student: MakeStudent, targets_for: Answer) -> None:
    experiment = tiny(training__optimizer={"name": "sgd", "lr": 0.2})
    trainer = student(experiment)
    for number in range(trainer.total_steps):
        trainer.finish(targets_for(trainer.begin()))
        rates = {group["lr"] for group in trainer.optimizer_state()["param_groups"]}
        assert rates == {learning_rate(0.2, experiment.training.schedule, number, 3, 3)}


def rates(schedule: Schedule, steps_per_epoch: int = 10, epochs: int = 4) -> list[float]:
    return [learning_rate(0.5, schedule, each, steps_per_epoch, epochs) for each in range(steps_per_epoch * epochs)]


def test_constant() -> None:
    assert rates(Schedule(name="constant")) == [0.5] * 40


def test_warm_up_rises_evenly_from_zero_to_the_peak() -> None:
    course = rates(Schedule(name="constant", warmup_epochs=0.9))
    assert course[:9] == pytest.approx([0.05 * each for each in range(1, 10)])
    assert course[9:] == [0.5] * 31


def test_cosine() -> None:
    course = rates(Schedule(name="cosine", warmup_epochs=1, min_lr=0.1))
    assert course[:10] == pytest.approx([0.5 * each / 11 for each in range(1, 11)])
    assert course[10] == pytest.approx(0.5), "the peak right after the warm-up"
    assert course[25] == pytest.approx(0.3), "half way the mean of both ends"
    assert learning_rate(0.5, Schedule(min_lr=0.1, warmup_epochs=1), 40, 10, 4) == pytest.approx(0.1)
    assert 0.1 < course[-1] < 0.102
    assert all(left > right for left, right in itertools.pairwise(course[10:]))


def test_steps() -> None:
    course = rates(Schedule(name="steps", milestones=(1, 2.5), gamma=0.1))
    assert course == pytest.approx([0.5] * 10 + [0.05] * 15 + [0.005] * 15)
    shuffled = rates(Schedule(name="steps", milestones=(2.5, 1), gamma=0.1))
    assert shuffled == course


@given(
    st.sampled_from(["constant", "cosine", "steps"]),
    st.floats(0, 10),
    st.floats(0, 0.1),
    st.integers(1, 50),
    st.integers(1, 8),
)
def test_rates_lie_between_zero_and_the_peak(
    name: Any, warmup: float, low: float, steps_per_epoch: int, epochs: int
) -> None:
    schedule = Schedule(name=name, warmup_epochs=warmup, min_lr=low, milestones=(0.5, 3))
    for rate in rates(schedule, steps_per_epoch, epochs):
        assert 0 < rate <= 0.5 * (1 + 1e-12)
