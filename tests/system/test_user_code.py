"""A user's own code: what of it is loaded, and what follows where it ends a process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from codistill.process.exit_codes import ExitCode
from system.support import EXPERIMENT, environment, experiment_file

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

MODEL = """
import queue, types
import os, torch

class Model(torch.nn.Module):
    def __init__(self, classes, channels, size):
        super().__init__()
        self.layer = torch.nn.Linear(channels * size * size, classes)
    def forward(self, images):
        if self.training:
            {body}
        return self.layer(images.flatten(1))
"""


def run(
    folder: Path, body: str, *options: str, data: Mapping[str, Any] | None = None, late: str = "", after: str = ""
) -> tuple[int, str]:
    """Run an experiment with a model of its own from its folder, as the installed command does."""
    (folder / "own.py").write_text(MODEL.format(body=body) + after)
    (folder / "late.py").write_text(late)
    students = [{"name": "own", "model": "own:Model"}, EXPERIMENT["students"][1]]
    path = experiment_file(folder, students=students, training__epochs=1, **({"data": data} if data else {}))
    command = [sys.executable, "-P", "-m", "codistill_deploy", "run", str(path), "--run-dir", "run", *options]
    ended = subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return ended.returncode, ended.stdout


def test_files_beside_the_experiment_stand_for_no_module_of_python_or_a_library(tmp_path: Path) -> None:
    names = ("types", "queue", "random", "sitecustomize", "sklearn", "grpc", "codistill", "resource")
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'a').write({name!r})\n")
    code, output = run(tmp_path, "pass")
    assert code == 0, output
    assert not (tmp_path / "executed").exists(), (tmp_path / "executed").read_text()


def test_a_worker_that_ends_with_0_before_its_last_step_has_not_finished(tmp_path: Path) -> None:
    code, output = run(tmp_path, "os._exit(0)")
    assert code == ExitCode.WORKER_FAILED, output
    error = output.splitlines()[-1]
    assert error.startswith("error: student 'own' ended with exit code 1: something in it ended the process, with 0"), (
        output
    )


@pytest.mark.parametrize("options", [[], ["--in-process"]])
def test_a_model_that_leaves_is_an_error_with_its_line(tmp_path: Path, options: list[str]) -> None:
    code, output = run(tmp_path, "raise SystemExit(0)", *options)
    assert code == ExitCode.CONFIGURATION, output
    error = output.splitlines()[-1]
    assert "student 'own' cannot train a step on a batch of" in error, output
    assert ": it ended the process (SystemExit: 0 at " in error, output
    assert f"{tmp_path / 'own.py'}:11); let it return" in error, output


def test_code_that_changes_the_working_folder_moves_no_path_of_the_run(tmp_path: Path) -> None:
    code, output = run(tmp_path, "os.chdir('/')", after="os.chdir('/usr')")
    assert code == 0, output
    assert f"report: {tmp_path}/run/report.html" in output
    assert (tmp_path / "run" / "students" / "own" / "checkpoint.safetensors").is_file()


def test_what_workers_log_of_the_data_and_of_changed_code_is_shown_once(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "img" / split / name).mkdir(parents=True)
            for number in range(20):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "img" / split / name / f"{number}.png")
    (tmp_path / "img" / "train" / "cat" / "a.heic").touch()
    data = {"dataset": "image_folder", "root": "img", "classes": 2, "image_size": 8}
    code, output = run(tmp_path, "import late", data=data, late="")
    assert code == 0, output
    train = f"data.root: {tmp_path}/img/train: 40 images in 2 classes; left out: 1 ending in .heic (cat/a.heic)"
    assert output.count(train) == 1, output
    code, output = run(tmp_path, "import late", "--resume", data=data, late="changed = 1")
    assert code == 0, output
    assert output.count("module 'late' has changed since the run was last started") == 1, output
