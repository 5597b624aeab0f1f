"""Times on the wire: protobuf's durations, from seconds and back."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

__all__ = ["LONGEST", "duration", "is_valid", "seconds"]

_NANOS = 1_000_000_000
LONGEST = 315_576_000_000
"""The longest duration in seconds: protobuf's own limit, ten thousand years."""


def duration(seconds: float) -> Duration:
    """Return a time span in protobuf's form, to the nanosecond.

    Args:
        seconds: the span, 0 or more.
    """
    whole, nanos = divmod(round(seconds * _NANOS), _NANOS)
    return Duration(seconds=whole, nanos=nanos)


def seconds(duration: Duration) -> float:
    """Return a time span in seconds."""
    return duration.seconds + duration.nanos / _NANOS


def is_valid(duration: Duration) -> bool:
    """Return whether a duration from outside is one, and not negative."""
    return 0 <= duration.seconds <= LONGEST and 0 <= duration.nanos < _NANOS
