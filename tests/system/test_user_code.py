"""A user's own code: what of it is loaded, and what follows where it ends a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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


def run(folder: Path, body: str, *options: str) -> tuple[int, str]:
    """Run an experiment with a model of its own from its folder, as the installed command does."""
    (folder / "own.py").write_text(MODEL.format(body=body))
    students = [{"name": "own", "model": "own:Model"}, EXPERIMENT["students"][1]]
    path = experiment_file(folder, students=students, training__epochs=1)
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
    assert "student 'own' " in error, output
    assert ": it ended the process (SystemExit: 0 at " in error, output
    assert f"{tmp_path / 'own.py'}:11); let it return" in error, output
