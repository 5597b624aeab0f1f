"""Find the server that runs in a folder."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from codistill.process.exit_codes import ExitCode
from codistill.rundir.address import read_addresses
from codistill.rundir.layout import RunLayout
from codistill_deploy.errors import CommandError

__all__ = ["find_server"]

_POLL_SECONDS = 0.05


def find_server(run_dir: Path, seconds: float, stop: threading.Event) -> str:
    """Return the "HOST:PORT" of the server that runs in a folder, waiting for it to come up.

    Args:
        run_dir: the run's folder.
        seconds: how long to wait.
        stop: set to stop waiting.

    Raises:
        CommandError: no server came up in time.
    """
    path = RunLayout(run_dir).address_file
    deadline = time.monotonic() + seconds
    while True:
        addresses = read_addresses(path)
        if addresses is not None:
            return addresses.server
        if time.monotonic() >= deadline or stop.wait(_POLL_SECONDS):
            break
    raise CommandError(
        f"no server runs in {run_dir}: {path} is not there; start it with `codistill serve EXPERIMENT "
        f"--run-dir {run_dir}`",
        ExitCode.UNREACHABLE,
    )
