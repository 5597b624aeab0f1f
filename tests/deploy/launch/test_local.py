"""A run's processes: what is found wrong before the first one runs. tests/system starts real ones."""

from __future__ import annotations

import errno
import stat
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from codistill.config.experiment import load
from codistill.process.exit_codes import ExitCode
from codistill.wire.security import Security
from codistill.wire.token import Token
from codistill_deploy.console.progress import PlainProgress
from codistill_deploy.errors import CommandError
from codistill_deploy.launch.local import LocalOptions, run_local
from codistill_deploy.run_folder import RunFolder
from system.support import experiment_file


class RefusedError(Exception):
    """Ends a run at its first process."""


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize("protected", ["", "token", "insecure", "mutual TLS", "TLS"])
def test_a_run_that_nothing_else_protects_makes_a_token_that_its_user_alone_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protected: str
) -> None:
    experiment = load(experiment_file(tmp_path))
    folder = RunFolder(tmp_path / "run")
    folder.start(experiment, mode="grpc", resume=False)
    own = Token("a-token-of-its-users-own", "a test")
    options = {
        "": LocalOptions(),
        "token": LocalOptions(security=Security(token=own)),
        "insecure": LocalOptions(insecure=True),
        "mutual TLS": LocalOptions(security=Security(Path("cert"), Path("key"), Path("ca"))),
        "TLS": LocalOptions(security=Security(Path("cert"), Path("key"))),
    }[protected]
    made = protected in ("", "TLS")
    seen: list[str] = []

    def look(arguments: list[str], **named: Any) -> None:
        assert folder.token_file.exists() == made
        assert named["env"].get("CODISTILL_TOKEN_FILE") == (str(folder.token_file) if made else None)
        if made:
            token = folder.token_file.read_text().strip()
            seen.append(token)
            assert len(token) == 64
            assert stat.S_IMODE(folder.token_file.stat().st_mode) == 0o600
            assert not any(token in text for text in (*arguments, *named["env"].values()))
        raise RefusedError

    monkeypatch.setattr(subprocess, "Popen", look)
    for _ in range(2):
        with pytest.raises(RefusedError):
            run_local(experiment, folder, PlainProgress(Console(quiet=True)), threading.Event(), options)
        assert not folder.token_file.exists(), "it ends with the run"
    assert len(set(seen)) == (2 if made else 0), "each run has another"


@pytest.mark.parametrize(
    ("visible", "count", "names"),
    [
        (None, 2, ["0", "1"]),
        ("2,3", 2, ["2", "3"]),
        ("MIG-a,MIG-b", 1, ["MIG-a", "MIG-b"]),  # CUDA shows one process a single MIG device
        (None, 0, []),
    ],
)
def test_each_worker_sees_a_gpu_of_its_own_and_no_other(
    visible: str | None, count: int, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = {"first": "cpu", "second": "auto", "third": "cuda:0" if names else "auto", "fourth": "auto"}
    students = [{"name": name, "model": "mlp", "training": {"device": each}} for name, each in devices.items()]
    experiment = load(experiment_file(tmp_path, distillation={"method": "dml"}, students=students))
    folder = RunFolder(tmp_path / "run")
    folder.start(experiment, mode="grpc", resume=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("NVIDIA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    seen: dict[str, tuple[str | None, str | None]] = {}
    popen = subprocess.Popen

    def look(arguments: list[str], **named: Any) -> Any:
        if "codistill_deploy" not in arguments:  # nvidia-smi
            return popen(arguments, **named)
        environment = named["env"]
        student = arguments[arguments.index("--student") + 1] if "--student" in arguments else "the server"
        seen[student] = environment.get("CUDA_VISIBLE_DEVICES"), environment.get("CODISTILL_GPU")
        if len(seen) == 1 + len(devices):
            raise RefusedError
        return popen([arguments[0], "-c", "import time; time.sleep(60)"], **named)

    monkeypatch.setattr(subprocess, "Popen", look)
    with pytest.raises(RefusedError):
        run_local(experiment, folder, PlainProgress(Console(quiet=True)), threading.Event())
    inherited = visible, None
    own = [(name, str(number)) for number, name in enumerate(names)]
    assert seen == {
        "the server": inherited,
        "first": inherited,
        "second": own[1] if names else inherited,
        "third": own[0] if names else inherited,
        "fourth": own[0] if names else inherited,
    }


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
