"""Exported students: the same logits, without this project."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from codistill.config.experiment import parse
from codistill.process.exit_codes import ExitCode
from codistill.v1 import distillation_pb2 as pb
from codistill_deploy.errors import CommandError
from codistill_deploy.export import Exported, _FromPixels, export
from codistill_deploy.launch.in_process import run_in_process
from codistill_deploy.run_folder import RunFolder
from codistill_worker import data, models
from codistill_worker.data import augmentation
from codistill_worker.errors import ConfigurationError
from codistill_worker.training.checkpoints import read

MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": 16, "dropout": 0.3},
    "cnn": {"width": 4},
    "vit": {},
    "resnet8": {},
}

# Run with -I: no environment, no current folder; and what would import the project is turned away all the same.
WITHOUT_THE_PROJECT = """
import importlib.abc, json, sys

class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0].startswith("codistill"):
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Without())
import torch

asked = json.load(sys.stdin)
answers = {}
for name, program in asked["programs"].items():
    model = torch.export.load(program).module()
    answers[name] = [model(torch.tensor(each, dtype=torch.uint8)).tolist() for each in asked["batches"]]
json.dump(answers, sys.stdout)
assert not any(name.startswith("codistill") for name in sys.modules), "it was imported before"
"""


class Quiet:
    """A view that shows nothing."""

    def start(self, title: str) -> None:
        pass

    def update(self, run: pb.Run) -> None:
        pass

    def offer(self, snapshot: Any) -> None:
        pass

    def note(self, line: str) -> None:
        pass

    def finish(self) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFolder]:
    """A short run of one student of each architecture."""
    document = {
        "name": "tiny",
        "data": {"dataset": "digits", "train_size": 64, "test_size": 40, "augment": {"flip": True}},
        "training": {"epochs": 3, "batch_size": 32, "optimizer": {"name": "adamw", "lr": 0.003}},
        "distillation": {"method": "independent"},
        "students": [{"name": f"a-{name}", "model": name, "model_args": args} for name, args in MODELS.items()],
    }
    experiment = parse(yaml.safe_dump(document))
    threads = torch.get_num_threads()
    made = RunFolder(tmp_path_factory.mktemp("export") / "run")
    made.start(experiment, mode="in-process", resume=False)
    assert run_in_process(experiment, made, Quiet(), threading.Event()) is ExitCode.OK
    yield made
    torch.set_num_threads(threads)


def plain(model: str) -> torch.nn.Module:
    return models.build(model, classes=10, channels=1, size=8, args=MODELS[model], seed=99).eval()


@pytest.fixture(scope="module")
def images(folder: RunFolder) -> torch.Tensor:
    dataset = data.load(folder.experiment().data, torch.device("cpu"))
    return dataset.test.images(torch.arange(13))


@pytest.fixture(scope="module")
def exported(folder: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    target = tmp_path_factory.mktemp("exported") / "not" / "there" / "yet"
    return {model: export(folder, f"a-{model}", target, "last") for model in MODELS}


@pytest.fixture(scope="module")
def elsewhere(exported: dict[str, Exported], images: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """The answers of each program, in a process without this project, for batches of 1, 2, 5 and 13."""
    asked = {
        "programs": {model: str(written.program) for model, written in exported.items()},
        "batches": [images[:size].tolist() for size in (1, 2, 5, 13)],
    }
    ended = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_THE_PROJECT],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return {model: [torch.tensor(each) for each in answers] for model, answers in json.loads(ended.stdout).items()}


@pytest.mark.parametrize("model", MODELS)
def test_an_exported_student_answers_as_it_did_in_training(
    model: str,
    folder: RunFolder,
    images: torch.Tensor,
    exported: dict[str, Exported],
    elsewhere: dict[str, list[torch.Tensor]],
) -> None:
    written = exported[model]
    about = json.loads(written.about.read_text())
    assert written.steps_trained == about["steps_trained"] == 6
    assert about["image"] == [1, 8, 8]
    assert (about["model"], about["classes"], about["weights"]) == (model, 10, "last")
    assert about["model_args"] == MODELS[model]

    # What training's own evaluation computes.
    network = plain(model)
    checkpoint = read(folder.student(f"a-{model}").path / "checkpoint.safetensors")
    network.load_state_dict(dict(checkpoint.model))
    pixels = augmentation.normalise(images, about["mean"], about["std"])
    with torch.no_grad():
        expected = network(pixels)

    # The weights, in a model of other initial weights.
    loaded = plain(model)
    with torch.no_grad():
        assert not torch.equal(loaded(pixels), expected)
        loaded.load_state_dict(load_file(written.weights))
        assert torch.equal(loaded(pixels), expected)
        assert torch.equal(_FromPixels(loaded, tuple(about["mean"]), tuple(about["std"]))(images), expected)

    # The program, where this project is not.
    assert [len(answer) for answer in elsewhere[model]] == [1, 2, 5, 13]
    for answer in elsewhere[model]:
        assert torch.allclose(answer, expected[: len(answer)], rtol=1e-4, atol=1e-4)


def test_the_best_weights(folder: RunFolder, tmp_path: Path) -> None:
    best = read(folder.student("a-mlp").path / "best.safetensors")
    written = export(folder, "a-mlp", tmp_path, "best")
    assert written.steps_trained == best.step
    assert json.loads(written.about.read_text())["weights"] == "best"
    weights = load_file(written.weights)
    assert weights.keys() == best.model.keys()
    assert all(torch.equal(weights[name], best.model[name]) for name in weights)


def test_files_can_be_read_by_others(exported: dict[str, Exported]) -> None:
    """Under the umask, like any other file: safetensors' own writer would keep them to their owner."""
    written = exported["mlp"]
    assert written.weights.stat().st_mode == written.about.stat().st_mode


