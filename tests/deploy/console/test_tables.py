from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from codistill.config.experiment import Experiment
from codistill.rundir.records import Joined, Measured
from codistill_deploy.compare.index import ComparisonIndex, IndexedRun
from codistill_deploy.console.tables import comparison_table
from codistill_deploy.run_folder import RunFolder

ACCURACY = {
    ("independent", 0): {"a": 0.90, "b": 0.80},
    ("independent", 1): {"a": 0.92, "b": 0.80},
    ("kdcl/naive", 0): {"a": 0.91, "b": 0.84},
    ("kdcl/naive", 1): {"a": 0.94, "b": 0.82},
}


OTHERS = {
    (method, seed): {"a": 0.9 + gain, "b": 0.8 - gain}
    for method, gain in (("dml", 0.01), ("dcm", 0.02), ("cross_architecture", 0.03))
    for seed in (0, 1)
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path, ACCURACY)


def written(tmp_path: Path, accuracies: Mapping[tuple[str, int], Mapping[str, float]]) -> Path:
    runs: list[IndexedRun] = []
    for (method, seed), accuracy in accuracies.items():
        name, _, ensemble = method.partition("/")
        experiment = Experiment.model_validate(
            {
                "name": "tiny",
                "seed": seed,
                "data": {"dataset": "digits"},
                "training": {"epochs": 1},
                "distillation": {"method": name, **({"ensemble": ensemble} if ensemble else {})},
                "students": [{"name": "a", "model": "mlp"}, {"name": "b", "model": "cnn"}],
            }
        )
        path = f"{method.replace('/', '-')}/seed-{seed}"
        run = RunFolder(tmp_path / path)
        run.start(experiment, mode="grpc", resume=False)
        lines = [
            record.model_dump_json()
            for student, value in accuracy.items()
            for record in (
                Joined(
                    time=1, participant=student, model="m", parameters=1234, device="cpu", total_rounds=9, total_steps=9
                ),
                Measured(
                    time=2, participant=student, split="test", steps_trained=9, epochs_trained=1, accuracy=value, loss=1
                ),
            )
        ]
        (run.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        runs.append(IndexedRun(method=method, seed=seed, path=path))
    methods = tuple(dict.fromkeys(method for method, _ in accuracies))
    left_out = {"fddml": "is for others"}
    index = ComparisonIndex(experiment="tiny", methods=methods, seeds=(0, 1), runs=tuple(runs), left_out=left_out)
    index.write(tmp_path)
    return tmp_path


def rows(folder: Path, width: int = 160) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=width)
    console.print(comparison_table(folder, console))
    assert isinstance(console.file, io.StringIO)
    return [line.split("  ") for line in console.file.getvalue().splitlines()]


def test_the_table_shows_alone_together_and_the_paired_gain(folder: Path) -> None:
    shown = [[cell.strip() for cell in row if cell.strip()] for row in rows(folder)]
    assert shown[0] == ["student", "parameters", "alone", "kdcl/naive", "gain"]
    # a: alone 90, 92; together 91, 94: gains 1 and 2. b: alone 80, 80; together 84, 82: gains 4 and 2.
    assert shown[1] == ["a", "1,234", "91.00 % ± 1.41", "92.50 % ± 2.12", "+1.50 ± 0.71"]
    assert shown[2] == ["b", "1,234", "80.00 % ± 0.00", "83.00 % ± 1.41", "+3.00 ± 1.41"]
    # The mean over students: alone 85, 86; together 87.5, 88: gains 2.5 and 2.
    assert shown[3] == ["mean", "85.50 % ± 0.71", "87.75 % ± 0.35", "+2.25 ± 0.35"]


def test_a_run_that_is_not_complete_is_named(folder: Path) -> None:
    (folder / "kdcl-naive" / "seed-1" / "metrics.jsonl").write_text("")
    text = "\n".join(" ".join(row) for row in rows(folder))
    assert "not complete: kdcl/naive, seed 1" in text


def test_methods_that_have_no_room_beside_each_other_have_a_row_each(tmp_path: Path) -> None:
    shown = rows(written(tmp_path, ACCURACY | OTHERS), width=80)
    table = [[cell.strip() for cell in row if cell.strip()] for row in shown[:6]]
    assert table == [
        ["method", "a", "b", "mean"],
        ["independent", "91.00 ± 1.41", "80.00 ± 0.00", "85.50 ± 0.71"],
        ["kdcl/naive", "+1.50 ± 0.71", "+3.00 ± 1.41", "+2.25 ± 0.35"],
        # alone a has 90 and 92, and 91 with dml; b has 80, and 79
        ["dml", "+0.00 ± 1.41", "-1.00 ± 0.00", "-0.50 ± 0.71"],
        ["dcm", "+1.00 ± 1.41", "-2.00 ± 0.00", "-0.50 ± 0.71"],
        ["cross_architecture", "+2.00 ± 1.41", "-3.00 ± 0.00", "-0.50 ± 0.71"],
    ]
    assert "not compared: fddml: is for others" in ["  ".join(row).strip() for row in shown]
