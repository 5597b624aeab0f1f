"""Which servers are reached through a proxy, and what is said of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from codistill.wire.proxy import is_here, proxy_advice, proxy_variable
from codistill.wire.security import Security

DEAD = "http://127.0.0.1:9"
VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("variable", VARIABLES)
def test_this_machine_is_reached_directly(variable: str, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, DEAD)
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Security().channel(f"{host}:{port}") as channel:
            grpc.channel_ready_future(channel).result(20)
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("192.0.2.1:1", False),
        ("host.example:1", False),
        ("127.0.0.1.example:1", False),
        ("no address", False),
    ],
)
def test_which_servers_are_on_this_machine(address: str, here: bool) -> None:
    assert is_here(address) is here


@pytest.mark.parametrize(
    ("environment", "variable"),
    [
        ({}, None),
        ({"http_proxy": DEAD}, "http_proxy"),
        ({"http_proxy": DEAD, "https_proxy": DEAD, "grpc_proxy": DEAD}, "grpc_proxy"),
        ({"http_proxy": DEAD, "grpc_proxy": ""}, None),
        ({"HTTP_PROXY": DEAD, "all_proxy": DEAD}, None),
        ({"http_proxy": DEAD, "no_proxy": "other, .EXAMPLE"}, None),
        ({"http_proxy": DEAD, "no_proxy": "server.example"}, None),
        ({"http_proxy": DEAD, "no_proxy": "other,,"}, "http_proxy"),
        ({"http_proxy": DEAD, "no_proxy": "server.example", "no_grpc_proxy": "other"}, "http_proxy"),
    ],
)
def test_the_variable_by_which_a_server_is_reached(environment: dict[str, str], variable: str | None) -> None:
    assert proxy_variable("server.example:50551", environment) == variable


def test_a_network_is_excepted() -> None:
    environment = {"http_proxy": DEAD, "no_proxy": "192.0.2.0/24"}
    assert proxy_variable("192.0.2.7:1", environment) is None
    assert proxy_variable("198.51.100.7:1", environment) == "http_proxy"
    assert proxy_variable("127.0.0.1:1", environment) is None


def test_the_advice_names_the_variable_and_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grpc_proxy", "https_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://user:secret@proxy:3128")
    advice = proxy_advice("server.example:50551")
    assert advice is not None
    assert "http_proxy" in advice
    assert "no_proxy=server.example" in advice
    assert "secret" not in advice
    assert proxy_advice("127.0.0.1:1") is None
