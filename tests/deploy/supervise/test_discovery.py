"""Where a server is, as it is told to people."""

from __future__ import annotations

from codistill_deploy.supervise.discovery import Addresses


def test_a_page_that_only_the_server_s_machine_reaches_is_said_to_be_there() -> None:
    assert str(Addresses("127.0.0.1:1", "127.0.0.1:2")) == (
        "live page: http://127.0.0.1:2/ (server 127.0.0.1:1, metrics on http://127.0.0.1:2/metrics)"
    )
    assert str(Addresses("10.0.0.7:1", "127.0.0.1:2")) == (
        "live page on the server's own machine: http://127.0.0.1:2/ (server 10.0.0.7:1, metrics on http://127.0.0.1:2/metrics)"
    )
    assert str(Addresses("10.0.0.7:1", "10.0.0.7:2")).startswith("live page: http://10.0.0.7:2/ ")
