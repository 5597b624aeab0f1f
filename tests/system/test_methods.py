"""Every example of a method: real processes end with the bits of one process."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from codistill.config.experiment import load
from codistill_deploy.compare import generations
from codistill_deploy.console.progress import PlainProgress
from codistill_deploy.launch.in_process import run_in_process
from codistill_deploy.run_folder import RunFolder
from system.forked import run_forked
from system.support import assert_bit_equal, run, weights

pytestmark = pytest.mark.system

EXAMPLES = Path(__file__).parents[2] / "examples" / "methods"
BY_THE_COMMAND = ("born_again",)
"""Examples that `codistill run` runs here; the others' processes are forked, which is cheaper."""


def shrunk(name: str, folder: Path, **changes: Any) -> Path:
    """Write an example that takes a second; its teacher's weights are where the example says."""
    document = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    document["training"] |= {"epochs": 2, "batch_size": 30, "evaluate_every": 2}
    document["data"] |= {"train_size": 90 + document["data"].get("held_out", 0), "test_size": 100}
    document["exchange"] = {"connect_timeout": 60, "give_up_after": 120}
    for key, value in changes.items():
        document[key] = document.get(key, {}) | value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def in_process(path: Path, folder: Path) -> None:
    """Run an experiment, or all its generations, in this process."""
    experiment = load(path)
    runs = [(experiment, RunFolder(folder))]
    if generations.has_generations(experiment):
        runs = list(generations.generation_runs(experiment, folder))
    for single, run_folder in runs:
        run_folder.start(single, mode="in-process", resume=False)
        assert run_in_process(single, run_folder, PlainProgress(Console(quiet=True)), threading.Event()) == 0


@pytest.fixture(scope="module")
def examples_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the examples' teacher is trained."""
    folder = tmp_path_factory.mktemp("methods")
    in_process(shrunk("teacher", folder), folder / "runs" / "teacher")
    return folder


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.yaml") if path.stem != "teacher"))
def test_an_example_ends_with_the_same_bits_in_one_process(
    name: str, examples_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(examples_folder)
    changes: dict[str, Any] = {"distillation": {"generations": 2}} if name == "born_again" else {}
    if name == "cross_architecture":
        changes = {"distillation": {"start_epoch": 0.5, "every": 2}}
    path = shrunk(name, examples_folder, **changes)
    in_process(path, examples_folder / "one" / name)
    many = examples_folder / "many" / name
    if name in BY_THE_COMMAND:
        code, output = run("run", path, "--run-dir", many, cwd=examples_folder)
        assert code == 0, output
    else:
        many.mkdir(parents=True)
        run_forked(load(path), many)
    for part in ("generation-1", "generation-2") if name == "born_again" else ("",):
        ours, theirs = weights(many / part), weights(examples_folder / "one" / name / part)
        assert {student: int(tensors["step"]) for student, tensors in ours.items()} == {"mlp": 6, "cnn": 6}
        assert_bit_equal(ours, theirs)


@pytest.mark.parametrize(("name", "killed"), [("kd", "teacher"), ("dcm", "cnn"), ("cross_architecture", "mlp")])
def test_after_a_kill_the_bits_are_the_same(
    name: str, killed: str, examples_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher restarts at the frontier, a student with the modules that its method trains, whatever the round."""
    monkeypatch.chdir(examples_folder)
    changes: dict[str, Any] = {"training": {"epochs": 60, "checkpoint_every": 0.2}}
    if name == "cross_architecture":
        changes |= {"distillation": {"start_epoch": 0.5, "every": 3}}
    path = shrunk(name, examples_folder, **changes)
    in_process(path, examples_folder / "undisturbed" / name)
    folder = examples_folder / "killed" / name
    folder.mkdir(parents=True)
    run_forked(load(path), folder, kill=killed, after=15)
    assert_bit_equal(weights(folder), weights(examples_folder / "undisturbed" / name))
