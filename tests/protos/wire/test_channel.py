"""Addresses, and what both ends of a channel agree on."""

from __future__ import annotations

import pytest

from codistill.config.exchange import KEEPALIVE_ANSWER
from codistill.process.exit_codes import ExitCode
from codistill.wire.channel import (
    AddressError,
    client_options,
    format_address,
    is_loopback,
    parse_address,
    server_options,
    split_address,
)

NO_ADDRESSES = ["", ":", "host", "host:", ":80", "host:http", "host:-1", "host:65536", "host:１", "host:" + "9" * 5000]


class TestAddress:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("127.0.0.1:0", ("127.0.0.1", 0)),
            ("localhost:65535", ("localhost", 65535)),
            ("[::1]:50051", ("::1", 50051)),
            ("some.host:1", ("some.host", 1)),
        ],
    )
    def test_host_and_port(self, text: str, expected: tuple[str, int]) -> None:
        assert parse_address(text, "listen") == expected
        assert split_address(text) == expected
        assert format_address(*expected) == text

    @pytest.mark.parametrize("text", NO_ADDRESSES)
    def test_what_is_none(self, text: str) -> None:
        with pytest.raises(AddressError, match=r"listen: .* is not an address; expected HOST:PORT") as caught:
            parse_address(text, "listen")
        assert caught.value.code is ExitCode.CONFIGURATION
        assert split_address(text) is None


class TestLoopback:
    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.10", "::1"])
    def test_hosts_that_only_this_machine_can_reach(self, host: str) -> None:
        assert is_loopback(host)

    @pytest.mark.parametrize(
        "host",
        ["0.0.0.0", "::", "10.0.0.1", "fe80::1", "localhost.example.org", "my-host", "127.1", ""],  # noqa: S104
    )
    def test_hosts_that_others_may_reach(self, host: str) -> None:
        assert not is_loopback(host)


class TestOptions:
    def test_no_option_is_given_twice(self) -> None:
        for options in (client_options(), server_options(1000)):
            names = [name for name, _ in options]
            assert len(set(names)) == len(names)

    def test_pings_are_sent_and_answered_within_the_same_times(self) -> None:
        client, server = dict(client_options(1.5)), dict(server_options(1000, 2.5))
        assert client["grpc.keepalive_time_ms"] == 1500
        assert server["grpc.keepalive_time_ms"] == 2500
        for options in (client, server):
            assert options["grpc.keepalive_timeout_ms"] == int(1000 * KEEPALIVE_ANSWER)
            assert options["grpc.http2.ping_timeout_ms"] == int(1000 * KEEPALIVE_ANSWER)
            assert options["grpc.keepalive_permit_without_calls"] == 1

    def test_the_server_limits_what_it_receives_and_trusts_what_it_sends(self) -> None:
        assert dict(server_options(1000))["grpc.max_receive_message_length"] == 1000
        for options in (dict(client_options()), dict(server_options(1000))):
            assert options["grpc.max_send_message_length"] == -1
        assert dict(client_options())["grpc.max_receive_message_length"] == -1
