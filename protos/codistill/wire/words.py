"""The words for the values of the protocol's enums: the same on the wire, in files, metrics, tables and pages.

The proto is the one list of them. A value's word is its name without the enum's, in lower case.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ["word", "words"]

_CAPITAL = re.compile(r"(?<!^)(?=[A-Z])")
_UNSPECIFIED = "unspecified"


def word(enum: Any, number: int) -> str:
    """Return the word for a value of an enum; "unknown" for a value that this version does not have.

    Args:
        enum: an enum of :mod:`codistill.v1`.
        number: the value.

    Example:
        >>> from codistill.v1 import distillation_pb2 as pb
        >>> word(pb.ParticipantState, pb.PARTICIPANT_STATE_CONNECTED), word(pb.EventKind, pb.EVENT_KIND_BELOW_QUORUM)
        ('connected', 'below_quorum')
    """
    value = enum.DESCRIPTOR.values_by_number.get(number)
    return "unknown" if value is None else _word(enum, value.name)


def words(enum: Any) -> list[str]:
    """Return the words for all values of an enum that mean something, in the proto's order."""
    every = [_word(enum, name) for name in enum.keys()]  # noqa: SIM118 - an enum of protobuf is no mapping
    return [name for name in every if name != _UNSPECIFIED]


def _word(enum: Any, name: str) -> str:
    prefix = _CAPITAL.sub("_", enum.DESCRIPTOR.name).upper() + "_"
    return name.removeprefix(prefix).lower()
