"""Which tokens are allowed, and that none is shown."""

from __future__ import annotations

import grpc
import pytest

from codistill.wire.security import Security
from codistill.wire.token import Token, read_token
from protos.wire.support import refused
from support_certificates import TOKEN, WRONG_TOKEN


def test_it_is_compared_whole() -> None:
    token = Token(f" {TOKEN}\n", "a test")
    assert token.metadata == ("authorization", f"Bearer {TOKEN}")
    assert token.matches(f"Bearer {TOKEN}")
    assert token.matches(f"Bearer {TOKEN}".encode())
    for wrong in (
        TOKEN,
        f"Bearer {WRONG_TOKEN}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        "",
        b"\xff",
        "\ud800",
    ):
        assert not token.matches(wrong)


def test_it_does_not_show_itself() -> None:
    token = Token(TOKEN, "a test")
    security = Security(token=token)
    for shown in (repr(token), str(token), f"{token}", repr(security), str(security)):
        assert TOKEN not in shown


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "the token is empty; make one with `openssl rand -hex 32`"),
        (" \n\t", "the token is empty"),
        ("x" * 15, "a token of 15 characters is not allowed; allowed: 16 to 1024"),
        ("x" * 1025, "a token of 1025 characters"),
        ("two words are no token", "other characters than visible ASCII, or spaces in between"),
        ("schlüssel-schlüssel", "other characters"),
        ("one-line-of-two\nanother-line", "other characters"),
    ],
)
def test_what_is_none(text: str, what: str) -> None:
    error = refused(lambda: Token(text, "CODISTILL_TOKEN"))
    assert error.startswith(
        f"CODISTILL_TOKEN: {what}" if "other" not in what else "CODISTILL_TOKEN: the token has other"
    )
    assert len(text.strip()) < 15 or text.strip()[:15] not in error, "an error shows no secret, not even a bad one"


def test_without_a_file_and_a_variable_there_is_none() -> None:
    assert read_token(None, None) is None


def test_every_kind_of_call_carries_it() -> None:
    """The server's own tests see it arrive; this one names the kinds of calls that the service has."""
    from codistill.v1 import distillation_pb2 as pb
    from codistill.wire import token as module

    kinds = {
        (method.client_streaming, method.server_streaming)
        for method in pb.DESCRIPTOR.services_by_name["DistillationService"].methods
    }
    bases = {
        (False, False): grpc.UnaryUnaryClientInterceptor,
        (False, True): grpc.UnaryStreamClientInterceptor,
        (True, False): grpc.StreamUnaryClientInterceptor,
        (True, True): grpc.StreamStreamClientInterceptor,
    }
    assert all(issubclass(module._TokenInterceptor, bases[kind]) for kind in kinds)
