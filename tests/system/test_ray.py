"""`codistill ray`: a Ray of its own, and jobs on a cluster whose processes, actors and nodes die; always the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from codistill.process.exit_codes import ExitCode
from codistill.rundir.records import Happened, read
from system.run_harness import CHANGES
from system.support import (
    assert_bit_equal,
    environment,
    experiment_file,
    processes_of,
    rounds_trained,
    run,
    start,
    wait_for,
    weights,
)

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-for-the-tests-" + 16 * "x"
RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    # A lost node is found in a second or two, and not in a quarter of a minute.
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}


class Cluster:
    """A cluster of three nodes, whose head trains nothing; it wants a token."""

    def __init__(self, folder: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "system.ray_nodes"],
            env={
                **self.environment,
                "RAY_TMPDIR": folder,
                "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._about = self._answer()

    @property
    def environment(self) -> dict[str, str]:
        return environment(**RAY, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    @property
    def address(self) -> str:
        return str(self._about["address"])

    @property
    def jobs(self) -> str:
        return str(self._about["jobs"])

    @property
    def nodes(self) -> list[int]:
        """The pids of the nodes' raylets."""
        return list(self._about["nodes"])

    def ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        try:
            self._process.communicate(timeout=30)
        finally:
            self._process.kill()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Sockets lie there, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="ray-test-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        made = Cluster(folder)
        yield made
        made.close()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "run"
    yield path
    for pid in processes_of(path).values():  # only what a failed test leaves
        os.kill(pid, signal.SIGKILL)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def restarts(folder: Path) -> list[str]:
    """Return who was started again and why, in order."""
    events = read(folder / "supervisor.jsonl")
    return [
        f"{each.participant} {each.message}"
        for each in events
        if isinstance(each, Happened) and each.what == "restarted"
    ]


