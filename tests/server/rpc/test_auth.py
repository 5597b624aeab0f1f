from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

import grpc
import pytest

from codistill.wire.token import Token
from codistill_server.rpc.auth import OPEN_METHODS, TokenInterceptor
from support_certificates import TOKEN, WRONG_TOKEN

JOIN = "/codistill.v1.DistillationService/Join"
OWN = cast("Any", object())


class Details(grpc.HandlerCallDetails):
    def __init__(self, method: str, *metadata: tuple[str, str | bytes]) -> None:
        self.method = method
        self.invocation_metadata = metadata


class Context:
    def __init__(self) -> None:
        self.aborted: tuple[grpc.StatusCode, str] | None = None

    def peer(self) -> str:
        return "ipv4:192.0.2.1:5555"

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        self.aborted = code, details


def ask(interceptor: TokenInterceptor, details: Details) -> Any:
    async def own(details: grpc.HandlerCallDetails) -> Any:
        return OWN

    return asyncio.run(interceptor.intercept_service(own, details))


def refusal(handler: Any) -> tuple[grpc.StatusCode, str]:
    """Call a handler with a message that must not be read; return how it ends the call."""

    async def unread() -> Any:
        raise AssertionError("a message was read")
        yield b""

    context = Context()
    assert handler.request_streaming, "gRPC reads the message of any other call before its handler runs"
    asyncio.run(handler.stream_stream(unread(), context))
    assert context.aborted is not None
    return context.aborted


def bearer(token: str) -> tuple[str, str]:
    return "authorization", f"Bearer {token}"


@pytest.fixture
def interceptor() -> TokenInterceptor:
    return TokenInterceptor(Token(TOKEN, "a test"))


def test_the_right_token_gets_the_calls_own_handler(interceptor: TokenInterceptor) -> None:
    assert ask(interceptor, Details(JOIN, ("other", "x"), bearer(TOKEN))) is OWN


@pytest.mark.parametrize(
    "metadata",
    [
        [bearer(WRONG_TOKEN)],
        [bearer(TOKEN[:-1])],
        [bearer(TOKEN + "x")],
        [bearer("")],
        [("authorization", TOKEN)],
        [("authorization", f"bearer {TOKEN}")],
        [("authorization", "")],
        [("authorization", b"\xff\x00")],
        [("authorization", "ä")],
        [bearer(TOKEN), bearer(TOKEN)],
        [bearer(WRONG_TOKEN), bearer(TOKEN)],
    ],
)
def test_a_wrong_token(interceptor: TokenInterceptor, metadata: list[tuple[str, str]]) -> None:
    code, text = refusal(ask(interceptor, Details(JOIN, *metadata)))
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert text.startswith("the token given is not this server's; give the server's own with --token-file")
    assert TOKEN[:8] not in text


@pytest.mark.parametrize("method", [JOIN, "/grpc.health.v1.Health/Watch", "/grpc.reflection.v1alpha.X/Y", "/no/such"])
def test_no_token(interceptor: TokenInterceptor, method: str) -> None:
    code, text = refusal(ask(interceptor, Details(method, ("authorisation", f"Bearer {TOKEN}"))))
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert text.startswith("this server asks for a token, and none was given; give the server's own")


def test_health_is_answered_without(interceptor: TokenInterceptor) -> None:
    assert set(OPEN_METHODS) == {"/grpc.health.v1.Health/Check"}
    for method in OPEN_METHODS:
        assert ask(interceptor, Details(method)) is OWN


def test_many_refusals_make_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    interceptor = TokenInterceptor(Token(TOKEN, "a test"), lambda: now[0])
    with caplog.at_level(logging.WARNING):
        for number in range(2000):
            now[0] = number / 100
            refusal(ask(interceptor, Details(JOIN, bearer(WRONG_TOKEN))))
    assert [record.getMessage() for record in caplog.records] == [
        "refused 1 calls without the right token, the last from ipv4:192.0.2.1:5555",
        "refused 1000 calls without the right token, the last from ipv4:192.0.2.1:5555",
    ]
