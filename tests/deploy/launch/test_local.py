"""A run's processes: what is found wrong before the first one runs. tests/system starts real ones."""

from __future__ import annotations

import errno
import subprocess
import threading
from pathlib import Path

import pytest
from rich.console import Console

from codistill.config.experiment import load
from codistill.process.exit_codes import ExitCode
from codistill_deploy.console.progress import PlainProgress
from codistill_deploy.errors import CommandError
from codistill_deploy.launch.local import run_local
from codistill_deploy.run_folder import RunFolder
from system.support import experiment_file


def test_a_machine_that_can_start_nothing_ends_the_run_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = load(experiment_file(tmp_path))
    folder = RunFolder(tmp_path / "run")
    folder.start(experiment, mode="grpc", resume=False)

    def refuse(*arguments: object, **named: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(CommandError, match=r"the server cannot be started: .*temporarily unavailable") as ended:
        run_local(experiment, folder, PlainProgress(Console(quiet=True)), threading.Event())
    assert ended.value.code is ExitCode.WORKER_FAILED
