"""Shared by the tests of the server's process: a server on a thread, and waiting for it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codistill.config.experiment import Experiment
from codistill.process.exit_codes import ExitCode
from codistill.rundir.layout import RunLayout
from codistill_server.app import ServeOptions, serve
from server.support import make_experiment

PATIENCE = 60.0
SERVICE = "codistill.v1.DistillationService"


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {PATIENCE} s: {what}")


@dataclass
class Served:
    """A server on a thread of this process."""

    run_dir: Path
    stop: threading.Event
    thread: threading.Thread
    outcome: list[ExitCode | Exception]
    announced: dict[str, Any]

    @property
    def address(self) -> str:
        return self.announced["address"]

    def end(self) -> ExitCode | Exception:
        """Wait until the server has ended by itself; return how."""
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        return self.outcome[0]


@contextlib.contextmanager
def serving(
    folder: Path, experiment: Experiment | None = None, listen: str = "127.0.0.1:0", **options: Any
) -> Generator[Served]:
    run_dir, stop, outcome = folder / "run", threading.Event(), list[ExitCode | Exception]()
    experiment = experiment or make_experiment()

    def work() -> None:
        try:
            outcome.append(serve(experiment, ServeOptions(listen, run_dir, **options), stop))
        except Exception as error:  # noqa: BLE001 - handed to the test
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        until(lambda: (RunLayout(run_dir).address_file).exists() or outcome, "the server announces itself")
        assert not outcome, outcome[0]
        yield Served(run_dir, stop, thread, outcome, json.loads((RunLayout(run_dir).address_file).read_text()))
    finally:
        stop.set()
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert not (RunLayout(run_dir).address_file).exists(), "the address goes with the server"


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:  # noqa: S310 - the server of this test
        return answer.read().decode()
