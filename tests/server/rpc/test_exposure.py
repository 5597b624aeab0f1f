from __future__ import annotations

import pytest

from codistill.wire.security import Security
from codistill.wire.token import Token
from codistill_server.errors import ServerError
from codistill_server.rpc.exposure import check_protection, protection, reachable_address, warn_of_partial_protection
from support_certificates import TOKEN, Certificates


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", "127.0.0.1:5"),
        ("0.0.0.0", "127.0.0.1:5"),  # noqa: S104
        ("::", "[::1]:5"),
        ("some.host", "some.host:5"),
    ],
)
def test_a_port_on_all_interfaces_is_reached_by_loopback(host: str, expected: str) -> None:
    assert reachable_address(host, 5) == expected


def test_beyond_loopback_a_port_needs_protection() -> None:
    check_protection("127.0.0.1", Security(), insecure=False)
    check_protection("some.host", Security(), insecure=True)
    check_protection("some.host", Security(token=Token(TOKEN, "a test")), insecure=False)
    with pytest.raises(
        ServerError, match=r"some\.host can be reached from other machines and nothing protects the port"
    ):
        check_protection("some.host", Security(), insecure=False)


def test_on_loopback_nothing_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_partial_protection("::1", Security(token=Token(TOKEN, "a test")))
    assert not caplog.records
    warn_of_partial_protection("some.host", Security(token=Token(TOKEN, "a test")))
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(
    ("certificate", "ca", "token", "expected"),
    [
        (None, None, None, "plain text, no token"),
        (None, None, TOKEN, "plain text, token"),
        ("server", None, TOKEN, "TLS, token"),
        ("server", "ca", None, "mutual TLS, no token"),
    ],
)
def test_protection_in_words(
    certificate: str | None, ca: str | None, token: str | None, expected: str, certificates: Certificates
) -> None:
    assert protection(certificates.of(certificate, ca, token)) == expected
