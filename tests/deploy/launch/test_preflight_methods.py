"""A model or weights that lack what a method needs are rejected before any process starts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from safetensors.torch import save_file

from codistill.config.experiment import Experiment, ExperimentError, parse
from codistill.process.exit_codes import ExitCode
from codistill.v1 import distillation_pb2 as pb
from codistill_deploy.console.progress import PlainProgress
from codistill_deploy.launch.in_process import run_in_process
from codistill_deploy.launch.preflight import check
from codistill_deploy.run_folder import RunFolder
from codistill_worker import models


def experiment(tmp_path: Path, distillation: dict[str, Any], teacher: dict[str, Any] | None = None) -> Experiment:
    weights = tmp_path / "old.safetensors"
    save_file(models.build("cnn", classes=10, channels=1, size=8, args={}, seed=0).state_dict(), weights)
    named = {"name": "old", "model": "cnn", "weights": str(weights), **(teacher or {})}
    document = {
        "name": "tiny",
        "data": {"dataset": "digits"},
        "training": {"epochs": 1, "device": "cpu"},
        "distillation": distillation,
        "students": [{"name": "mlp", "model": "mlp"}, {"name": "cnn", "model": "cnn"}],
        "teachers": [] if distillation["method"] in ("dcm", "custom") else [named],
    }
    return parse(yaml.safe_dump(document))


def problems(wrong: Experiment) -> list[str]:
    with pytest.raises(ExperimentError) as caught:
        check(wrong, "my.yaml")
    return caught.value.problems


@pytest.mark.parametrize("method", ["kd", "vid", "rkd", "fddml", "dcm"])
def test_what_can_be_run(method: str, tmp_path: Path) -> None:
    check(experiment(tmp_path, {"method": method}))


@pytest.mark.parametrize(
    ("teacher", "problem"),
    [
        ({"weights": "nowhere"}, "teachers.0.weights: nowhere is not there; give the folder of a run that trains the"),
        ({"model": "mlp"}, "teachers.0.weights: "),
        ({"model": "nlp"}, "teachers.0.model: there is no model 'nlp'; did you mean 'mlp'?"),
        ({"training": {"device": "cuda:99"}}, "teachers.0.training.device: 'cuda:99'"),
    ],
)
def test_a_teacher_that_cannot_teach(teacher: dict[str, Any], problem: str, tmp_path: Path) -> None:
    (found,) = problems(experiment(tmp_path, {"method": "kd"}, teacher))
    assert found.startswith(problem)
    assert "\n" not in found


def test_a_teacher_of_other_classes(tmp_path: Path) -> None:
    weights = tmp_path / "hundred.safetensors"
    save_file(models.build("cnn", classes=100, channels=1, size=8, args={}, seed=0).state_dict(), weights)
    (found,) = problems(experiment(tmp_path, {"method": "kd"}, {"weights": str(weights)}))
    assert found.startswith(f"teachers.0.weights: {weights} does not fit model 'cnn' with 10 classes: size mismatch")
    assert found.endswith("on data of as many classes and images of its size")


class Stopping(PlainProgress):
    """Stops a run when it first shows how far it is."""

    def __init__(self, stop: threading.Event) -> None:
        super().__init__(Console(quiet=True))
        self._stop = stop

    def offer(self, snapshot: Callable[[], pb.Run]) -> None:
        self._stop.set()


@pytest.mark.parametrize("given", ["run", "run/students/old", "run/students/old/checkpoint.safetensors"])
def test_a_run_that_is_not_over_teaches_nobody_unless_a_checkpoint_is_named(given: str, tmp_path: Path) -> None:
    alone = {"name": "run", "students": [{"name": "old", "model": "cnn"}], "distillation": {"method": "independent"}}
    data = {"dataset": "digits", "train_size": 60, "test_size": 20}
    training = {"epochs": 2, "batch_size": 20, "device": "cpu"}
    run, stop = RunFolder(tmp_path / "run"), threading.Event()
    trained = parse(yaml.safe_dump({**alone, "data": data, "training": training}))
    run.start(trained, mode="in-process", resume=False)
    assert run_in_process(trained, run, Stopping(stop), stop) is ExitCode.INTERRUPTED
    taught = experiment(tmp_path, {"method": "kd"}, {"weights": str(tmp_path / given)})
    if given.endswith(".safetensors"):
        check(taught)
        return
    assert problems(taught) == [
        (
            f"teachers.0.weights: the run in {run.path} is not trained to its end; continue it, or name one of its "
            "checkpoints, a .safetensors file, to use that as it is"
        )
    ]
    assert run_in_process(trained, run, PlainProgress(Console(quiet=True)), threading.Event()) is ExitCode.OK
    check(taught)


@pytest.mark.parametrize(("method", "name"), [("vid", "old"), ("vid", "mlp"), ("dcm", "cnn")])
def test_a_layer_that_is_not_there_lists_those_that_are(method: str, name: str, tmp_path: Path) -> None:
    (found,) = problems(experiment(tmp_path, {"method": method, "stages": 1, "layers": {name: ["layer1"]}}))
    assert found.startswith(f"distillation.layers.{name}: hidden layers: 'layer1' is not there; ")
    assert "The model has: 0, 1, 2" in found


def test_an_embedding_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "from torch import nn\n\ndef flat(classes, channels, size):\n    return nn.Sequential(nn.AdaptiveAvgPool2d((1, classes)), nn.Flatten())\n"
    (tmp_path / "preflight_models.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    weights = tmp_path / "empty.safetensors"
    save_file({}, weights)
    teacher = {"model": "preflight_models:flat", "weights": str(weights)}
    (found,) = problems(experiment(tmp_path, {"method": "rkd"}, teacher))
    assert "'old' has no embedding to compare: embedding: the model has no layer with weights" in found


PAIR = """
from codistill.methods import FEATURES, LOGITS, LogitsObjective, Targets, label_loss

