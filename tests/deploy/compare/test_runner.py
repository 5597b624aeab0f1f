from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
from rich.console import Console

from codistill.config.experiment import Experiment, ExperimentError, load
from codistill.process.exit_codes import ExitCode
from codistill_deploy.compare import statistics
from codistill_deploy.compare.index import ComparisonIndex
from codistill_deploy.compare.runner import compare
from codistill_deploy.console.progress import PlainProgress
from codistill_deploy.errors import CommandError
from codistill_deploy.launch.in_process import run_in_process
from codistill_deploy.run_folder import RunFolder


@pytest.fixture
def experiment() -> Experiment:
    return Experiment.model_validate(
        {
            "name": "tiny",
            "seed": 5,
            "data": {"dataset": "digits", "train_size": 20, "test_size": 40},
            "training": {"epochs": 1, "batch_size": 10},
            "distillation": {"method": "kdcl", "ensemble": "naive", "temperature": 3},
            "students": [{"name": "a", "model": "mlp"}, {"name": "b", "model": "cnn"}],
        }
    )


def fine(variant: Experiment) -> None:
    """Find nothing wrong with any experiment."""


def test_what_a_method_needs_is_checked_before_anything_runs(experiment: Experiment, tmp_path: Path) -> None:
    ran: list[str] = []

    def run(variant: Experiment, folder: RunFolder, title: str) -> ExitCode:
        ran.append(title)
        return ExitCode.OK

    with pytest.raises((CommandError, ExperimentError), match="held_out"):
        compare(
            experiment, ["independent", "kdcl/general"], [0], tmp_path, run, threading.Event(), check=fine, resume=False
        )
    assert ran == []
    assert list(tmp_path.iterdir()) == []


def test_all_are_checked_before_the_first_is_run(experiment: Experiment, tmp_path: Path) -> None:
    checked: list[str] = []

    def check(variant: Experiment) -> None:
        checked.append(variant.distillation.title)
        if variant.distillation.title == "dml":
            raise CommandError("not here")

    def run(variant: Experiment, folder: RunFolder, title: str) -> ExitCode:
        raise AssertionError

    with pytest.raises(CommandError, match="not here"):
        compare(
            experiment, ["kd", "independent", "dml"], [0], tmp_path, run, threading.Event(), check=check, resume=False
        )
    assert checked == ["independent", "dml"], "the teacher of kd is not known yet"
    assert list(tmp_path.iterdir()) == []


def test_every_method_runs_with_every_seed(experiment: Experiment, tmp_path: Path) -> None:
    ran: list[tuple[str, int, str]] = []

    def run(variant: Experiment, folder: RunFolder, title: str) -> ExitCode:
        ran.append((variant.distillation.title, variant.seed, str(folder.path.relative_to(tmp_path))))
        return ExitCode.OK

    code = compare(
        experiment, ["independent", "kdcl"], [5, 6], tmp_path, run, threading.Event(), check=fine, resume=False
    )
    assert code is ExitCode.OK
    assert ran == [
        ("independent", 5, "independent/seed-5"),
        ("kdcl/naive", 5, "kdcl-naive/seed-5"),
        ("independent", 6, "independent/seed-6"),
        ("kdcl/naive", 6, "kdcl-naive/seed-6"),
    ]
    index = ComparisonIndex.read(tmp_path)
    assert index.methods == ("independent", "kdcl/naive")
    assert [(one.method, one.seed, one.path) for one in index.runs] == ran
    with pytest.raises(CommandError, match="already holds a comparison; give --resume"):
        compare(experiment, ["independent"], [5], tmp_path, run, threading.Event(), check=fine, resume=False)


def test_a_title_tells_how_long_it_still_takes(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    titles: list[str] = []

    def run(variant: Experiment, folder: RunFolder, title: str) -> ExitCode:
        nonlocal now
        now += 1900.0
        titles.append(title)
        return ExitCode.OK

    monkeypatch.setattr("codistill_deploy.compare.runner.time.monotonic", lambda: now)
    compare(experiment, ["independent", "dml"], [5, 6, 7], tmp_path, run, threading.Event(), check=fine, resume=False)
    assert [title.partition("]")[0] for title in titles] == [
        "[1/6",
        "[2/6, 2 h 38 min to go",
        "[3/6, 2 h 7 min to go",
        "[4/6, 95 min to go",
        "[5/6, 63 min to go",
        "[6/6, 32 min to go",
    ]


def test_a_stop_ends_it_between_two_runs(experiment: Experiment, tmp_path: Path) -> None:
    stop = threading.Event()

    def run(variant: Experiment, folder: RunFolder, title: str) -> ExitCode:
        stop.set()
        return ExitCode.OK

    code = compare(experiment, ["independent", "kdcl"], [0], tmp_path, run, stop, check=fine, resume=False)
    assert code is ExitCode.INTERRUPTED


def test_the_best_alone_teaches_and_of_generations_the_last_is_compared(experiment: Experiment, tmp_path: Path) -> None:
    ran: list[str] = []

    def run(variant: Experiment, folder: RunFolder, title: str) -> ExitCode:
        ran.append(re.sub(", .* to go", "", title))  # on a slow machine
        folder.start(variant, mode="in-process", resume=folder.experiment_file.exists())
        return run_in_process(variant, folder, PlainProgress(Console(quiet=True)), threading.Event())

    def go(*methods: str, resume: bool = False) -> None:
        stop = threading.Event()
        assert compare(experiment, methods, [5, 6], tmp_path, run, stop, check=fine, resume=resume) is ExitCode.OK

    go("independent", "kd", "born_again")
    assert ran[:4] == [
        "[1/6] independent, seed 5",
        "[2/6] kd, seed 5",
        "[3/6] born_again, seed 5, generation 1 of 2",
        "[3/6] born_again, seed 5, generation 2 of 2",
    ]
    index = ComparisonIndex.read(tmp_path)
    assert index.runs[-1].path == "born_again/seed-6/generation-2"
    compared = statistics.summarise(statistics.read_runs(tmp_path, index))
    assert not compared.incomplete
    for seed in (5, 6):
        [taught] = load(tmp_path / "kd" / f"seed-{seed}" / "experiment.yaml").teachers
        accuracies = {
            student.name: student.results["independent"].accuracy.values[seed] for student in compared.students
        }
        best = max(accuracies, key=lambda name: accuracies[name])
        assert taught.name == f"{best}.alone"
        assert taught.weights == str(tmp_path / "independent" / f"seed-{seed}" / "students" / best)

    ran.clear()
    (tmp_path / "born_again" / "seed-6" / "generation-2" / "metrics.jsonl").unlink()
    go("independent", "kd", "born_again", "dml", resume=True)
    assert ran == ["[4/8] dml, seed 5", "[7/8] born_again, seed 6, generation 2 of 2", "[8/8] dml, seed 6"]
