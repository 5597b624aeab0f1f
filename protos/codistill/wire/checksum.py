"""Checksums of messages: what was damaged on the way, or on a disk, is never taken for a number.

A sealed message is its protobuf bytes with its field `checksum` behind them: the CRC-32 of all that comes before. It is
made over bytes, not over values, so it covers whatever the message holds, and costs one pass over it.

Example:
    >>> from codistill.v1 import distillation_pb2 as pb
    >>> raw = append_checksum(pb.LeaveRequest(session=7))
    >>> verify_checksum(raw), verify_checksum(raw[1:])
    (True, False)
    >>> pb.LeaveRequest.FromString(raw).session
    7
    >>> parse_session(format_session(7)), parse_session("7")
    (7, None)
"""

from __future__ import annotations

import zlib

from google.protobuf.message import Message

__all__ = ["CHECKSUM_FIELD", "append_checksum", "format_session", "has_checksum", "parse_session", "verify_checksum"]

CHECKSUM_FIELD = 15
"""The number of the field `checksum`, of type fixed32, in every message that has one; the largest, so that it comes last."""

_TAG = bytes([CHECKSUM_FIELD << 3 | 5])
_LENGTH = len(_TAG) + 4
_LONGEST_SESSION = 20


def append_checksum(message: Message, context: str = "") -> bytes:
    """Returns a message's bytes with their checksum.

    Args:
        message: one that has the field `checksum`, not set.
        context: what else the checksum covers, known to both sides; for a contribution the session in decimal.
    """
    raw = message.SerializeToString(deterministic=True)
    return b"".join((raw, _TAG, _checksum(raw, context).to_bytes(4, "little")))


def has_checksum(raw: bytes) -> bool:
    """Returns whether a message's bytes end as those of a sealed one."""
    return raw[-_LENGTH:-4] == _TAG


def verify_checksum(raw: bytes, context: str = "") -> bool:
    """Returns whether a message's bytes are those that were sealed; False too if they were not."""
    expected = _checksum(memoryview(raw)[:-_LENGTH], context)
    return has_checksum(raw) and int.from_bytes(raw[-4:], "little") == expected


def format_session(session: int) -> str:
    """Returns a session with its checksum, as it goes into a call's metadata."""
    return f"{session}-{_checksum(str(session).encode(), ''):08x}"


def parse_session(value: str) -> int | None:
    """Returns the session in what :func:`format_session` has made; None if it is not that."""
    text = value.partition("-")[0]
    if not (text.isascii() and text.isdigit() and len(text) < _LONGEST_SESSION):
        return None
    return int(text) if value == format_session(int(text)) else None


def _checksum(raw: bytes | memoryview, context: str) -> int:
    return zlib.crc32(raw, zlib.crc32(context.encode()))
