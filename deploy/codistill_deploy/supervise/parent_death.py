"""End a child process when the process that started it ends.

The parent holds the writing end of a pipe and each child the reading end. However the parent ends, SIGKILL included,
the kernel closes its end, the child reads the end of the file, and stops.
"""

from __future__ import annotations

import logging
import os
import threading

from codistill.process.exit_codes import ExitCode

__all__ = ["PARENT_VARIABLE", "exit_with_parent"]

_log = logging.getLogger(__name__)

PARENT_VARIABLE = "CODISTILL_PARENT_FD"
"""The environment variable that names the pipe's descriptor to a child."""

_GRACE_SECONDS = 10.0


def exit_with_parent(stop: threading.Event) -> bool:
    """Set `stop` when the parent dies, and exit at once if that has not ended this process within 10 s.

    Returns:
        Whether there is a parent; in a process that no supervisor started, nothing is done.
    """
    value = os.environ.pop(PARENT_VARIABLE, "")
    if not value.isdigit():
        return False
    descriptor = int(value)

    def wait() -> None:
        os.read(descriptor, 1)
        _log.error("the process that started this one is gone; stopping")
        stop.set()
        threading.Event().wait(_GRACE_SECONDS)
        os._exit(ExitCode.INTERRUPTED)

    threading.Thread(target=wait, name="codistill-parent", daemon=True).start()
    return True
