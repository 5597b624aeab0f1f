"""Real servers on threads, and transports to them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from codistill.config.experiment import Experiment
from codistill.peer.grpc import GrpcTransport
from codistill.process.exit_codes import ExitCode
from codistill.rundir import records
from codistill.rundir.layout import RunLayout
from codistill.wire.security import Security
from codistill_server.app import ServeOptions, serve
from protos.peer.support import Connect, wait_for


class Server:
    """A real aggregation server on a thread, which can be stopped and started again in its folder, on its port."""

    def __init__(self, experiment: Experiment, folder: Path, security: Security | None = None) -> None:
        self.experiment = experiment
        self.folder = folder
        self.security = security or Security()
        self.address = "127.0.0.1:0"
        self.ended: ExitCode | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, *, stay: bool = False) -> None:
        self._stop = threading.Event()
        options = ServeOptions(self.address, self.folder, stay=stay, security=self.security)

        def serve_it() -> None:
            self.ended = serve(self.experiment, options, self._stop)

        self._thread = threading.Thread(target=serve_it, name="server-under-test")
        self._thread.start()
        file = RunLayout(self.folder).address_file
        deadline = time.monotonic() + 30
        while not file.exists() and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        self.address = str(json.loads(file.read_text())["address"])

    def stop(self) -> None:
        self._stop.set()
        self.wait()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join(30)
            assert not self._thread.is_alive()

    def records(self, name: str = "metrics.jsonl") -> list[records.Record]:
        return list(records.read(self.folder / name))

    def measured(self) -> list[records.Measured]:
        return [record for record in self.records() if isinstance(record, records.Measured)]

    def events(self) -> list[tuple[str, str]]:
        """Return what happened to whom."""
        return [
            (event.what, event.participant)
            for event in self.records("events.jsonl")
            if isinstance(event, records.Happened)
        ]


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start real servers, and end those that a test leaves."""
    servers: list[Server] = []

    def start(experiment: Experiment, security: Security | None = None) -> Server:
        servers.append(Server(experiment, tmp_path / f"run-{len(servers)}", security))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Make exchanges, close them, and see that no thread of theirs is left."""
    before = set(threading.enumerate())
    made: list[GrpcTransport] = []

    def make(
        address: str,
        stop: threading.Event | None = None,
        connect_timeout: float = 20,
        give_up_after: float = 20,
        silence_after: float = 20,
        find: Callable[[], str | None] = lambda: None,
    ) -> GrpcTransport:
        made.append(
            GrpcTransport(
                address,
                connect_timeout=connect_timeout,
                give_up_after=give_up_after,
                silence_after=silence_after,
                stop=stop or threading.Event(),
                find=find,
            )
        )
        return made[-1]

    yield make
    for transport in made:
        transport.close()
        transport.close()  # a second time does nothing

    def left() -> list[str]:
        # gRPC names its threads after nobody; the server under test has one of its asyncio flavour's for the whole process.
        after = [thread.name for thread in set(threading.enumerate()) - before if "_poll_wrapper" not in thread.name]
        return [name for name in after if name.startswith(("codistill-replies", "Thread-"))]

    wait_for(lambda: not left(), "the threads of a closed transport end")
