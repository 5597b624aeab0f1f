"""How a process of codistill ends."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["ExitCode"]


class ExitCode(IntEnum):
    """The exit codes of every command; ``docs/exit-codes.md`` has a paragraph for each."""

    OK = 0
    """Everything asked for was done."""
    ERROR = 1
    """An error that has no other code; ``--debug`` shows its traceback."""
    USAGE = 2
    """The command line is wrong."""
    CONFIGURATION = 3
    """The experiment, a model, a data set or a checkpoint cannot be used as it is."""
    REFUSED = 4
    """Server and worker do not fit: another experiment, other data, other shapes or another protocol version. Or a token is
    missing or wrong, or one of them rejects the other's certificate."""
    UNREACHABLE = 5
    """The server, or the Ray cluster, could not be reached. Or it went away and did not come back within the time allowed."""
    GAVE_UP = 6
    """A round stayed open for longer than ``exchange.give_up_after``."""
    DIVERGED = 7
    """A student's logits or loss are no longer finite."""
    SUPERSEDED = 8
    """A newer worker of the same participant replaced this one."""
    WORKER_FAILED = 9
    """A process that the run needs has ended; the message shows its exit code and its last line."""
    OUT_OF_MEMORY = 10
    """The device ran out of memory."""
    HUNG = 11
    """An activity took longer than any legal wait, and a watchdog ended the process; the message names it. Or a process gave
    no heartbeat, and the command that started it killed it."""
    NO_RESOURCES = 12
    """The Ray cluster did not have the resources of the experiment within ``--wait-for-resources``."""
    STORAGE = 13
    """The run's folder cannot be written, or was deleted or moved. Or a disk is full, a quota used up, a file system
    read-only, or too many files are open. The line names the file, its disk and the space left."""
    DEVICE_FAILED = 14
    """A GPU failed, and the process could no longer use it: an assertion in a kernel, an illegal access, a failed launch, an
    ECC error. The line names the participant, the step and the driver's error."""
    INTERRUPTED = 130
    """Ctrl-C or SIGTERM. Every student was saved first, except one that could not do so within 30 s. That one is named and
    killed, and resumes from its last checkpoint. ``codistill serve`` ends with 0 instead."""
