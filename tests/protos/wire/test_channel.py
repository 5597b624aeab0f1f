from __future__ import annotations

import pytest

from codistill.process.exit_codes import ExitCode
from codistill.wire.channel import AddressError, parse_address


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

    @pytest.mark.parametrize(
        "text", ["", ":", "host", "host:", ":80", "host:http", "host:-1", "host:65536", "host:１", "host:" + "9" * 5000]
    )
    def test_what_is_none(self, text: str) -> None:
        with pytest.raises(AddressError, match=r"listen: .* is not an address; expected HOST:PORT") as caught:
            parse_address(text, "listen")
        assert caught.value.code is ExitCode.CONFIGURATION
