"""One student's step: held-out samples, a forward pass that is launched early, and models that are odd."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from codistill.config.experiment import Experiment
from codistill.peer.errors import PeerError
from codistill.process.exit_codes import ExitCode
from worker.support import STUDENTS, Answer, MakeStudent, Same, State, Tiny, Train


class Odd(nn.Module):
    """A model of a user's: a buffer that the forward pass replaces, and logits that a test spoils."""

    mean: torch.Tensor

    def __init__(self, classes: int, channels: int, size: int, spoil: str = "nothing") -> None:
        super().__init__()
        self.layer = nn.Linear(channels * size * size, classes)
        self.register_buffer("mean", torch.zeros(()))
        self.spoil = spoil
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layer(images.flatten(1))
        if self.training:
            self.calls += 1
            self.mean = 0.9 * self.mean + 0.1 * logits.detach().mean()
        spoiled = (self.spoil == "training" and self.training and self.calls > 2) or (
            self.spoil == "evaluation" and not self.training and self.calls > 0
        )
        return logits * float("nan") if spoiled else logits


@pytest.fixture(autouse=True)
def odd(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("odd_models")
    setattr(module, Odd.__name__, Odd)
    monkeypatch.setitem(sys.modules, "odd_models", module)
    return "odd_models:Odd"


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- abandoning


def test_a_buffer_that_the_model_replaces_is_restored_too(
    odd: str, tiny: Tiny, student: MakeStudent, train: Train, state: State, same: Same
) -> None:
    trainer = student(tiny(students=[{"name": "cnn", "model": odd}, {"name": "b", "model": "mlp"}]))
    train(trainer, 2)
    before = state(trainer)
    trainer.begin()
    assert not same(state(trainer), before)
    trainer.abandon()
    assert same(state(trainer), before)


# --- held-out samples


def general(tiny: Tiny, **changes: Any) -> Experiment:
    return tiny(
        data__train_size=68, data__held_out=20, distillation={"method": "kdcl", "ensemble": "general"}, **changes
    )


def test_held_out_samples_are_published_at_the_first_step_of_each_epoch_but_the_first(
    tiny: Tiny, student: MakeStudent, targets_for: Answer, state: State
) -> None:
    trainer = student(general(tiny))
    split = trainer._dataset.held_out
    assert split is not None
    at: list[int] = []
    for _ in range(trainer.total_steps):
        trainer.prepare()
        weights = state(trainer)["model"]
        published = trainer.begin()
        assert published is not None
        if published.held_out is not None:
            at.append(published.step)
            assert published.held_out.ids.tolist() == list(range(20))
            assert torch.equal(published.held_out.labels, split.labels)
            reference = student(general(tiny))
            reference.restore(0, weights, reference.optimizer_state())
            reference.model.eval()
            assert published.held_out.arrays["logits"].shape == (20, 10)
            expected = reference._held_out().arrays["logits"]
            assert torch.equal(published.held_out.arrays["logits"], expected), (
                "of the weights before the step, no dropout"
            )
        trainer.finish(targets_for(published))
    assert at == [3, 6]


def test_a_step_may_be_launched_long_before_it_is_begun(
    tiny: Tiny, student: MakeStudent, targets_for: Answer, train: Train, state: State, same: Same
) -> None:
    """Two students whose forward passes are launched together train as they do one after the other."""
    launched = {name: student(general(tiny), name) for name in STUDENTS}
    for _ in range(9):
        for trainer in launched.values():
            trainer.launch()
            assert trainer.launched
        with pytest.raises(RuntimeError, match="is begun already"):
            trainer.launch()
        for trainer in launched.values():
            published = trainer.begin()
            assert not trainer.launched
            trainer.finish(targets_for(published))
    for name, trainer in launched.items():
        alone = student(general(tiny), name)
        train(alone, 9)
        assert same(state(trainer), state(alone))
        trainer.abandon()


def test_a_step_that_is_launched_only_is_undone_too(tiny: Tiny, student: MakeStudent, state: State, same: Same) -> None:
    trainer = student(tiny())
    before = state(trainer)
    trainer.launch()
    trainer.abandon()
    assert not trainer.launched
    assert same(state(trainer), before)
    assert trainer.begin() is not None


def test_measuring_held_out_samples_disturbs_neither_statistics_nor_dropout(
    tiny: Tiny, student: MakeStudent, train: Train, state: State, same: Same
) -> None:
    measuring = student(general(tiny))
    plain = student(tiny(data__train_size=68, data__held_out=20, distillation={"method": "kdcl"}))
    assert same(train(measuring, 9), train(plain, 9))
    assert same(state(measuring), state(plain))


# --- divergence


def test_logits_that_are_not_finite_end_the_student(odd: str, tiny: Tiny, student: MakeStudent, train: Train) -> None:
    bad = {"name": "bad", "model": odd, "model_args": {"spoil": "training"}}
    trainer = student(tiny(students=[bad, {"name": "b", "model": "mlp"}]), "bad")
    train(trainer, 2)
    with pytest.raises(PeerError, match=r"student 'bad' has diverged in step 2: .*training\.optimizer\.lr") as ended:
        trainer.begin()
    assert ended.value.code is ExitCode.DIVERGED
    trainer.abandon()
    assert trainer.step == 2


def test_a_loss_that_is_not_finite_ends_the_student(odd: str, tiny: Tiny, student: MakeStudent, train: Train) -> None:
    bad = {"name": "bad", "model": odd, "model_args": {"spoil": "evaluation"}}
    trainer = student(tiny(students=[bad, {"name": "b", "model": "mlp"}]), "bad")
    trainer.evaluate(trainer._dataset.test)
    train(trainer, 1)
    with pytest.raises(PeerError, match="student 'bad' has diverged in step 1: its loss is nan") as ended:
        trainer.evaluate(trainer._dataset.test)
    assert ended.value.code is ExitCode.DIVERGED