class Server:
    heavy, student, teacher = False, {"logits": LOGITS}, {}
    def targets(self, inputs):
        return Targets(shared={})

class Maps(Server):
    student = {"maps": FEATURES}

class Worker(LogitsObjective):
    publishes = ("logits",)
    def __init__(self, context, rate=1):
        super().__init__(context)
    def loss(self, step):
        return label_loss(step)

def nothing(context):
    return 3
"""


@pytest.mark.parametrize(
    ("server", "worker", "parameters", "problem"),
    [
        (
            "Sever",
            "Worker",
            {},
            "distillation.server: 'preflight_pair:Sever': module 'preflight_pair' has no 'Sever'",
        ),
        ("Server", "nothing", {}, "distillation.worker: 'preflight_pair:nothing' returned int, which lacks network"),
        (
            "Server",
            "Worker",
            {"rate": 2},
            "distillation.parameters.rate: 'preflight_pair:Server' has no such argument",
        ),
        (
            "Maps",
            "Worker",
            {},
            "students.0: distillation: 'mlp' publishes {'logits': [10]}, the aggregator takes {'maps'",
        ),
    ],
)
def test_a_pair_that_does_not_fit(
    server: str, worker: str, parameters: Any, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "preflight_pair.py").write_text(PAIR)
    monkeypatch.syspath_prepend(tmp_path)
    pair = {"server": f"preflight_pair:{server}", "worker": f"preflight_pair:{worker}", "parameters": parameters}
    found = problems(experiment(tmp_path, {"method": "custom", **pair}))
    assert found[0].removeprefix("students.0: ").startswith(problem.removeprefix("students.0: "))


def test_a_pair_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "preflight_pair.py").write_text(PAIR)
    monkeypatch.syspath_prepend(tmp_path)
    check(
        experiment(tmp_path, {"method": "custom", "server": "preflight_pair:Server", "worker": "preflight_pair:Worker"})
    )
