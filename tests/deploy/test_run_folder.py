from __future__ import annotations

import json
from pathlib import Path

import pytest

from codistill.experiment import Exchange, Experiment, Journal, Student, identity
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder


@pytest.fixture
def experiment() -> Experiment:
    return Experiment.model_validate(
        {
            "name": "tiny",
            "data": {"dataset": "digits"},
            "training": {"epochs": 1},
            "students": [{"name": "a", "model": "mlp"}, {"name": "b", "model": "cnn"}],
        }
    )


def test_start_writes_the_resolved_experiment_and_where_it_ran(experiment: Experiment, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start(experiment, mode="grpc", resume=False)
    assert identity(folder.experiment()) == identity(experiment)
    about = json.loads((folder.path / "run.json").read_text())
    assert about["mode"] == "grpc"
    assert {"codistill", "python", "torch"} <= about["versions"].keys()
    assert folder.student("a").is_dir()
    assert folder.student("b").is_dir()


def test_a_folder_with_a_run_is_not_taken_twice(experiment: Experiment, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start(experiment, mode="grpc", resume=False)
    with pytest.raises(CommandError, match=f"{tmp_path} already holds a run; give --resume"):
        folder.start(experiment, mode="grpc", resume=False)
    folder.start(experiment, mode="grpc", resume=True)


def test_resuming_with_another_experiment_names_the_field_and_both_values(
    experiment: Experiment, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    folder.start(experiment, mode="grpc", resume=False)
    with pytest.raises(CommandError, match="experiment field seed: the run has 0, this experiment has 9"):
        folder.start(experiment.replace(seed=9), mode="grpc", resume=True)


def test_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"is not a run folder: it has no experiment\.yaml"):
        RunFolder(tmp_path).experiment()


def test_a_folder_that_cannot_be_written_says_so(experiment: Experiment, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CommandError, match=r"run folder .*file/run cannot be written: Not a directory"):
        RunFolder(tmp_path / "file" / "run").start(experiment, mode="grpc", resume=False)


def test_students_may_be_added_later_where_every_round_is_kept(experiment: Experiment, tmp_path: Path) -> None:
    more = (*experiment.students, Student(name="c", model="vit"))
    folder = RunFolder(tmp_path / "needed")
    folder.start(experiment, mode="grpc", resume=False)
    with pytest.raises(CommandError, match=r"students were added .* exchange\.journal\.keep: all"):
        folder.start(experiment.replace(students=more), mode="grpc", resume=True)

    keeping = experiment.replace(exchange=Exchange(journal=Journal(keep="all")))
    folder = RunFolder(tmp_path / "all")
    folder.start(keeping, mode="grpc", resume=False)
    folder.start(keeping.replace(students=more), mode="grpc", resume=True)
    assert folder.experiment().names == ("a", "b", "c")
    assert folder.student("c").is_dir()
