from __future__ import annotations

import threading
from pathlib import Path

import pytest

from codistill.distillation import Dml, Independent, Kdcl
from codistill.exit_codes import ExitCode
from codistill.experiment import Experiment, ExperimentError
from codistill_deploy.compare import compare, with_method
from codistill_deploy.comparison import ComparisonIndex
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder


@pytest.fixture
def experiment() -> Experiment:
    return Experiment.model_validate(
        {
            "name": "tiny",
            "seed": 5,
            "data": {"dataset": "digits"},
            "training": {"epochs": 1},
            "distillation": {"method": "kdcl", "ensemble": "naive", "temperature": 3},
            "students": [{"name": "a", "model": "mlp"}, {"name": "b", "model": "cnn"}],
        }
    )


def test_the_experiments_own_settings_hold_for_its_own_method(experiment: Experiment) -> None:
    assert with_method(experiment, "kdcl").distillation == Kdcl(ensemble="naive", temperature=3)
    assert with_method(experiment, "kdcl/linear").distillation == Kdcl(ensemble="linear", temperature=3)
    assert with_method(experiment, "dml").distillation == Dml()
    assert with_method(experiment, "independent").distillation == Independent()


def test_an_unknown_method_names_the_known_ones(experiment: Experiment) -> None:
    with pytest.raises(
        CommandError, match=r"--methods: 'kdlc' is not a method; allowed: independent, kd, logit_regression"
    ):
        with_method(experiment, "kdlc")


def test_what_a_method_needs_is_checked_before_anything_runs(experiment: Experiment, tmp_path: Path) -> None:
    ran: list[str] = []

    def run(variant: Experiment, folder: RunFolder, title: str) -> ExitCode:
        ran.append(title)
        return ExitCode.OK

    with pytest.raises((CommandError, ExperimentError), match="held_out"):
        compare(experiment, ["independent", "kdcl/general"], [0], tmp_path, run, threading.Event(), resume=False)
    assert ran == []
    assert list(tmp_path.iterdir()) == []


def test_every_method_runs_with_every_seed(experiment: Experiment, tmp_path: Path) -> None:
    ran: list[tuple[str, int, str]] = []

    def run(variant: Experiment, folder: RunFolder, title: str) -> ExitCode:
        ran.append((variant.distillation.title, variant.seed, str(folder.path.relative_to(tmp_path))))
        return ExitCode.OK

    code = compare(experiment, ["independent", "kdcl"], [5, 6], tmp_path, run, threading.Event(), resume=False)
    assert code is ExitCode.OK
    assert ran == [
        ("independent", 5, "independent/seed-5"),
        ("kdcl/naive", 5, "kdcl-naive/seed-5"),
        ("independent", 6, "independent/seed-6"),
        ("kdcl/naive", 6, "kdcl-naive/seed-6"),
    ]
    index = ComparisonIndex.read(tmp_path)
    assert index.methods == ("independent", "kdcl/naive")
    assert [(each.method, each.seed, each.path) for each in index.runs] == ran
    with pytest.raises(CommandError, match="already holds a comparison; give --resume"):
        compare(experiment, ["independent"], [5], tmp_path, run, threading.Event(), resume=False)


def test_a_stop_ends_it_between_two_runs(experiment: Experiment, tmp_path: Path) -> None:
    stop = threading.Event()

    def run(variant: Experiment, folder: RunFolder, title: str) -> ExitCode:
        stop.set()
        return ExitCode.OK

    code = compare(experiment, ["independent", "kdcl"], [0], tmp_path, run, stop, resume=False)
    assert code is ExitCode.INTERRUPTED
