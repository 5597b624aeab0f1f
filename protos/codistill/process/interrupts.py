"""Tells a KeyboardInterrupt of a signal from one that a user's code raises."""

from __future__ import annotations

import signal

__all__ = ["SignalInterrupt", "is_interrupt", "mark_interrupts", "raise_interrupt"]


_RAISE_NONE = ("codistill", "asyncio.unix_events")  # modules of handlers


class SignalInterrupt(KeyboardInterrupt):
    """A signal asks the process to end."""


def raise_interrupt(number: int, frame: object) -> None:
    """Raise SignalInterrupt: a handler of signals."""
    del number, frame
    raise SignalInterrupt


def mark_interrupts() -> None:
    """Let Ctrl-C raise SignalInterrupt where Python's own handler would raise KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, raise_interrupt)


def is_interrupt(error: BaseException) -> bool:
    """Return whether an error may come from a signal.

    A handler of codistill's never raises a plain KeyboardInterrupt, nor does one of an asyncio loop. Python's own handler, or
    a library's, may.
    """
    if not isinstance(error, KeyboardInterrupt) or isinstance(error, SignalInterrupt):
        return isinstance(error, SignalInterrupt)
    handler = signal.getsignal(signal.SIGINT)
    return callable(handler) and not getattr(handler, "__module__", "").startswith(_RAISE_NONE)
