"""Every value of every enum has a word of its own, and what is unknown has one too."""

from __future__ import annotations

import re
from typing import Any

import pytest

from codistill.v1 import distillation_pb2 as pb
from codistill.wire.words import word, words

ENUMS: dict[str, Any] = {name: getattr(pb, name) for name in pb.DESCRIPTOR.enum_types_by_name}
SPOKEN = {
    "Dtype": ["float32", "float16", "bfloat16", "int64"],
    "Lane": ["grpc", "shared_memory"],
    "Encoding": ["dense", "top_k"],
    "Split": ["train", "test"],
    "LeaveReason": ["finished", "stopped", "failed"],
    "ParticipantState": ["expected", "connected", "disconnected", "finished", "failed"],
    "Role": ["student", "teacher"],
    "EventKind": [
        "joined",
        "finished",
        "stopped",
        "failed",
        "disconnected",
        "superseded",
        "evicted",
        "skipped",
        "awaited",
        "below_quorum",
        "refused",
        "rejected",
        "damaged",
        "resumed",
        "complete",
    ],
}


def test_the_words_of_every_enum() -> None:
    assert {name: words(enum) for name, enum in ENUMS.items()} == SPOKEN


@pytest.mark.parametrize("name", ENUMS)
def test_each_value_has_a_word_of_its_own(name: str) -> None:
    enum = ENUMS[name]
    found = {word(enum, value.number) for value in enum.DESCRIPTOR.values}
    assert len(found) == len(enum.DESCRIPTOR.values)
    assert all(re.fullmatch("[a-z][a-z0-9]*(_[a-z0-9]+)*", each) for each in found)
    assert found - {"unspecified"} == set(words(enum))


@pytest.mark.parametrize("name", ENUMS)
def test_zero_says_that_nothing_is_specified(name: str) -> None:
    assert word(ENUMS[name], 0) == "unspecified"


@pytest.mark.parametrize("name", ENUMS)
@pytest.mark.parametrize("number", [-1, 99, 2**31 - 1])
def test_a_value_of_a_later_version_is_unknown(name: str, number: int) -> None:
    """As proto3 keeps it, it can be read from a message too."""
    assert word(ENUMS[name], number) == "unknown"


def test_an_unknown_value_that_came_over_the_wire() -> None:
    newer = pb.ParticipantStatus.FromString(b"\x20\x63")  # field 4, value 99
    assert word(pb.ParticipantState, newer.state) == "unknown"
