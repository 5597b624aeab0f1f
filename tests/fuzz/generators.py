"""The inputs of a fuzzer: values worth trying, random messages of any type, and real bytes spoilt."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import google_crc32c
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

NUMBERS = (0, 1, 2, 3, 5, 127, 128, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (
    0.0,
    -0.0,
    0.05,
    0.1,
    0.5,
    1.0,
    -1.0,
    60.0,
    61.0,
    1e30,
    1e31,
    1e38,
    -1e38,
    1e308,
    5e-324,
    math.nan,
    math.inf,
    -math.inf,
)
TEXTS = (
    "",
    "ant",
    "bee",
    "logits",
    "Ant ",
    "ant\0",
    "line\nbreak\r\n\tTraceback",
    "\x1b[2J\x1b[31m",
    "../../../etc/passwd",
    "%s%n{0}%00",
    "😀" * 300,
    "\u202e\u0000\ufeff",
    "x" * 5000,
    "' OR 1=1 --",
    '{"a": 1}',
    "[" * 2000,
    '{"k":' * 500 + "1" + "}" * 500,
    "9" * 5000,
)  # fmt: skip

CHECKSUM_TAG = b"\xa5\x06"  # field 100, four bytes

_WIDTHS = {
    FieldDescriptor.TYPE_UINT32: 32,
    FieldDescriptor.TYPE_UINT64: 64,
    FieldDescriptor.TYPE_ENUM: 31,
    FieldDescriptor.TYPE_INT32: 31,
    FieldDescriptor.TYPE_INT64: 63,
}
_SIGNED = (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64)


def number(rng: random.Random, bits: int = 64) -> int:
    """Return a whole number of so many bits, a telling one more often than not."""
    value = rng.choice(NUMBERS) if rng.random() < 0.7 else rng.getrandbits(rng.randint(1, 64))
    return value & (2**bits - 1)


def text(rng: random.Random) -> str:
    if rng.random() < 0.8:
        return rng.choice(TEXTS)
    return "".join(
        chr(rng.choice((rng.randrange(32, 127), rng.randrange(1, 0xD7FF)))) for _ in range(rng.randrange(40))
    )


def noise(rng: random.Random, most: int = 200) -> bytes:
    return rng.randbytes(rng.randrange(most + 1))


def fill(rng: random.Random, message: Message, share: float = 0.7) -> Message:
    """Draw the fields of a message, each with the probability `share`, and return it; a checksum is for who sends it."""
    for field in message.DESCRIPTOR.fields:
        if rng.random() > share or field.name == "checksum":
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entries: Any = getattr(message, field.name)
            for _ in range(rng.choice((1, 1, 2, 9))):
                fill(rng, entries[text(rng)], share)
        elif field.is_repeated:
            values: Any = getattr(message, field.name)
            for _ in range(rng.choice((1, 2, 2, 9, 40))):
                if field.message_type is not None:
                    fill(rng, values.add(), share)
                else:
                    values.append(_scalar(rng, field))
        elif field.message_type is not None:
            inner: Message = getattr(message, field.name)
            inner.SetInParent()
            fill(rng, inner, share)
        else:
            setattr(message, field.name, _scalar(rng, field))
    return message


def with_unknown_fields(rng: random.Random, raw: bytes) -> bytes:
    """Append fields that no message of the contract has; a receiver passes over them."""
    for _ in range(rng.randint(1, 4)):
        wire = rng.choice((0, 1, 2, 5))
        tag = _varint(rng.randint(101, 2**20) << 3 | wire)
        payload = noise(rng, 40)
        raw += (
            tag + {0: _varint(rng.getrandbits(60)), 1: bytes(8), 2: _varint(len(payload)) + payload, 5: bytes(4)}[wire]
        )
    return raw


def mutate(rng: random.Random, raw: bytes, others: Sequence[bytes]) -> bytes:
    """Return real bytes spoilt in one to three ways: flipped, cut, spliced, repeated, stuffed.

    Some are given a checksum anew, so that a receiver believes them as far as damage goes; the others are as they may come from a wire.
    """
    for _ in range(rng.choice((1, 1, 2, 3))):
        where = rng.randrange(len(raw) + 1)
        until = min(len(raw), where + rng.choice((1, 2, 8, 64)))
        match rng.randrange(7):
            case 0 if raw:
                spoilt = bytearray(raw)
                for _ in range(rng.choice((1, 1, 3, 16))):
                    spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
                raw = bytes(spoilt)
            case 1:
                raw = raw[:where]
            case 2:
                other = rng.choice(others)
                raw = raw[:where] + other[rng.randrange(len(other) + 1) :]
            case 3:
                raw = raw[:until] + raw[where:]
            case 4:
                raw = raw[:where] + noise(rng, 16) + raw[where:]
            case 5:
                raw = raw[:where] + raw[until:]
            case _:
                raw += rng.choice(others)
    return with_checksum(raw) if rng.random() < 0.6 else raw


def with_checksum(raw: bytes, context: str = "") -> bytes:
    """Return bytes with the checksum of the contract behind them; of several in a message the last counts."""
    return raw + CHECKSUM_TAG + google_crc32c.value(context.encode() + raw).to_bytes(4, "little")


def verify_checksum(raw: bytes, context: str = "") -> bool:
    return len(raw) > 5 and raw == with_checksum(raw[:-6], context)


def on_the_way(rng: random.Random, raw: bytes, session_id: int) -> bytes:
    """Return a contribution as it arrives: mostly with its checksum, else without one, another's, or damaged."""
    roll = rng.random()
    if roll < 0.8:
        return with_checksum(raw, str(session_id))
    if roll < 0.85:
        return raw
    if roll < 0.9:
        return with_checksum(raw, str(number(rng)))
    damaged = bytearray(with_checksum(raw, str(session_id)))
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _scalar(rng: random.Random, field: FieldDescriptor) -> Any:
    kind = field.type
    if kind == FieldDescriptor.TYPE_STRING:
        return text(rng)
    if kind == FieldDescriptor.TYPE_BYTES:
        return noise(rng)
    if kind in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return rng.choice(FLOATS)
    if kind == FieldDescriptor.TYPE_BOOL:
        return rng.random() < 0.5
    if kind == FieldDescriptor.TYPE_ENUM and rng.random() < 0.7:
        return rng.randrange(5)
    value = number(rng, _WIDTHS[kind])
    return -value if kind in _SIGNED and rng.random() < 0.3 else value


def _varint(value: int) -> bytes:
    raw = bytearray()
    while value > 127:
        raw.append(value & 127 | 128)
        value >>= 7
    return bytes([*raw, value])
