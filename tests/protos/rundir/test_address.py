"""The addresses of a server, as people read them."""

from __future__ import annotations

from codistill.rundir.address import Addresses


def test_a_page_on_the_loopback_of_another_machine_says_so() -> None:
    assert str(Addresses("127.0.0.1:1", "127.0.0.1:2")) == (
        "live page: http://127.0.0.1:2/ (server 127.0.0.1:1, metrics on http://127.0.0.1:2/metrics)"
    )
    assert str(Addresses("10.0.0.7:1", "127.0.0.1:2")) == (
        "live page on the server's own machine: http://127.0.0.1:2/ (server 10.0.0.7:1, metrics on http://127.0.0.1:2/metrics)"
    )
    assert str(Addresses("10.0.0.7:1", "10.0.0.7:2")).startswith("live page: http://10.0.0.7:2/ ")
