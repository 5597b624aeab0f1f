"""A local run told to stop and asked where it stands, and its parts started by hand; what dies is in test_recovery.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from codistill.process.exit_codes import ExitCode
from system.support import (
    EXPERIMENT,
    experiment_file,
    processes_of,
    rounds_trained,
    run,
    start,
    wait_for,
    weights,
)

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

STUDENTS = ("cnn", "vit")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "run"
    yield path
    for pid in processes_of(path).values():  # only what a failed test leaves
        os.kill(pid, signal.SIGKILL)


def started(folder: Path) -> tuple[subprocess.Popen[str], dict[str, int]]:
    """Start a run and wait until it is well under way; return it and its processes."""
    students = [each for each in EXPERIMENT["students"] if each["name"] in STUDENTS]
    path = experiment_file(folder.parent, students=students, training__epochs=100_000)
    process = start("run", path, "--run-dir", folder, cwd=folder.parent)
    wait_for(lambda: rounds_trained(folder) >= 5 or process.poll() is not None, "five rounds", 120)
    assert process.poll() is None, process.communicate()[0]
    return process, processes_of(folder)


def ended(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=90)[0]
    finally:
        process.kill()


def test_a_second_ctrl_c_ends_at_once(folder: Path) -> None:
    process, pids = started(folder)
    os.kill(pids["vit"], signal.SIGSTOP)  # it cannot save: the graceful way would take its full time
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    for line in process.stdout:
        if "stopping" in line:
            break
    process.send_signal(signal.SIGINT)
    process.wait(10)
    assert process.returncode == ExitCode.INTERRUPTED
    process.stdout.close()
    assert processes_of(folder) == {}


def test_status_names_who_is_waited_for_and_sigterm_saves_every_student(folder: Path) -> None:
    process, pids = started(folder)
    os.kill(pids["cnn"], signal.SIGSTOP)
    try:

        def waits() -> str:
            code, output = run("status", "--run-dir", folder, cwd=folder.parent, timeout=60)
            return output if code == 0 and "for cnn" in output else ""

        output = wait_for(waits, "the status names cnn", 60)
    finally:
        os.kill(pids["cnn"], signal.SIGCONT)
    assert "has waited" in output
    assert "vit" in output
    process.send_signal(signal.SIGTERM)
    output = ended(process)
    assert process.returncode == ExitCode.INTERRUPTED, output
    assert f"--run-dir {folder} --resume" in output
    assert processes_of(folder) == {}
    saved = weights(folder)
    assert set(saved) == set(STUDENTS)
    assert all(int(tensors["step"]) >= 5 for tensors in saved.values())


def test_a_server_and_a_worker_started_by_hand_leave_folders_of_a_run(tmp_path: Path) -> None:
    """Each on a machine of its own, without --run-dir: the server's is enough for a report, the worker's for weights."""
    path = experiment_file(
        tmp_path, training__epochs=1, distillation={"method": "independent"}, students=EXPERIMENT["students"][:1]
    )
    machines = tmp_path / "server", tmp_path / "worker"
    for machine in machines:
        machine.mkdir()
    server = start("serve", path, "--listen", "127.0.0.1:0", cwd=machines[0])
    try:
        announced = machines[0] / "runs" / "small" / "server.json"
        wait_for(lambda: announced.exists() or server.poll() is not None, "the server is up")
        address = json.loads(announced.read_text())["address"]
        code, output = run("work", path, "--student", "mlp", "--server", address, cwd=machines[1])
        assert code == 0, output
    finally:
        output = ended(server)
    assert server.returncode == 0, output
    code, output = run("report", "runs/small", cwd=machines[0])
    assert code == 0, output
    assert (machines[0] / "runs" / "small" / "report.html").exists()
    code, output = run("export", "runs/small", "--student", "mlp", cwd=machines[1])
    assert code == 0, output
    assert (machines[1] / "exported" / "mlp.safetensors").exists()