def test_a_job_whose_processes_actors_and_nodes_die_ends_with_the_same_bits(
    cluster: Cluster, folder: Path, reference: dict[str, dict[str, torch.Tensor]]
) -> None:
    work = folder.parent / "work"
    work.mkdir()
    experiment_file(work, **CHANGES)
    command = ["job", "submit", "--address", cluster.jobs, "--working-dir", "."]
    command += ["--runtime-env", str(ROOT / "deploy" / "ray" / "runtime_env.yaml"), "--"]
    command += ["codistill", "ray", "experiment.yaml", "--run-dir", str(folder)]
    job = subprocess.Popen(
        ["ray", *command],
        cwd=work,
        env=cluster.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        harm(cluster, job, folder)
        output, _ = job.communicate(timeout=120)
    finally:
        job.kill()
        job.communicate()
    assert job.returncode == 0, output
    assert "step 300/300" in output
    assert f"report: {folder / 'report.html'}" in output
    assert TOKEN not in output
    assert_bit_equal(weights(folder), reference)
    assert (folder / "report.html").exists()
    assert processes_of(folder) == {}
    left = wait_for(lambda: nothing_left(cluster), "all is free again")
    assert left["groups"] == []


def nothing_left(cluster: Cluster) -> dict[str, Any] | None:
    left = cluster.ask("left")
    return left if left["free"] == left["of"] else None


def harm(cluster: Cluster, job: subprocess.Popen[str], folder: Path) -> None:
    """Kill a worker, a worker's actor, the server's actor, and the node that the server is on."""

    def reach(rounds: int) -> dict[str, int]:
        wait_for(lambda: job.poll() is not None or rounds_trained(folder) >= rounds, f"round {rounds}", 90)
        assert job.poll() is None, job.communicate()[0]
        return wait_for(lambda: len(found := processes_of(folder)) == 3 and found, "all are there")

    def await_restart(number: int, what: str) -> None:
        wait_for(lambda: len(restarts(folder)) == number, f"restart {number}")
        assert what in restarts(folder)[-1]

    os.kill(reach(20)["mlp"], signal.SIGKILL)
    await_restart(1, "mlp was killed by SIGKILL; started again")
    os.kill(parent(reach(70)["cnn"]), signal.SIGKILL)
    await_restart(2, "cnn was lost: its actor on node ")
    os.kill(parent(reach(120)["server"]), signal.SIGKILL)
    await_restart(3, "the server was lost: its actor on node ")
    server = reach(180)["server"]
    node = parent(parent(server))
    assert node in cluster.nodes
    there = sum(parent(parent(pid)) == node for pid in processes_of(folder).values())
    os.kill(node, signal.SIGKILL)  # what was on it is not ended by that
    wait_for(lambda: len(restarts(folder)) == 3 + there, "what was on the node is started again")
    # The actor follows its node's Ray within half a second, and may be missed before the node is.
    lost = re.compile(r"the server was lost: its (actor on )?node ")
    assert any(lost.search(line) for line in restarts(folder)[3:]), restarts(folder)


def test_a_ray_of_its_own_is_stopped_and_its_run_gone_on_with_on_a_cluster(
    cluster: Cluster, folder: Path, reference: dict[str, dict[str, torch.Tensor]]
) -> None:
    path = experiment_file(folder.parent, **CHANGES)
    command = ("ray", path, "--run-dir", folder)
    env = {**cluster.environment, "RAY_AUTH_MODE": "disabled"}
    own = start(*command, cwd=folder.parent, env=env)
    try:
        wait_for(lambda: own.poll() is not None or rounds_trained(folder) >= 30, "round 30", 90)
        where = json.loads((folder / "server.json").read_text())
        assert where["address"].startswith("127.0.0.1:"), "a Ray of its own is on loopback"
        session = wait_for(lambda: sessions_of(processes_of(folder)["server"]), "its Ray is known")
        own.send_signal(signal.SIGTERM)
        output, _ = own.communicate(timeout=60)
    finally:
        own.kill()
        own.communicate()
    assert own.returncode == ExitCode.INTERRUPTED, output
    assert f"stopped; continue with: codistill ray {path} --run-dir {folder}" in output
    assert processes_of(folder) == {}
    wait_for(lambda: not processes_with(session), "its Ray is gone")
    assert not Path(session).exists()

    code, output = run(*command, "--address", cluster.address, cwd=folder.parent, env=cluster.environment)
    assert code == 0, output
    assert "resumes from its checkpoint at step" in (folder / "students" / "cnn" / "log.txt").read_text()
    assert_bit_equal(weights(folder), reference)
    assert processes_of(folder) == {}
    assert wait_for(lambda: nothing_left(cluster), "all is free again")["groups"] == []


def sessions_of(pid: int) -> str:
    """Return the folder of the Ray whose actor started a process."""
    raylet = Path(f"/proc/{parent(parent(pid))}/cmdline").read_text(errors="replace")
    found = re.search(r"/tmp/codistill-ray-\w+", raylet)
    return "" if found is None else found[0]


def processes_with(text: str) -> list[str]:
    """Return the command lines that hold a text."""
    found: list[str] = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and text in (line := (entry / "cmdline").read_text(errors="replace")):
                found.append(line)
    return found


def test_a_cluster_without_what_is_asked_for(cluster: Cluster, folder: Path) -> None:
    changes = {
        **CHANGES,
        "students": [*CHANGES["students"], {"name": "large", "model": "mlp", "training": {"threads": 64}}],
    }
    path = experiment_file(folder.parent, **changes)
    command = ("ray", path, "--run-dir", folder, "--address", cluster.address, "--wait-for-resources", "3")
    code, output = run(*command, cwd=folder.parent, env=cluster.environment)
    assert code == ExitCode.NO_RESOURCES, output
    assert len(re.findall(r"waiting for the Ray cluster, [12] s left: student 'large' needs 64 CPUs", output)) == 1, (
        output
    )
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "student 'large' needs 64 CPUs and 0 GPUs, and no node has that left for it" in error
    assert not folder.joinpath("driver.json").exists()
    assert nothing_left(cluster)


@pytest.mark.parametrize(
    ("changes", "address", "code", "says"),
    [
        ({"RAY_AUTH_TOKEN": 40 * "b"}, None, ExitCode.REFUSED, "does not take the token; give the cluster's own with"),
        ({"RAY_AUTH_MODE": "disabled"}, None, ExitCode.REFUSED, "does not take the token; give the cluster's own with"),
        ({}, "127.0.0.1:1", ExitCode.UNREACHABLE, "no Ray cluster answers at 127.0.0.1:1; check the address"),
    ],
    ids=["a wrong token", "no token", "nobody there"],
)
def test_a_cluster_that_cannot_be_used(
    cluster: Cluster, folder: Path, changes: dict[str, str], address: str | None, code: ExitCode, says: str
) -> None:
    path = experiment_file(folder.parent, **CHANGES)
    command = ("ray", path, "--run-dir", folder, "--address", address or cluster.address)
    ended, output = run(*command, cwd=folder.parent, env={**cluster.environment, **changes})
    assert ended == code, output
    assert says in output
    assert TOKEN not in output
