from __future__ import annotations

import zlib

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from codistill.v1 import distillation_pb2 as pb
from codistill.wire.checksum import CHECKSUM_FIELD, has_checksum, is_whole, seal, seal_session, session_in
from codistill.wire.tensors import encode

SEALED = (pb.JoinRequest, pb.JoinResponse, pb.Contribution, pb.ExchangeReply, pb.ReportRequest, pb.LeaveRequest)


def contribution() -> pb.Contribution:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    samples = pb.Samples(
        ids=encode(torch.arange(5), "int64"),
        labels=encode(torch.arange(5) % 3, "int64"),
        outputs={"logits": encode(logits, "float32")},
    )
    return pb.Contribution(round=300, batch=samples)


@pytest.mark.parametrize("message", SEALED, ids=lambda each: each.DESCRIPTOR.name)
def test_the_checksum_is_the_last_field_of_every_sealed_message(message: type) -> None:
    fields = message.DESCRIPTOR.fields_by_name
    assert fields["checksum"].number == CHECKSUM_FIELD == max(field.number for field in fields.values())
    assert fields["checksum"].type == fields["checksum"].TYPE_FIXED32
    raw = seal(message())
    assert (len(raw), is_whole(raw)) == (5, True)


def test_it_is_the_crc_of_the_context_and_the_bytes_before_it() -> None:
    message = contribution()
    raw = seal(message, "41")
    bare = message.SerializeToString()
    assert raw[: len(bare)] == bare
    assert pb.Contribution.FromString(raw).checksum == zlib.crc32(b"41" + bare)
    assert is_whole(raw, "41")
    assert not is_whole(raw, "42"), "another student's"
    assert not is_whole(raw)


def test_a_parsed_message_serialises_to_the_sealed_bytes() -> None:
    """So other programs may set the field instead of appending to the bytes."""
    raw = seal(contribution())
    assert pb.Contribution.FromString(raw).SerializeToString() == raw


def test_every_flipped_bit_and_every_truncation_is_noticed() -> None:
    raw = seal(contribution())
    for position in range(len(raw)):
        assert not is_whole(raw[:position])
        for bit in range(8):
            damaged = bytearray(raw)
            damaged[position] ^= 1 << bit
            assert not is_whole(bytes(damaged))


@given(st.integers(0, 2**63 - 1))
def test_a_sealed_session(session: int) -> None:
    assert session_in(seal_session(session)) == session


def test_a_damaged_session_is_none() -> None:
    value = seal_session(1234)
    for position in range(len(value)):
        assert session_in(value[:position]) is None
        assert session_in(value[:position] + value[position + 1 :]) is None
        for bit in range(7):
            assert session_in(value[:position] + chr(ord(value[position]) ^ 1 << bit) + value[position + 1 :]) is None


@pytest.mark.parametrize(
    "value", ["", "-", "1", "-1", "\u0661", seal_session(10**19), f"0{seal_session(1)}", "9" * 5000]
)
def test_what_is_no_session(value: str) -> None:
    assert session_in(value) is None


@given(st.binary(max_size=40))
def test_bytes_that_were_never_sealed(raw: bytes) -> None:
    assert is_whole(raw) is (has_checksum(raw) and raw[-4:] == zlib.crc32(raw[:-5]).to_bytes(4, "little"))
    assert len(raw) >= 5 or not has_checksum(raw)


def test_what_is_protected_could_pass_otherwise() -> None:
    """Most flipped bits leave a message that parses: without a checksum nothing would tell."""
    raw = contribution().SerializeToString()
    parsed = 0
    for position in range(len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= 1
        try:
            pb.Contribution.FromString(bytes(damaged))
        except DecodeError:
            continue
        parsed += 1
    assert parsed > 0.8 * len(raw)
