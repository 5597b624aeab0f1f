"""A student's score: by hand, and without effect on its training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from codistill_worker.data import augmentation
from worker.support import STUDENTS, MakeStudent, Same, State, Tiny, Train


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", STUDENTS)
def test_evaluation_has_no_effect_on_training(
    name: str, tiny: Tiny, student: MakeStudent, train: Train, state: State, same: Same
) -> None:
    experiment = tiny()
    plain, measured = student(experiment, name), student(experiment, name)
    augmentation._affine.cache_clear()  # what evaluation caches, training uses
    test = measured._dataset.test
    for _ in range(5):
        measured.evaluate(test)
        measured.prepare()
        measured.evaluate(test)
        train(measured, 1)
        train(plain, 1)
    assert same(state(plain), state(measured))


def test_evaluation_by_hand(tiny: Tiny, student: MakeStudent, train: Train) -> None:
    trainer = student(tiny())
    train(trainer, 3)
    split, dataset = trainer._dataset.test, trainer._dataset
    score = trainer.evaluate(split)
    images = augmentation.normalise(split.images(torch.arange(len(split))), dataset.mean, dataset.std)
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(images).double()
    assert score.accuracy == pytest.approx((logits.argmax(-1) == split.labels).double().mean().item())
    assert score.loss == pytest.approx(nn.functional.cross_entropy(logits, split.labels).item(), rel=1e-5)
    assert trainer.evaluate(split) == score
