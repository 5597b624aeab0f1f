from __future__ import annotations

import google_crc32c
import google_crc32c.python
import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from codistill.v1 import distillation_pb2 as pb
from codistill.wire.checksum import (
    CHECKSUM_FIELD,
    CHECKSUM_TAG,
    append_checksum,
    crc32c,
    format_session,
    has_checksum,
    parse_session,
    verify_checksum,
)
from codistill.wire.tensors import encode

WITH_CHECKSUM = (
    pb.JoinRequest,
    pb.JoinResponse,
    pb.ExchangeRequest,
    pb.ExchangeResponse,
    pb.ReportRequest,
    pb.LeaveRequest,
)


def contribution() -> pb.ExchangeRequest:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    samples = pb.SampleOutputs(
        ids=encode(torch.arange(5), "int64"),
        labels=encode(torch.arange(5) % 3, "int64"),
        outputs={"logits": encode(logits, "float32")},
    )
    return pb.ExchangeRequest(round=300, batch=samples)


def test_the_vectors_of_rfc_3720() -> None:
    """Its appendix B.4 writes the bytes as they are sent, the lowest first."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"56789", crc32c(b"1234")) == 0xE3069283


def test_the_extension_in_c_is_used() -> None:
    assert google_crc32c.implementation == "c"


@given(st.binary(max_size=40), st.integers(0, 2**32 - 1))
def test_a_machine_without_the_extension_computes_the_same(content: bytes, before: int) -> None:
    assert google_crc32c.python.extend(before, content) == crc32c(content, before)


@pytest.mark.parametrize("message", WITH_CHECKSUM, ids=lambda message: message.DESCRIPTOR.name)
def test_the_checksum_is_the_last_field_of_every_message_that_has_one(message: type) -> None:
    fields = message.DESCRIPTOR.fields_by_name
    assert fields["checksum"].number == CHECKSUM_FIELD == max(field.number for field in fields.values())
    assert fields["checksum"].type == fields["checksum"].TYPE_FIXED32
    raw = append_checksum(message())
    assert (len(raw), verify_checksum(raw)) == (6, True)


def test_its_tag_is_that_of_its_field_as_a_fixed32() -> None:
    raw = pb.LeaveRequest(checksum=0x01020304).SerializeToString()
    assert raw == CHECKSUM_TAG + b"\x04\x03\x02\x01" == b"\xa5\x06\x04\x03\x02\x01"


def test_it_is_the_crc_of_the_context_and_the_bytes_before_it() -> None:
    message = contribution()
    raw = append_checksum(message, "41")
    bare = message.SerializeToString()
    assert raw[: len(bare)] == bare
    assert pb.ExchangeRequest.FromString(raw).checksum == google_crc32c.value(b"41" + bare)
    assert verify_checksum(raw, "41")
    assert not verify_checksum(raw, "42"), "another participant's"
    assert not verify_checksum(raw)


@given(st.binary(max_size=40), st.text(max_size=8), st.integers(0, 2**32 - 1))
def test_no_other_number_is_the_checksum(content: bytes, context: str, number: int) -> None:
    right = google_crc32c.value(context.encode() + content)
    for claimed in (right, number):
        raw = content + b"\xa5\x06" + claimed.to_bytes(4, "little")
        assert verify_checksum(raw, context) is (claimed == right)


def test_a_parsed_message_serialises_to_the_same_bytes() -> None:
    """So other programs may set the field instead of appending to the bytes."""
    raw = append_checksum(contribution())
    assert pb.ExchangeRequest.FromString(raw).SerializeToString() == raw


def test_every_flipped_bit_and_every_truncation_is_noticed() -> None:
    raw = append_checksum(contribution())
    for position in range(len(raw)):
        assert not verify_checksum(raw[:position])
        for bit in range(8):
            damaged = bytearray(raw)
            damaged[position] ^= 1 << bit
            assert not verify_checksum(bytes(damaged))


@given(st.integers(0, 2**63 - 1))
def test_a_session_with_its_checksum(session: int) -> None:
    assert parse_session(format_session(session)) == session


def test_a_damaged_session_is_none() -> None:
    value = format_session(1234)
    for position in range(len(value)):
        assert parse_session(value[:position]) is None
        assert parse_session(value[:position] + value[position + 1 :]) is None
        for bit in range(7):
            assert (
                parse_session(value[:position] + chr(ord(value[position]) ^ 1 << bit) + value[position + 1 :]) is None
            )


@pytest.mark.parametrize(
    "value", ["", "-", "1", "-1", "\u0661", format_session(10**19), f"0{format_session(1)}", "9" * 5000]
)
def test_what_is_no_session(value: str) -> None:
    assert parse_session(value) is None


@given(st.binary(max_size=40))
def test_bytes_that_never_had_a_checksum(raw: bytes) -> None:
    assert verify_checksum(raw) is (
        has_checksum(raw) and raw[-4:] == google_crc32c.value(raw[:-6]).to_bytes(4, "little")
    )
    assert len(raw) >= 6 or not has_checksum(raw)


def test_what_is_protected_could_pass_otherwise() -> None:
    """Most flipped bits leave a message that parses: without a checksum nothing would tell."""
    raw = contribution().SerializeToString()
    parsed = 0
    for position in range(len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= 1
        try:
            pb.ExchangeRequest.FromString(bytes(damaged))
        except DecodeError:
            continue
        parsed += 1
    assert parsed > 0.8 * len(raw)
