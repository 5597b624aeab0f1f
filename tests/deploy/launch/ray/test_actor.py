"""An actor on its node, without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codistill.process.exit_codes import ExitCode
from codistill.rundir.files import locked
from codistill.rundir.layout import RunLayout
from codistill_deploy.launch.ray import actor
from codistill_deploy.launch.ray.actor import ADVERTISE_VARIABLE, ProcessActor
from codistill_deploy.launch.ray.task import ServerAddress, Task
from codistill_deploy.supervise.restart_policy import Ending

MARKER = "written by the driver"
SLEEP = "import time; print('up', flush=True); time.sleep(600)"


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., Task]:
    RunLayout(tmp_path).driver_file.write_text(MARKER)

    def make(script: str, **changes: Any) -> Task:
        fields: dict[str, Any] = {
            "folder": tmp_path,
            "marker": MARKER,
            "arguments": ["-c", script],
            "log": tmp_path / "log.txt",
            "hang_after": 600,
            "lock": tmp_path / "actor.lock",
        }
        return Task(**{**fields, **changes})

    return make


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_a_process_is_run_to_its_end(task: Callable[..., Task], tmp_path: Path) -> None:
    ended = ProcessActor("10.0.0.7").run(task("import sys; print('error: no'); sys.exit(7)"))
    assert (ended.code, ended.line) == (ExitCode.DIVERGED, "no")
    assert ProcessActor("10.0.0.7").run(task("")).code == 0
    assert (tmp_path / "log.txt").read_text() == "error: no\n"


def test_a_signal_ends_it(task: Callable[..., Task], tmp_path: Path) -> None:
    actor, ended = ProcessActor("10.0.0.7"), list[Ending]()
    running = threading.Thread(target=lambda: ended.append(actor.run(task(SLEEP))))
    running.start()
    wait_for(lambda: (tmp_path / "log.txt").exists() and (tmp_path / "log.txt").read_text(), "it is up")
    actor.send_signal(signal.SIGTERM)
    running.join(60)
    assert str(ended[0]) == "was killed by SIGTERM"


def test_after_a_signal_it_does_not_start(task: Callable[..., Task], tmp_path: Path) -> None:
    actor = ProcessActor("10.0.0.7")
    actor.send_signal(signal.SIGTERM)
    assert actor.run(task(SLEEP)).code == ExitCode.INTERRUPTED
    assert not (tmp_path / "log.txt").exists()


@pytest.mark.parametrize("seen", [None, "of another run"])
def test_a_folder_that_is_not_shared_is_an_error(
    seen: str | None, task: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actor, "_SHARED_SECONDS", 0.2)
    RunLayout(tmp_path).driver_file.unlink()
    if seen is not None:
        RunLayout(tmp_path).driver_file.write_text(seen)
    ended = ProcessActor("10.0.0.7").run(task(SLEEP))
    assert ended.code == ExitCode.CONFIGURATION
    assert ended.line.startswith(f"run folder {tmp_path} is not shared: node 10.0.0.7 (")
    assert ended.line.endswith("give a --run-dir on storage that every node mounts at the same path")


def test_the_marker_may_be_seen_late(task: Callable[..., Task], tmp_path: Path) -> None:
    RunLayout(tmp_path).driver_file.unlink()
    late = threading.Timer(0.2, RunLayout(tmp_path).driver_file.write_text, [MARKER])
    late.start()
    assert ProcessActor("10.0.0.7").run(task("")).code == 0
    late.join()


def test_it_waits_for_a_predecessor_that_still_lives(
    task: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "actor.lock"
    with locked(lock, 0):
        monkeypatch.setattr(actor, "_PREDECESSOR_SECONDS", 0.2)
        ended = ProcessActor("10.0.0.7").run(task(""))
        assert (ended.code, f"{lock} is held by a predecessor" in ended.line) == (ExitCode.ERROR, True)
        monkeypatch.setattr(actor, "_PREDECESSOR_SECONDS", 60)
        after = list[Ending]()
        waiting = threading.Thread(target=lambda: after.append(ProcessActor("10.0.0.7").run(task(""))))
        waiting.start()
    waiting.join(60)
    assert after[0].code == 0


def test_its_process_holds_the_lock_too(task: Callable[..., Task], tmp_path: Path) -> None:
    script = (
        "import os; folder = '/proc/self/fd'; [print(os.path.realpath(f'{folder}/{n}')) for n in os.listdir(folder)]"
    )
    assert ProcessActor("10.0.0.7").run(task(script)).code == 0
    assert str(tmp_path / "actor.lock") in (tmp_path / "log.txt").read_text()


def test_a_secret_is_in_the_environment_and_nowhere_else(
    task: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = "import os; print(*map(os.environ.get, ('SECRET', 'PYTHONPATH', 'PYTHONSAFEPATH', 'CODISTILL_MODULES')))"
    path = os.pathsep.join([str(tmp_path), "mine"])  # as Ray puts the folder of a job's files first
    secret = task(script, environment={"SECRET": "very secret", "PYTHONPATH": path}, search_path=Path("models"))
    assert "very secret" not in repr(secret)
    assert ProcessActor("10.0.0.7").run(secret).code == 0
    assert (tmp_path / "log.txt").read_text() == f"very secret mine 1 {tmp_path / 'models'}{os.pathsep}{tmp_path}\n"


@pytest.mark.parametrize(
    ("server_address", "node", "advertised", "expected"),
    [
        (ServerAddress(), "10.0.0.7", None, "--listen 10.0.0.7:0 --metrics 127.0.0.1:0"),
        (ServerAddress(50551, 9464), "fd00::7", None, "--listen [fd00::7]:50551 --metrics [fd00::7]:9464"),
        (ServerAddress(1), "10.0.0.7", "a", "--listen 0.0.0.0:1 --metrics 127.0.0.1:0 --advertise a"),
        (ServerAddress(1, 2, "b"), "10.0.0.7", "a", "--listen 0.0.0.0:1 --metrics 0.0.0.0:2 --advertise b"),
    ],
)
def test_where_a_server_listens(
    server_address: ServerAddress,
    node: str,
    advertised: str | None,
    expected: str,
    task: Callable[..., Task],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if advertised is not None:
        monkeypatch.setenv(ADVERTISE_VARIABLE, advertised)
    assert ProcessActor(node).run(task("import sys; print(*sys.argv[1:])", server_address=server_address)).code == 0
    assert (tmp_path / "log.txt").read_text().strip() == expected


def test_it_ends_with_the_ray_of_its_node(tmp_path: Path) -> None:
    actor = "import time; from codistill_deploy.launch.ray.actor import ProcessActor; ProcessActor(); print('up', flush=True); time.sleep(600)"
    raylet = f"import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', {actor!r}]).pid, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", raylet], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert parent.stdout.readline() == "up\n"
        parent.kill()
    wait_for(lambda: not is_running(pid), "the actor ends")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
