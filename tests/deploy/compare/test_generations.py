"""Generations in sequence: their teachers, the files of the weights, and what is trained after an interruption."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from codistill.config.experiment import Experiment, parse
from codistill.config.methods import BornAgain, Independent
from codistill.process.exit_codes import ExitCode
from codistill_deploy.compare import generations
from codistill_deploy.console.progress import PlainProgress
from codistill_deploy.errors import CommandError
from codistill_deploy.launch.in_process import run_in_process


def experiment(**distillation: Any) -> Experiment:
    document = {
        "name": "again",
        "seed": 4,
        "data": {"dataset": "digits", "train_size": 20, "test_size": 20},
        "training": {"epochs": 1, "batch_size": 10},
        "distillation": {"method": "born_again", "generations": 3, "temperature": 2, **distillation},
        "students": [{"name": "mlp", "model": "mlp", "model_args": {"hidden": 8}}, {"name": "cnn", "model": "cnn"}],
    }
    return parse(yaml.safe_dump(document))


def test_each_student_is_taught_by_its_own_predecessor(tmp_path: Path) -> None:
    (first, at), (second, then), (third, _) = generations.generation_runs(experiment(), tmp_path)
    assert first.distillation == Independent()
    assert not first.teachers
    assert at.path == tmp_path / "generation-1"
    assert second.distillation == third.distillation == BornAgain(generations=1, temperature=2)
    assert [(teacher.name, teacher.model, teacher.model_args, teacher.weights) for teacher in second.teachers] == [
        ("mlp.1", "mlp", {"hidden": 8}, str(at.path / "students" / "mlp")),
        ("cnn.1", "cnn", {}, str(at.path / "students" / "cnn")),
    ]
    assert [teacher.weights for teacher in third.teachers] == [
        str(then.path / "students" / name) for name in ("mlp", "cnn")
    ]
    assert len({first.seed, second.seed, third.seed}) == 3, "every generation begins from other weights"
    assert first.seed == 4


def test_a_students_own_settings_hold_from_the_second_generation_on(tmp_path: Path) -> None:
    students = [{"name": "mlp", "model": "mlp", "distillation": {"temperature": 3, "weight": 0.5}}]
    own = Experiment.model_validate({**experiment().model_dump(mode="json"), "students": students})
    (first, _), (second, _), _ = generations.generation_runs(own, tmp_path)
    assert first.plan("mlp").distillation == Independent()
    assert second.plan("mlp").distillation == BornAgain(generations=1, temperature=3, weight=0.5)


def test_what_has_teachers_is_one_run() -> None:
    assert generations.has_generations(experiment())
    _, (second, _), _ = generations.generation_runs(experiment(), Path("runs"))
    assert not generations.has_generations(second)
    generations.require_single_run(second)
    with pytest.raises(CommandError, match=r"^distillation\.generations: `codistill run` trains generations one after"):
        generations.require_single_run(experiment())


def test_what_is_trained_is_known(tmp_path: Path) -> None:
    (first, place), *_ = generations.generation_runs(experiment(), tmp_path)
    assert not generations.is_trained(place)
    place.start(first, mode="in-process", resume=False)
    stop = threading.Event()
    stop.set()
    view = PlainProgress(Console(quiet=True))
    assert run_in_process(first, place, view, stop) is ExitCode.INTERRUPTED
    assert not generations.is_trained(place)
    assert run_in_process(first, place, view, threading.Event()) is ExitCode.OK
    assert generations.is_trained(place)
