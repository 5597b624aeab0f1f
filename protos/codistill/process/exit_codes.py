"""How a process of codistill ends."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["ExitCode"]


class ExitCode(IntEnum):
    """The exit codes of every command; ``docs/exit-codes.md`` has a paragraph for each."""

    OK = 0
    """Everything asked for was done."""
    ERROR = 1
    """An error that none of the others names; ``--debug`` shows its traceback."""
    USAGE = 2
    """The command line is wrong."""
    CONFIGURATION = 3
    """The experiment, a model, a data set or a checkpoint cannot be used as it is."""
    REFUSED = 4
    """Server and worker do not go together: another experiment, other data, other shapes, another protocol, no token or the
    wrong one, a certificate that one of them does not take."""
    UNREACHABLE = 5
    """The server, or the Ray cluster, could not be reached, or went away and did not come back within the time allowed."""
    GAVE_UP = 6
    """A round stayed open for longer than ``exchange.give_up_after``."""
    DIVERGED = 7
    """A student's logits or loss are not finite any more."""
    SUPERSEDED = 8
    """A newer worker of the same student took this one's place."""
    WORKER_FAILED = 9
    """A process that the run needs ended; its own code and its last line are shown."""
    OUT_OF_MEMORY = 10
    """The device ran out of memory."""
    HUNG = 11
    """Something took longer than any legal wait; a watchdog ended the process, its line says what and for how long. Or a process
    gave no sign of life, and the command that started it killed it."""
    NO_RESOURCES = 12
    """The Ray cluster does not have what the experiment asks for, and did not get it within ``--wait-for-resources``."""
    INTERRUPTED = 130
    """Ctrl-C or SIGTERM; every student was saved first, but for one that could not do so within 30 s: a line names it, it is killed,
    and it goes on from its last checkpoint. Not for ``codistill serve``, which ends with 0 when it is told to."""
