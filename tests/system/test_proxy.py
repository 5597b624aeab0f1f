"""The proxy does to a connection what it says, and nothing else; the tests of the network stand on that."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from system.proxy import Proxy, proxied
from system.support import wait_for

DATA = bytes(range(256)) * 400


class Echo:
    """A server that sends back what it gets, and remembers how its connections ended."""

    def __init__(self) -> None:
        self.received = 0
        self.endings: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    self.received += len(data)
                    connection.sendall(data)
                self.endings.append("end")
            except OSError:
                self.endings.append("reset")

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for thread in self._threads:
            thread.join(10)


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with proxied(echo.address, seed=3) as made:
        yield made


def connect(proxy: Proxy) -> socket.socket:
    host, _, port = proxy.address.partition(":")
    connection = socket.create_connection((host, int(port)), 10)
    connection.settimeout(10)
    return connection


def echoed(connection: socket.socket, data: bytes = DATA) -> bytes:
    """Return what comes back; less than what was sent if the connection ends."""
    back = b""

    def send() -> None:
        try:
            connection.sendall(data)
        except OSError:
            return

    sender = threading.Thread(target=send)
    sender.start()
    try:
        while len(back) < len(data) and (part := connection.recv(65536)):
            back += part
    except ConnectionError:
        pass
    finally:
        sender.join(10)
    return back


def test_a_good_link_changes_nothing(proxy: Proxy, echo: Echo) -> None:
    with connect(proxy) as connection:
        assert echoed(connection) == DATA
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b"", "the end is carried through and back"
    wait_for(lambda: echo.endings == ["end"] and not proxy.connections, "both ends are told")
    assert proxy.up.carried == proxy.down.carried == len(DATA)


def test_delay_holds_each_way_and_bytes_in_flight_do_not_add_up(proxy: Proxy) -> None:
    proxy.up.delay, proxy.down.delay = 0.1, 0.2
    with connect(proxy) as connection:
        started = time.monotonic()
        assert echoed(connection) == DATA
        assert 0.3 <= time.monotonic() - started < 2


def test_a_narrow_link_carries_so_many_bytes_a_second(proxy: Proxy) -> None:
    proxy.up.rate = len(DATA) / 0.5
    with connect(proxy) as connection:
        started = time.monotonic()
        assert echoed(connection) == DATA
        # The pause after the last chunk holds up nobody.
        assert 0.35 <= time.monotonic() - started < 3


def test_loss_stalls_and_loses_nothing(proxy: Proxy) -> None:
    proxy.down.loss, proxy.down.stall_seconds = 0.05, 0.05
    with connect(proxy) as connection:
        started = time.monotonic()
        assert echoed(connection) == DATA
        assert proxy.down.stalls > 0
        assert time.monotonic() - started >= proxy.down.stalls * 0.05


def test_a_silent_direction_takes_everything_and_hands_on_nothing(proxy: Proxy, echo: Echo) -> None:
    with connect(proxy) as connection:
        proxy.down.swallow = True
        connection.sendall(DATA)
        wait_for(lambda: echo.received == len(DATA), "the other direction works on")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        assert proxy.down.carried == 0
        proxy.down.swallow, proxy.up.swallow = False, True
        connection.sendall(DATA)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        assert echo.received == len(DATA)
        proxy.up.swallow = False
        connection.settimeout(10)
        assert echoed(connection, b"back") == b"back", "what was swallowed is gone; the connection is not"


def test_what_is_held_back_comes_later_and_whole(proxy: Proxy, echo: Echo) -> None:
    with connect(proxy) as connection:
        assert echoed(connection, b"before") == b"before"
        proxy.up.hold = True
        connection.sendall(b"now")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        assert echo.received == len(b"before")
        proxy.up.hold = False
        connection.settimeout(10)
        assert connection.recv(3, socket.MSG_WAITALL) == b"now"


@pytest.mark.parametrize(("how", "seen"), [("reset", "reset"), ("end", "end")])
def test_a_cut_ends_both_sides(how: str, seen: str, proxy: Proxy, echo: Echo) -> None:
    with connect(proxy) as connection:
        assert echoed(connection, b"before") == b"before"
        assert proxy.cut("reset" if how == "reset" else "end") == 1
        if how == "reset":
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
        else:
            assert connection.recv(1) == b""
    wait_for(lambda: echo.endings == [seen], "the server's side ends")
    with connect(proxy) as connection:
        assert echoed(connection, b"after") == b"after", "new connections are taken"
    assert proxy.cuts == 1


def test_a_cut_falls_in_the_middle(proxy: Proxy) -> None:
    proxy.down.cut_after = 5000
    lengths = []
    for _ in range(10):
        with connect(proxy) as connection:
            lengths.append(len(echoed(connection)))
    assert all(length <= 7500 for length in lengths), lengths
    assert len(set(lengths)) > 3, "not each time at the same byte"
    assert proxy.cuts == 10
    proxy.down.cut_after = None
    with connect(proxy) as connection:
        assert echoed(connection) == DATA


def test_damage_flips_single_bits(proxy: Proxy) -> None:
    proxy.up.corrupt_every = 2000
    with connect(proxy) as connection:
        back = echoed(connection)
    assert len(back) == len(DATA)
    flipped = [(one ^ other).bit_count() for one, other in zip(back, DATA, strict=True)]
    assert 30 < sum(flipped) == proxy.up.damaged < 80
    assert set(flipped) == {0, 1}
    proxy.up.corrupt_every = None
    with connect(proxy) as connection:
        assert echoed(connection) == DATA


def test_refusal_and_its_end(proxy: Proxy) -> None:
    with connect(proxy) as standing:
        assert echoed(standing, b"1") == b"1"
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
        assert echoed(standing, b"2") == b"2", "what stands is left alone"
        proxy.accept()
        with connect(proxy) as connection:
            assert echoed(connection, b"3") == b"3"


def test_a_server_that_is_not_there_is_a_reset(proxy: Proxy, echo: Echo) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        proxy.upstream = f"127.0.0.1:{nobody.getsockname()[1]}"
        with contextlib.suppress(ConnectionResetError), connect(proxy) as connection:
            assert echoed(connection, b"1") == b""
        proxy.upstream = echo.address
        with connect(proxy) as connection:
            assert echoed(connection, b"2") == b"2"
