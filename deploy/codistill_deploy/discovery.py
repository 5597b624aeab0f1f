"""Finds the server that runs in a folder."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

from codistill.exit_codes import ExitCode
from codistill_deploy.errors import CommandError
from codistill_server.app import ADDRESS_FILE

__all__ = ["find_server"]

_POLL_SECONDS = 0.05


def find_server(run_dir: Path, seconds: float, stop: threading.Event) -> str:
    """Returns the address of the server that runs in a folder, waiting for it to come up.

    Args:
        run_dir: the run's folder.
        seconds: how long to wait.
        stop: set to stop waiting.

    Raises:
        CommandError: no server came up in time.
    """
    path = run_dir / ADDRESS_FILE
    deadline = time.monotonic() + seconds
    while True:
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["address"])
        except (OSError, ValueError, KeyError):
            if time.monotonic() >= deadline or stop.wait(_POLL_SECONDS):
                break
    raise CommandError(
        f"no server runs in {run_dir}: {path} is not there; start it with `codistill serve EXPERIMENT --run-dir {run_dir}`",
        ExitCode.UNREACHABLE,
    )
