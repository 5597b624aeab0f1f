"""What is found wrong with an experiment before anything is started."""

from __future__ import annotations

import pytest
import torch

from codistill.experiment import Experiment, parse
from codistill_deploy.preflight import check
from codistill_worker.errors import ConfigurationError


def experiment(model: str = "cnn", device: str = "cpu") -> Experiment:
    return parse(
        "name: tiny\n"
        "data: {dataset: digits}\n"
        "training: {epochs: 1}\n"
        "students:\n"
        "  - {name: a, model: mlp}\n"
        f"  - {{name: b, model: '{model}', training: {{device: '{device}'}}}}\n"
    )


@pytest.mark.parametrize("model", ["cnn", "resnet20", "torchvision:resnet18", "timm:resnet10t", "torch.nn:Linear"])
def test_an_experiment_that_can_be_run(model: str) -> None:
    check(experiment(model))


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("resnet19", "there is no model 'resnet19'"),
        ("torchvision:resnet19", "torchvision has no classifier 'resnet19'"),
        ("timm:resnet19", "resnet19"),
        ("nowhere_at_all:build", "nowhere_at_all"),
    ],
)
def test_a_model_that_is_not_there(model: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        check(experiment(model))


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigurationError, match=r"training\.device: 'cuda:3', but PyTorch finds no GPU here"):
        check(experiment(device="cuda:3"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigurationError, match=r"training\.device: 'cuda:3', but there are 2 GPUs"):
        check(experiment(device="cuda:3"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check(experiment(device="cuda:3"))