def test_an_unknown_student(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="--student: 'vti' is not one of the run's; allowed: a-mlp, a-cnn, a-vit"):
        export(folder, "vti", tmp_path, "last")


@pytest.mark.parametrize("which", ["last", "best"])
def test_a_student_without_weights(which: Any, folder: RunFolder, tmp_path: Path) -> None:
    empty = RunFolder(tmp_path / "run")
    empty.start(folder.experiment(), mode="grpc", resume=False)
    with pytest.raises(CommandError, match=f"student 'a-cnn' has no {which} weights in .*; run the experiment first"):
        export(empty, "a-cnn", tmp_path / "out", which)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="is not a run folder"):
        export(RunFolder(tmp_path), "a-cnn", tmp_path, "last")


def test_torn_weights(folder: RunFolder, tmp_path: Path) -> None:
    torn = RunFolder(tmp_path / "run")
    torn.start(folder.experiment(), mode="grpc", resume=False)
    torn.student("a-cnn").checkpoint.write_bytes(b"torn")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        export(torn, "a-cnn", tmp_path / "out", "last")


def test_weights_that_do_not_fit_the_model(folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = models.build
    monkeypatch.setattr(models, "build", lambda name, **settings: build(name, **{**settings, "args": {"width": 9}}))
    with pytest.raises(CommandError, match=r"do not fit model 'cnn': .*was the model's code changed"):
        export(folder, "a-cnn", tmp_path, "last")


def test_a_target_that_cannot_be_written(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CommandError, match=r"file.* cannot be written: "):
        export(folder, "a-mlp", tmp_path / "file" / "out", "last")
    (tmp_path / "a-mlp.safetensors").mkdir()
    with pytest.raises(CommandError, match="cannot be written: Is a directory"):
        export(folder, "a-mlp", tmp_path, "last")


class Untraceable(torch.nn.Module):
    """A network that decides by a value, which torch.export cannot follow."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.load_state_dict(*args, **kwargs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images / 100 if images.abs().max() > 100 else images)


class Raising(Untraceable):
    """A network whose own code ends the process."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise SystemExit(f"no {list(images.shape)}")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Untraceable, "GuardOnDataDependentSymNode at .*test_export.py:[0-9]+: Could"),
        (Raising, r"it ended the process \(SystemExit: no"),
    ],
)
def test_weights_of_a_network_that_cannot_be_traced(
    kind: Any,
    why: str,
    folder: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a-mlp.pt2").write_text("of an earlier export")
    build = models.build
    monkeypatch.setattr(models, "build", lambda name, **settings: kind(build(name, **settings)))
    with pytest.raises(CommandError, match=f"student 'a-mlp': .* are written, but .* is not: .*{why}") as caught:
        export(folder, "a-mlp", tmp_path, "last")
    assert caught.value.code is ExitCode.CONFIGURATION
    assert "\n" not in str(caught.value)
    assert "export again" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-mlp.json", "a-mlp.safetensors"]
    plain("mlp").load_state_dict(load_file(tmp_path / "a-mlp.safetensors"))
    assert capfd.readouterr() == ("", ""), "what torch says to its developers"
