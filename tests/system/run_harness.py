"""A run whose parts are started one by one: a server, and workers behind a proxy each, so that one can be harmed alone."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import torch
from rich.console import Console

from codistill.config.experiment import load
from codistill.v1 import distillation_pb2 as pb
from codistill.v1.distillation_pb2_grpc import DistillationServiceStub
from codistill_deploy.console.progress import PlainProgress
from codistill_deploy.launch.in_process import run_in_process
from codistill_deploy.run_folder import RunFolder
from system.proxy import Proxy
from system.support import EXPERIMENT, experiment_file, rounds_trained, start, wait_for, weights

STUDENTS = ("mlp", "cnn")
ROUNDS = 300
CHANGES: dict[str, Any] = {
    "training__epochs": ROUNDS // 5,
    "training__evaluate_every": 20,
    "students": [each for each in EXPERIMENT["students"] if each["name"] in STUDENTS],
}
PACE = 0.004
"""Seconds that a good link takes each way here, so that a run lasts long enough for things to happen to it."""


ALL_WELL = {"mlp": 0, "cnn": 0, "server": 0}


def undisturbed(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Train the run in one process; return the weights that it ends with."""
    experiment = load(experiment_file(folder, **CHANGES))
    run = RunFolder(folder / "run")
    run.start(experiment, mode="in-process", resume=False)
    assert run_in_process(experiment, run, PlainProgress(Console(quiet=True)), threading.Event()) == 0
    return weights(run.path)


class Run:
    """A server and workers as processes, each worker behind a proxy."""

    def __init__(self, folder: Path, run_dir: Path | None = None, **changes: Any) -> None:
        self.folder = run_dir or folder / "run"
        self._cwd = folder
        self.path = experiment_file(folder, **{**CHANGES, **changes})
        self.workers: dict[str, subprocess.Popen[str]] = {}
        self.proxies: dict[str, Proxy] = {}
        self._processes: list[subprocess.Popen[str]] = []
        self.address = ""
        self.server = self.serve()

    def serve(self) -> subprocess.Popen[str]:
        """Start the server, again if need be, and have the proxies lead to it."""
        address_file = self.folder / "server.json"
        address_file.unlink(missing_ok=True)
        server = self._start("serve", self.path, "--listen", "127.0.0.1:0", "--run-dir", self.folder)
        wait_for(lambda: address_file.exists() or server.poll() is not None, "the server is up")
        assert server.poll() is None, server.communicate()[0]
        self.address = json.loads(address_file.read_text())["address"]
        for proxy in self.proxies.values():
            proxy.upstream = self.address
        self.server = server
        return server

    def work(self, student: str, run_dir: Path | None = None) -> subprocess.Popen[str]:
        """Start a worker behind its proxy."""
        if student not in self.proxies:
            proxy = self.proxies[student] = Proxy(self.address, seed=len(self.proxies))
            proxy.up.delay = proxy.down.delay = PACE
        options = ["--student", student, "--server", self.proxies[student].address]
        worker = self._start("work", self.path, *options, "--run-dir", run_dir or self.folder)
        self.workers[student] = worker
        return worker

    def _start(self, *arguments: Any) -> subprocess.Popen[str]:
        process = start(*arguments, cwd=self._cwd)
        self._processes.append(process)
        return process

    def links(self, **settings: Any) -> None:
        """Set every link alike, both ways."""
        for proxy in self.proxies.values():
            for link in (proxy.up, proxy.down):
                for name, value in settings.items():
                    assert hasattr(link, name)
                    setattr(link, name, value)

    def count(self, what: Callable[[Proxy], int]) -> int:
        return sum(what(proxy) for proxy in self.proxies.values())

    def until(self, condition: Callable[[], object], what: str, seconds: float = 120) -> None:
        """Wait for a condition; a process that ends meanwhile ends the wait."""

        def over() -> bool:
            ended = {name: each.returncode for name, each in self.workers.items() if each.poll() not in (None, 0)}
            assert not ended, f"while waiting until {what}: {ended}\n" + "\n".join(
                self.workers[name].communicate()[0] for name in ended
            )
            return bool(condition())

        wait_for(over, what, seconds)

    def progress(self, rounds: int) -> None:
        """Wait until so many more rounds are closed."""
        reached = rounds_trained(self.folder)
        assert reached + rounds < ROUNDS, "the run is too short for all that is to happen to it"
        self.until(lambda: rounds_trained(self.folder) >= reached + rounds, f"{rounds} rounds after round {reached}")

    def ended(self) -> dict[str, int]:
        """Wait for every process; return the exit codes, and show what was printed if one is not 0."""
        codes: dict[str, int] = {}
        for name, process in {**self.workers, "server": self.server}.items():
            output, _ = process.communicate(timeout=90)
            codes[name] = process.returncode
            if process.returncode:
                print(f"--- {name}\n{output}")
        return codes

    def events(self, what: str) -> list[str]:
        """Return whom the events of a kind concern."""
        path = self.folder / "events.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line["participant"] for line in lines if line["what"] == what]

    def state(self) -> pb.Run:
        with grpc.insecure_channel(self.address) as channel:
            return DistillationServiceStub(channel).GetRun(pb.GetRunRequest(), timeout=20).run

    def connected(self) -> set[str]:
        return {each.name for each in self.state().participants if each.state == pb.PARTICIPANT_STATE_CONNECTED}

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            if process.stdout is not None and not process.stdout.closed:
                print(f"--- {' '.join(map(str, process.args))}\n{process.communicate()[0]}")  # for a test that fails
        for proxy in self.proxies.values():
            proxy.close()


@contextlib.contextmanager
def running(
    folder: Path, run_dir: Path | None = None, workers: tuple[str, ...] = STUDENTS, **changes: Any
) -> Iterator[Run]:
    """Start a server and workers, and end what is left of them.

    Args:
        folder: where the experiment file goes, and the run's folder unless it is given.
        run_dir: the run's folder.
        workers: the students whose workers to start.
        changes: of the experiment.
    """
    run = Run(folder, run_dir, **changes)
    try:
        for student in workers:
            run.work(student)
        yield run
    finally:
        run.close()
