"""A command's own process: where modules are found, and what a signal does."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

__all__ = ["find_modules_beside", "stop_on_signals"]


def find_modules_beside(experiment: Path) -> None:
    """Let `package.module:callable` be found in the working folder and in the experiment file's."""
    folders = (str(experiment.resolve().parent), str(Path.cwd()))
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]  # each of several runs asks for it


def stop_on_signals() -> threading.Event:
    """Return an event that the first Ctrl-C or SIGTERM sets; the second ends the process at once."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        del number, frame
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return stop
