"""A tiny experiment, its data and its students, and comparison to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest
import torch
import yaml

from codistill.config.data import Data
from codistill.config.experiment import Experiment, parse
from codistill_worker import data
from codistill_worker.training.outputs import Published
from codistill_worker.training.trainer import Trainer

Tiny = Callable[..., Experiment]
MakeStudent = Callable[..., Trainer]
Train = Callable[[Trainer, int], list[torch.Tensor]]
State = Callable[[Trainer], dict[str, Any]]
Same = Callable[[Any, Any], bool]
Answer = Callable[[Any], dict[str, torch.Tensor]]

STUDENTS = ["cnn", "mlp"]  # batch normalisation and SGD's momentum; AdamW; both with dropout
CPU = torch.device("cpu")


DOCUMENT: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "data": {"dataset": "digits", "train_size": 48, "test_size": 30, "augment": {"crop_padding": 1, "flip": True}},
    "training": {
        "epochs": 3,
        "batch_size": 16,
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
        "schedule": {"name": "cosine", "warmup_epochs": 0.5},
        "evaluation_batch_size": 13,
        "checkpoint_every": 1000,
    },
    "exchange": {"connect_timeout": 20, "give_up_after": 20, "waiting_notice": 0.3},
    "students": [
        {"name": "cnn", "model": "cnn", "model_args": {"width": 4, "dropout": 0.3}},
        {
            "name": "mlp",
            "model": "mlp",
            "model_args": {"hidden": 16, "dropout": 0.3},
            "training": {"optimizer": {"name": "adamw", "lr": 0.01}},
        },
    ],
}


def build(**changes: Any) -> Experiment:
    """Return the tiny experiment with changes; `section__key` names a key inside a section."""
    document = yaml.safe_load(yaml.safe_dump(DOCUMENT))
    for key, value in changes.items():
        *path, last = key.split("__")
        section = document
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return parse(yaml.safe_dump(document))


_LOADED: dict[Data, data.Dataset] = {}


def load(settings: Data) -> data.Dataset:
    """Return a data set, loaded once for all tests; nothing in it ever changes."""
    if settings not in _LOADED:
        _LOADED[settings] = data.load(settings, CPU)
    return _LOADED[settings]


def students(experiment: Experiment, name: str = "cnn") -> Trainer:
    plan = experiment.plan(name)
    return Trainer(experiment, plan, load(plan.data), CPU)


def answer(published: Published | None) -> Mapping[str, torch.Tensor]:
    """Return targets that follow from what was published, for a method of one shared target; {} if nothing was."""
    return {} if published is None else {"logits": published.batch.arrays["logits"].roll(1, 0) * 0.5}


def run(trainer: Trainer, steps: int) -> list[torch.Tensor]:
    """Train some steps; return the logits of each."""
    seen: list[torch.Tensor] = []
    for _ in range(steps):
        published = trainer.begin()
        if published is not None:
            seen.append(published.batch.arrays["logits"].clone())
        trainer.finish(answer(published))
    return seen


def snapshot(trainer: Trainer) -> dict[str, Any]:
    """Return a copy of everything that training changes."""
    return cast(
        "dict[str, Any]",
        _copy({"step": trainer.step, "model": trainer.model.state_dict(), "optimizer": trainer.optimizer_state()}),
    )


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in cast("list[Any]", value)]
    return value


def equal(left: Any, right: Any) -> bool:
    """Whether two nested values are the same, tensors to the bit and the dtype."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype is right.dtype and torch.equal(left, right)
    if isinstance(left, Mapping):
        ours, theirs = cast("Mapping[Any, Any]", left), cast("Mapping[Any, Any]", right)
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours)
    if isinstance(left, list | tuple):
        ours, theirs = cast("list[Any]", left), cast("list[Any]", right)
        return len(ours) == len(theirs) and all(equal(one, other) for one, other in zip(ours, theirs, strict=True))
    return bool(left == right)


@pytest.fixture
def tiny() -> Callable[..., Experiment]:
    return build


@pytest.fixture
def load_data() -> Callable[[Data], data.Dataset]:
    return load


@pytest.fixture
def student() -> Callable[..., Trainer]:
    return students


@pytest.fixture
def train() -> Callable[[Trainer, int], list[torch.Tensor]]:
    return run


@pytest.fixture
def targets_for() -> Callable[[Published | None], Mapping[str, torch.Tensor]]:
    return answer


@pytest.fixture
def state() -> Callable[[Trainer], dict[str, Any]]:
    return snapshot


@pytest.fixture
def same() -> Callable[[Any, Any], bool]:
    return equal
