"""One process that a run needs: started, polled, and restarted where that can help."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from codistill.process.exit_codes import ExitCode
from codistill.rundir.storage import detail, outlasts_restarts
from codistill_deploy.supervise.restart_policy import DEFAULT_RESTARTS, Ending, GiveUp, Restart, decide

__all__ = ["Child", "ManagedProcess"]


class ManagedProcess(Protocol):
    """One process from its start to its end, here (:class:`codistill_deploy.supervise.process.Process`) or elsewhere."""

    @property
    def code(self) -> int | None:
        """The exit code; None while the process runs."""
        ...

    def ending(self, ran: float) -> Ending:
        """Return how the process ended.

        Args:
            ran: for how many seconds it ran. It must have ended.
        """
        ...

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal if the process runs."""
        ...

    def close(self) -> None:
        """Kill the process if it runs, and free what it holds."""
        ...


class Child:
    """A process that the run needs, through all its restarts.

    Args:
        title: its name for people.
        participant: the student or teacher whose worker it is; "" for the server.
        start_process: starts the process; an OSError says that it cannot be started now.
        log: the file that holds its output.
        restarts: how often it is restarted.
        finishes: whether the exit code 0 means that its work is done; a server's never is.
        serves: returns whether it serves now. Its errors come back for ever until it has; always of a process that finishes.

    Attributes:
        ending: how it ended last, if its work was not done.
        given_up: why it is not restarted; None while it is.
    """

    def __init__(
        self,
        title: str,
        participant: str,
        start_process: Callable[[], ManagedProcess],
        log: Path,
        restarts: int = DEFAULT_RESTARTS,
        *,
        finishes: bool = True,
        serves: Callable[[], bool] = lambda: False,
    ) -> None:
        self.title = title
        self.participant = participant
        self.log = log
        self.ending: Ending | None = None
        self.given_up: str | None = None
        self._start_process = start_process
        self._restarts = restarts
        self._finishes = finishes
        self._serves = serves
        self._served = False
        self._earlier_endings: list[Ending] = []
        self._process: ManagedProcess | None = None
        self._started_at = 0.0
        self._restart_at: float | None = None

    @property
    def running(self) -> bool:
        """Whether its process runs now."""
        return self._process is not None and self._process.code is None

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return None if self._process is None else self._process.code

    @property
    def done(self) -> bool:
        """Whether its work is done."""
        return self._finishes and self.code == 0

    def start(self, now: float) -> None:
        """Start its process.

        Raises:
            OSError: there is no memory, no process or no disk space for it.
        """
        self.close()
        self._started_at, self._restart_at = now, None
        self._process = self._start_process()

    def poll(self, now: float, *, restart: bool = True) -> Restart | GiveUp | None:
        """Decide what follows where it ended, or restart it when that is due.

        Args:
            now: seconds of a clock that never goes back.
            restart: False once the run is over, so that nothing is started any more.

        Returns:
            What was decided, once for each ending; `ending` says how it ended. None if nothing is new.
        """
        self._served = self._served or self._serves()
        if self.given_up is not None or self.running or self.done:
            return None
        if self._restart_at is None:
            ending = self.record_ending(now)
        else:
            if not restart or now < self._restart_at:
                return None
            failed = self._restart(now)
            if failed is None:
                return None
            ending = failed
        decision = decide(ending, self._earlier_endings, self._restarts, deterministic=not self._served)
        self._earlier_endings.append(ending)
        if isinstance(decision, Restart):
            self._restart_at = now + decision.after
        else:
            self.given_up = decision.reason
        return decision

    def _restart(self, now: float) -> Ending | None:
        """Start it again; return an ending where that cannot be done now."""
        try:
            self.start(now)
        except OSError as error:
            lasts = outlasts_restarts(error) or not self.log.parent.is_dir()
            code = ExitCode.STORAGE if lasts else ExitCode.WORKER_FAILED
            self.ending = Ending(code, f"{error}{detail(error, self.log)}", started=False)
            return self.ending
        return None

    def record_ending(self, now: float) -> Ending:
        """Record how its process ended, and return it; the process must have ended."""
        assert self._process is not None  # noqa: S101 - the caller looked
        self.ending = self._process.ending(now - self._started_at)
        return self.ending

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal if it runs."""
        if self._process is not None:
            self._process.send_signal(number)

    def close(self) -> None:
        """Kill it if it runs, and free what it holds."""
        if self._process is not None:
            self._process.close()
