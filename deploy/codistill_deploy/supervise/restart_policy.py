"""Whether a process that ended is restarted: a pure policy, without a clock and without processes.

What ended because of the machine or of others (a signal, no memory, a server that went away) is restarted, after a
pause that doubles. What ended because of itself is not: steps are deterministic, so an error that comes back at the same
place comes back for ever.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from codistill.process.exit_codes import ExitCode

__all__ = ["DEFAULT_RESTARTS", "RAN_WELL", "RESTARTS_OFF", "Ending", "GiveUp", "Restart", "decide"]

DEFAULT_RESTARTS = 10
RESTARTS_OFF = "restarts are turned off"

RAN_WELL = 600.0
"""A process that ran for so many seconds gets its restarts back."""

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 10.0
_NEVER = {
    ExitCode.USAGE: "the command line stays wrong",
    ExitCode.CONFIGURATION: "its cause stays",
    ExitCode.REFUSED: "its cause stays",
    ExitCode.DIVERGED: "a repeated step is the same step, so it would diverge again",
    ExitCode.SUPERSEDED: "another worker has taken this participant over",
    ExitCode.STORAGE: "a restart makes no room and brings no folder back",
}
_NOT_ITS_OWN = (ExitCode.INTERRUPTED, ExitCode.OUT_OF_MEMORY)
_WAITS = (ExitCode.GAVE_UP, ExitCode.HUNG, ExitCode.UNREACHABLE)
# A process id, a port, an object's address, a temporary file: they differ from start to start. A round does not.
_OF_ONE_START = re.compile(r"(?<!round )(?<!step )(?<!epoch )\b(?:\w*\d\w*|tmp\w{8})\b")


@dataclass(frozen=True)
class Ending:
    """How a process ended.

    Attributes:
        code: its exit code; a signal's number, negative, if that killed it.
        line: the last error that it printed, or its last line.
        ran: for how many seconds it ran.
        lost: half a sentence on the loss of the machine that it ran on, where that ended it; else "".
        started: whether it ran at all; if not, `line` says what prevented it.
    """

    code: int
    line: str = ""
    ran: float = 0.0
    lost: str = ""
    started: bool = True

    def __str__(self) -> str:
        if self.lost:
            return f"was lost: {self.lost}"
        if not self.started:
            return f"could not be started: {self.line}"
        if self.code < 0:
            return f"was killed by {_signal_name(-self.code)}"
        if self.code == ExitCode.OK:
            return "ended before the run did"
        return f"ended with exit code {self.code}: {self.line}"

    def same_error(self, other: Ending) -> bool:
        """Return whether both are the same error of the process itself, apart from numbers that differ between starts.

        A signal, a request to end, a lack of memory, and a start that failed are no such errors.
        """
        if self.code != other.code or self.code <= 0 or self.code in _NOT_ITS_OWN or not self.started:
            return False
        return _OF_ONE_START.sub("#", self.line) == _OF_ONE_START.sub("#", other.line)


@dataclass(frozen=True)
class Restart:
    """Restart it after `after` seconds: restart `number` of at most `limit`."""

    after: float
    number: int
    limit: int


@dataclass(frozen=True)
class GiveUp:
    """Do not restart it; `reason` says why, as half a sentence."""

    reason: str


def decide(ending: Ending, earlier: Sequence[Ending], limit: int, *, deterministic: bool = True) -> Restart | GiveUp:
    """Decide whether to restart a process that ended although the run needs it.

    Args:
        ending: how it ended.
        earlier: how it ended before, oldest first; it was restarted each time.
        limit: how often it may be restarted before it has run well.
        deterministic: whether the same error comes back for ever. A worker repeats its steps, so it does. The errors of a
            server that has served depend on its callers and its disk.
    """
    if limit == 0:
        return GiveUp(RESTARTS_OFF)
    if ending.code in _NEVER:
        return GiveUp(_NEVER[ExitCode(ending.code)])
    recent = _since_it_ran_well([*earlier, ending])
    if deterministic and len(recent) > 1 and ending.same_error(recent[-2]):
        return GiveUp("the same error came twice in a row, so it would come again")
    if len(recent) > limit:
        return GiveUp(f"{limit} restart{'s are' if limit > 1 else ' is'} used up")
    number = len(recent)
    return Restart(min(_FIRST_PAUSE * 2 ** min(number - 1, 30), _LONGEST_PAUSE), number, limit)


def _since_it_ran_well(endings: Sequence[Ending]) -> Sequence[Ending]:
    """Return the endings from the last good run's on; a run that ended in a long wait was not a good one."""
    good_runs = [index for index, ending in enumerate(endings) if ending.ran >= RAN_WELL and ending.code not in _WAITS]
    return endings[good_runs[-1] :] if good_runs else endings


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
