"""One part of a run, kept alive: started, watched, and started again where that can help."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from codistill.process.exit_codes import ExitCode
from codistill_deploy.supervise.restart_policy import DEFAULT_RESTARTS, Ending, GiveUp, Restart, decide

__all__ = ["Child", "ManagedProcess"]


class ManagedProcess(Protocol):
    """One life of a member: a process, here (:class:`codistill_deploy.supervise.process.Process`) or elsewhere."""

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        ...

    def ending(self, ran: float) -> Ending:
        """Returns how it ended, which it has, after so many seconds."""
        ...

    def tell(self, number: signal.Signals) -> None:
        """Sends a signal if it runs."""
        ...

    def close(self) -> None:
        """Kills it if it runs, and frees what it holds."""
        ...


class Child:
    """A part that the run needs, through all its lives.

    Args:
        title: what people call it.
        student: the student that it trains; "" for the server.
        begin: begins a life; an OSError says that it cannot be begun now.
        log: the file that holds its output.
        restarts: how often it is started again.
        ends: whether the exit code 0 means that it has done its part; a server never has.

    Attributes:
        ending: how it ended last, if that was not asked for and it did not do its part.
        given_up: why it is not started again; None while it is.
    """

    def __init__(
        self,
        title: str,
        student: str,
        begin: Callable[[], ManagedProcess],
        log: Path,
        restarts: int = DEFAULT_RESTARTS,
        *,
        ends: bool = True,
    ) -> None:
        self.title = title
        self.student = student
        self.log = log
        self.ending: Ending | None = None
        self.given_up: str | None = None
        self._begin = begin
        self._restarts = restarts
        self._ends = ends
        self._history: list[Ending] = []
        self._life: ManagedProcess | None = None
        self._started = 0.0
        self._due: float | None = None

    @property
    def running(self) -> bool:
        """Whether it lives now."""
        return self._life is not None and self._life.code is None

    @property
    def code(self) -> int | None:
        """Its exit code; None while it lives."""
        return None if self._life is None else self._life.code

    @property
    def done(self) -> bool:
        """Whether it has done its part."""
        return self._ends and self.code == 0

    def start(self, now: float) -> None:
        """Begins a life of it.

        Raises:
            OSError: there is no memory, no process or no disk space for it.
        """
        self.close()
        self._started, self._due = now, None
        self._life = self._begin()

    def poll(self, now: float, *, start: bool = True) -> Restart | GiveUp | None:
        """Takes in that it ended, or starts it again when it is time.

        Args:
            now: seconds of a clock that never goes back.
            start: False once the run is over, so that nothing is started any more.

        Returns:
            What was decided, once for each ending; `ending` says how it ended. None if nothing is new.
        """
        if self.given_up is not None or self.running or self.done:
            return None
        if self._due is not None:
            if not start or now < self._due or self._start_again(now):
                return None
        else:
            self.examine(now)
        ending = self.ending
        assert ending is not None  # noqa: S101 - it ended, or could not be started
        decision = decide(ending, self._history, self._restarts, deterministic=self._ends)
        self._history.append(ending)
        if isinstance(decision, Restart):
            self._due = now + decision.after
        else:
            self.given_up = decision.reason
        return decision

    def _start_again(self, now: float) -> bool:
        """Starts it again; where that cannot be done now, its next life has ended."""
        try:
            self.start(now)
        except OSError as error:
            self.ending = Ending(ExitCode.WORKER_FAILED, str(error), started=False)
            return False
        return True

    def examine(self, now: float) -> Ending:
        """Returns how it ended, which it has."""
        assert self._life is not None  # noqa: S101 - the caller looked
        self.ending = self._life.ending(now - self._started)
        return self.ending

    def tell(self, number: signal.Signals) -> None:
        """Sends a signal if it lives."""
        if self._life is not None:
            self._life.tell(number)

    def close(self) -> None:
        """Kills it if it lives, and frees what it holds."""
        if self._life is not None:
            self._life.close()
