"""The checks of an experiment before any process is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from codistill.config.experiment import Experiment, ExperimentError, parse
from codistill_deploy.launch.preflight import check


def experiment(
    model: str = "cnn", device: str = "cpu", data: dict[str, Any] | None = None, args: str = "{}"
) -> Experiment:
    return parse(
        "name: tiny\n"
        f"data: {json.dumps(data or {'dataset': 'digits'})}\n"
        "training: {epochs: 1}\n"
        "students:\n"
        "  - {name: a, model: mlp}\n"
        f"  - {{name: b, model: '{model}', model_args: {args}, training: {{device: '{device}'}}}}\n"
    )


def problems(wrong: Experiment) -> list[str]:
    with pytest.raises(ExperimentError) as caught:
        check(wrong, "my.yaml")
    assert caught.value.source == "my.yaml"
    return caught.value.problems


@pytest.mark.parametrize("model", ["cnn", "resnet20", "torchvision:resnet18", "timm:resnet10t", "torch.nn:Linear"])
def test_an_experiment_that_can_be_run(model: str) -> None:
    check(experiment(model))


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("resnet19", "students.1.model: there is no model 'resnet19'; did you mean 'resnet"),
        ("torchvision:resnet19", "students.1.model: torchvision has no classifier 'resnet19'; did you mean 'resnet"),
        ("timm:resnet19", "students.1.model: timm has no model 'resnet19'"),
        ("nowhere_at_all:build", "students.1.model: 'nowhere_at_all:build': there is no module 'nowhere_at_all'"),
    ],
)
def test_a_model_that_is_not_there(model: str, text: str) -> None:
    (problem,) = problems(experiment(model))
    assert problem.startswith(text)
    assert len(problem) < 400, "a catalogue is cut"


@pytest.mark.parametrize("model", ["cnn", "torch.nn:Flatten"])
def test_an_argument_that_a_model_has_not(model: str) -> None:
    (problem,) = problems(experiment(model, args="{nothing_of_the_kind: 3}"))
    assert problem.startswith("students.1.model_args.nothing_of_the_kind: is not an argument of this model")


def test_data_that_is_not_there(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    (problem,) = problems(experiment(data={"dataset": "mnist", "root": nowhere}))
    assert problem.startswith(f"data.root: {nowhere}: there is no such folder; set data.download: true")
    check(experiment(data={"dataset": "mnist", "root": nowhere, "download": True}))

    folder = {"dataset": "image_folder", "root": str(tmp_path), "classes": 2, "image_size": 8}
    (problem,) = problems(experiment(data=folder))
    assert problem.startswith(f"data.root: {tmp_path}: has no folder train")
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    check(experiment(data=folder))

    (problem,) = problems(experiment(data={"dataset": "nowhere_at_all:load", "classes": 2}))
    assert problem.startswith("data.dataset: 'nowhere_at_all:load': there is no module 'nowhere_at_all'")


def test_each_problem_is_a_line(tmp_path: Path) -> None:
    wrong = experiment("resnet19", data={"dataset": "mnist", "root": str(tmp_path / "nowhere")})
    assert [problem.partition(":")[0] for problem in problems(wrong)] == ["data.root", "students.1.model"]


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (problem,) = problems(experiment(device="cuda:3"))
    assert problem.startswith("students.1.training.device: 'cuda:3', but PyTorch finds no GPU here")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    (problem,) = problems(experiment(device="cuda:3"))
    assert problem.startswith("students.1.training.device: 'cuda:3', but there are 2 GPUs")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check(experiment(device="cuda:3"))


def test_where_students_train_elsewhere_devices_and_data_are_not_looked_for() -> None:
    check(experiment(device="cuda:99", data={"dataset": "cifar10", "root": "/nowhere"}), here=False)
    with pytest.raises(ExperimentError, match=r"students\.1\.model"):
        check(experiment(model="nothing"), here=False)
