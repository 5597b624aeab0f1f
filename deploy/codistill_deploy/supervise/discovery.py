"""Finds the server that runs in a folder."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from codistill.process.exit_codes import ExitCode
from codistill.rundir.address import ADDRESS_FILE
from codistill_deploy.errors import CommandError

__all__ = ["Addresses", "addresses", "find_server"]

_POLL_SECONDS = 0.05
_LOOPBACK = ("127.", "localhost:", "[::1]:")


@dataclass(frozen=True)
class Addresses:
    """Where a server is reached: "HOST:PORT" of each; `metrics` is "" where there are none."""

    server: str
    metrics: str

    def __str__(self) -> str:
        apart = self.metrics.startswith(_LOOPBACK) and not self.server.startswith(_LOOPBACK)
        where = " on the server's own machine" if apart else ""
        web = f"http://{self.metrics}"
        return f"live page{where}: {web}/ (server {self.server}, metrics on {web}/metrics)"


def addresses(run_dir: Path) -> Addresses | None:
    """Returns where the server that runs in a folder is reached; None if there is none."""
    try:
        written = json.loads((run_dir / ADDRESS_FILE).read_text(encoding="utf-8"))
        return Addresses(str(written["address"]), str(written["metrics"]))
    except (OSError, ValueError, KeyError):
        return None


def find_server(run_dir: Path, seconds: float, stop: threading.Event) -> str:
    """Returns the address of the server that runs in a folder, waiting for it to come up.

    Args:
        run_dir: the run's folder.
        seconds: how long to wait.
        stop: set to stop waiting.

    Raises:
        CommandError: no server came up in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = addresses(run_dir)
        if found is not None:
            return found.server
        if time.monotonic() >= deadline or stop.wait(_POLL_SECONDS):
            break
    raise CommandError(
        f"no server runs in {run_dir}: {run_dir / ADDRESS_FILE} is not there; start it with `codistill serve EXPERIMENT "
        f"--run-dir {run_dir}`",
        ExitCode.UNREACHABLE,
    )
