"""One process of a run on this machine, kept alive: started, watched, and started again where that can help."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from codistill_deploy.parent import PARENT_VARIABLE
from codistill_deploy.restarts import DEFAULT_RESTARTS, Ending, GiveUp, Restart, decide
from codistill_server.app import ServerError, parse_address

__all__ = ["Launch", "Member", "Port"]

_log = logging.getLogger(__name__)
_KILL_SECONDS = 5.0
_RETRY_SECONDS = 5.0
_LOG_TAIL = 65536


@dataclass(frozen=True)
class Launch:
    """How processes are started.

    Attributes:
        environment: their environment.
        pipe: the reading end of the pipe that ties them to this process; see :mod:`codistill_deploy.parent`.
        keep: further descriptors that they inherit.
        restarts: how often each is started again.
    """

    environment: Mapping[str, str]
    pipe: int
    keep: tuple[int, ...] = ()
    restarts: int = DEFAULT_RESTARTS


class Member:
    """A process that the run needs, through all its lives.

    Args:
        title: what people call it.
        student: the student that it trains; "" for the server.
        arguments: its command line.
        log: the file that its output is appended to.
        launch: how it is started.
        ends: whether the exit code 0 means that it has done its part; a server never has.

    Attributes:
        ending: how it ended last, if that was not asked for and it did not do its part.
        given_up: why it is not started again; None while it is.
    """

    def __init__(
        self, title: str, student: str, arguments: Sequence[str], log: Path, launch: Launch, *, ends: bool = True
    ) -> None:
        self.title = title
        self.student = student
        self.log = log
        self.ending: Ending | None = None
        self.given_up: str | None = None
        self._arguments = [*arguments]
        self._launch = launch
        self._ends = ends
        self._history: list[Ending] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._log_file: BinaryIO | None = None
        self._log_start = 0
        self._started = 0.0
        self._due: float | None = None

    @property
    def running(self) -> bool:
        """Whether its process runs now."""
        return self.code is None and self._process is not None

    @property
    def code(self) -> int | None:
        """Its process's exit code; None while that runs."""
        return None if self._process is None else self._process.poll()

    @property
    def done(self) -> bool:
        """Whether it has done its part."""
        return self._ends and self.code == 0

    def start(self, now: float) -> None:
        """Starts its process.

        Raises:
            OSError: there is no memory, no process or no disk space for it.
        """
        launch = self._launch
        self._close_log()
        self._log_file = self.log.open("ab")
        self._log_start = self.log.stat().st_size
        self._started, self._due = now, None
        # A session of its own keeps the terminal's Ctrl-C from it: what it is told, the parent tells it.
        self._process = subprocess.Popen(
            self._arguments,
            stdin=subprocess.DEVNULL,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            env={**launch.environment, PARENT_VARIABLE: str(launch.pipe)},
            pass_fds=(launch.pipe, *launch.keep),
            start_new_session=True,
        )

    def attend(self, now: float, *, start: bool = True) -> Restart | GiveUp | None:
        """Takes in that the process ended, or starts it again when it is time.

        Args:
            now: seconds of a clock that never goes back.
            start: False once the run is over, so that nothing is started any more.

        Returns:
            What was decided, once for each ending; `ending` says how it ended. None if nothing is new.
        """
        if self.given_up is not None or self.running or self.done:
            return None
        if self._due is not None:
            if start and now >= self._due:
                self._start_again(now)
            return None
        ending = self.examine(now)
        decision = decide(ending, self._history, self._launch.restarts, deterministic=self._ends)
        self._history.append(ending)
        if isinstance(decision, Restart):
            self._due = now + decision.after
        else:
            self.given_up = decision.reason
        return decision

    def _start_again(self, now: float) -> None:
        try:
            self.start(now)
        except OSError as error:  # no memory or no disk space for now; those who wait for this process bound it
            self._due = now + _RETRY_SECONDS
            _log.error("%s cannot be started again: %s; trying again in %g s", self.title, error, _RETRY_SECONDS)

    def examine(self, now: float) -> Ending:
        """Returns how the process, which has ended, did so."""
        code = self.code
        assert code is not None  # noqa: S101 - the caller looked
        self.ending = Ending(code, self._last_error() if code > 0 else "", now - self._started)
        return self.ending

    def tell(self, number: signal.Signals) -> None:
        """Sends a signal if it runs."""
        if self.running and self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def close(self) -> None:
        """Kills it if it runs, even if it is stopped, and closes its log."""
        self.tell(signal.SIGKILL)
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # the kernel holds it, on a dead disk perhaps
                self._process.wait(_KILL_SECONDS)
        self._close_log()

    def _last_error(self) -> str:
        """Returns the last error line that it printed in this life, or its last line; it is near the log's end."""
        try:
            with self.log.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(self._log_start, end - _LOG_TAIL))
                lines = file.read(_LOG_TAIL).decode(errors="replace").splitlines()
        except OSError as error:
            return f"its log cannot be read: {error.strerror}"
        errors = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
        return errors[-1] if errors else (lines[-1].strip() if lines else "it printed nothing")

    def _close_log(self) -> None:
        if self._log_file is not None:
            self._log_file.close()
            self._log_file = None


class Port:
    """An address that a server can come back to.

    A free port is chosen here, once. The bound socket that is kept does not listen: it lets our server bind the port too,
    and keeps it from everybody else while the server is away, be it the kernel that looks for a client's port. A worker
    that tries to reach the absent server could otherwise be given that very port and be connected to itself.

    Attributes:
        address: "HOST:PORT"; as given where it cannot be bound, so that the server can say why.
    """

    def __init__(self, address: str, field: str) -> None:
        self.address = address
        self._socket: socket.socket | None = None
        with contextlib.suppress(ServerError, OSError):
            host, port = parse_address(address, field)
            kept = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            try:
                kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                kept.bind((host, port))
                bound = kept.getsockname()[1]
            except BaseException:
                kept.close()
                raise
            self.address = f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"
            if sys.platform == "linux":
                self._socket = kept
            else:  # elsewhere two sockets cannot bind one port in this way
                kept.close()

    def close(self) -> None:
        """Lets the port go."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
