"""A run with a process for the server and each participant, started cheaply.

A process that has imported torch is forked for each, so a start costs a tenth of that of the command. What runs in them
is what the command runs: :func:`codistill_server.app.serve` and :func:`codistill_worker.app.work`.
"""

from __future__ import annotations

import json
import multiprocessing
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from codistill.config.experiment import Experiment
from codistill.rundir.layout import RunLayout
from codistill_server.app import ServeOptions, serve
from codistill_worker.app import WorkOptions, work
from system.support import rounds_trained, wait_for

_START = multiprocessing.get_context("forkserver")
_START.set_forkserver_preload(["codistill_server.app", "codistill_worker.app", "system.forked"])
_SECONDS = 60


def _serve(experiment: Experiment, folder: Path) -> None:
    raise SystemExit(serve(experiment, ServeOptions("127.0.0.1:0", folder)))


def _work(experiment: Experiment, name: str, address: str, folder: Path) -> None:
    raise SystemExit(work(experiment, WorkOptions(name, address, folder)))


def run_forked(experiment: Experiment, folder: Path, kill: str = "", after: int = 0) -> None:
    """Run an experiment to its end; every process must end well.

    Args:
        experiment: what to run.
        folder: the run's folder; it must be there.
        kill: a student or teacher that is killed once and started again.
        after: so many closed rounds later.
    """
    server = _START.Process(target=_serve, args=(experiment, folder))
    processes = {"the server": server}
    try:
        server.start()
        file = RunLayout(folder).address_file
        wait_for(file.exists, "the server's address")
        address = str(json.loads(file.read_text())["address"])

        def begin(name: str) -> None:
            processes[name] = _START.Process(target=_work, args=(experiment, name, address, folder))
            processes[name].start()

        for name in experiment.participants:
            begin(name)
        if kill:
            wait_for(lambda: rounds_trained(folder) >= after, "rounds to close")
            assert processes[kill].is_alive(), "it has finished before it could be killed"
            _end([processes[kill]])
            begin(kill)
        for process in processes.values():
            process.join(_SECONDS)
        assert {name: process.exitcode for name, process in processes.items()} == dict.fromkeys(processes, 0)
    finally:
        _end(list(processes.values()))


def _end(processes: list[ForkServerProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
