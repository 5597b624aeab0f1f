"""The port that a server comes back to."""

from __future__ import annotations

import socket
import sys

import pytest

from codistill_deploy.supervise.port import Port


def listener(port: int) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", port))
    made.listen()
    return made


def test_a_free_port_is_chosen_once_and_a_server_can_come_back_to_it() -> None:
    port = Port("127.0.0.1:0", "listen")
    host, _, port_number = port.address.rpartition(":")
    assert host == "127.0.0.1"
    assert int(port_number) > 0
    try:
        for _ in range(2):
            with listener(int(port_number)) as server, socket.create_connection(("127.0.0.1", int(port_number)), 10):
                server.accept()[0].close()
    finally:
        port.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets two sockets bind one port in this way")
def test_nobody_else_gets_the_port_while_the_server_is_away() -> None:
    port = Port("127.0.0.1:0", "listen")
    try:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", int(port.address.rpartition(":")[2])))
    finally:
        port.close()


def test_the_server_itself_refuses_a_port_in_use_and_a_wrong_address() -> None:
    with listener(0) as busy:
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        assert Port(address, "listen").address == address
    assert Port("nonsense", "listen").address == "nonsense"
