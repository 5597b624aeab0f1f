"""The servers under fuzz: a process of its own that serves real runs and says on request how it is doing.

It runs what `codistill serve` runs, :mod:`codistill_server.app`, once per run and all of them on one event loop, so that
whatever one run's server does to the loop, the process or its memory is felt by the others. One line on its standard input
asks for one line of JSON on its standard output; the end of its input ends it, so it cannot outlive the campaign.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from codistill.config.experiment import Experiment, parse
from codistill.config.fingerprint import identity
from codistill.rundir.layout import RunLayout
from codistill.wire.security import Security
from codistill.wire.token import Token
from codistill_server import app
from codistill_server.coordinator import Coordinator
from codistill_server.ratelimit import Rate
from codistill_server.rounds.events import ParticipantRecord
from codistill_server.rpc.quotas import Limits
from codistill_server.storage.journal import Journal
from fuzz import mutants
from fuzz.endpoints import Endpoint

PATIENCE = 60.0
_BOUNDLESS = Rate(1e9, 1e9)
GENEROUS = Limits(joins=_BOUNDLESS, calls=_BOUNDLESS, call_bytes=_BOUNDLESS, watchers=10**6)
"""Limits that hold nobody up, so that what is behind them is tested; one host is all that a campaign has."""


@dataclass(frozen=True)
class Usage:
    """The resources that the process holds; `sessions` and `outboxes` by run."""

    rss: int
    fds: int
    threads: int
    tasks: int
    sessions: Mapping[str, int]
    outboxes: Mapping[str, int]


class Serving:
    """The process, seen from the campaign.

    Args:
        folder: where run folders and the log go.
        experiments: the runs to serve, each by its name.
        first_sessions: what a run's sessions are numbered above; 0 unless named.
        limited: the runs with the limits of every server; the others have generous ones.
        token: what every call must carry; none if empty.
        mutant: the name of a bug to inject, of :mod:`fuzz.mutants`.
    """

    def __init__(
        self,
        folder: Path,
        experiments: Mapping[str, str],
        first_sessions: Mapping[str, int] | None = None,
        limited: Collection[str] = (),
        token: str = "",
        mutant: str = "",
    ) -> None:
        self.folder = folder
        self.log = folder / "server.log"
        config = {
            "folder": str(folder),
            "experiments": dict(experiments),
            "first_sessions": dict(first_sessions or {}),
            "limited": list(limited),
            "token": token,
            "mutant": mutant,
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fuzz.serving", json.dumps(config)],
                # gRPC as quiet as the command has it: else it writes a line for each GOAWAY that it gets
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GRPC_VERBOSITY": "ERROR"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._asking = threading.Lock()
        self._names = tuple(experiments)
        self._token = Token(token, "the campaign") if token else None
        self._read = 0
        self.endpoints: dict[str, Endpoint] = {}

    def __enter__(self) -> Serving:
        deadline = time.monotonic() + PATIENCE
        try:
            for name in self._names:
                path = RunLayout(self.folder / name).address_file
                while not path.exists():
                    assert self.code is None, self.log.read_text()
                    assert time.monotonic() < deadline, f"no server within {PATIENCE} s: {self.log.read_text()}"
                    time.sleep(0.02)
                self.endpoints[name] = Endpoint(json.loads(path.read_text())["address"], self._token)
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(self, *unused: object) -> None:
        try:
            self._process.communicate(timeout=PATIENCE)
        finally:
            self._process.kill()
            self._process.wait()

    @property
    def code(self) -> int | None:
        """How the process ended; None while it runs."""
        return self._process.poll()

    def usage(self) -> Usage:
        return Usage(**self._ask("usage"))

    def received(self, run: str) -> int:
        """Return how many bytes of contributions a run has gone through; an increase shows that another one has arrived."""
        return self._ask("received")[run]

    def _ask(self, what: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._asking:
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def problems_logged(self) -> str:
        """Return what the log says since the last call that a server must never say, or nothing."""
        with self.log.open("rb") as log:
            log.seek(self._read)
            new = log.read()
        self._read += len(new)
        text = new.decode(errors="replace")
        bad = (
            "Traceback (most",
            "Fatal Python error",
            "ERROR",
            "CRITICAL",
            "Exception",
            "Unexpected",
            "Warning",
            "assert",
        )
        return text if any(word in text for word in bad) else ""


def main() -> None:
    """Serve until the standard input ends."""
    config = json.loads(sys.argv[1])
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    torch.set_num_threads(1)
    if config["mutant"]:
        mutants.inject_bug(config["mutant"])
    asyncio.run(_serve(config))


async def _serve(config: Mapping[str, Any]) -> None:
    coordinators: dict[str, Coordinator] = {}

    class Seen(app.Coordinator):  # whichever class an injected bug has put there
        def __init__(self, experiment: Experiment, *rest: Any) -> None:
            super().__init__(experiment, *rest)
            coordinators[experiment.name] = self

    app.Coordinator = Seen
    stop, loop = threading.Event(), asyncio.get_running_loop()
    pending = bytearray()

    def asked() -> None:
        got = os.read(0, 4096)
        if not got:
            loop.remove_reader(0)
            stop.set()
        pending.extend(got)
        while b"\n" in pending:
            what, _, rest = pending.partition(b"\n")
            pending[:] = rest
            answer = _usage(coordinators) if bytes(what) == b"usage" else _received(coordinators)
            print(json.dumps(answer), flush=True)

    loop.add_reader(0, asked)
    servers: list[Any] = []
    security = Security(token=Token(config["token"], "the campaign") if config["token"] else None)
    for name, text in config["experiments"].items():
        experiment, folder = parse(text), Path(config["folder"]) / name
        folder.mkdir(parents=True, exist_ok=True)
        _number_from(folder, experiment, config["first_sessions"].get(name, 0))
        limits = Limits() if name in config["limited"] else GENEROUS
        options = app.ServeOptions("127.0.0.1:0", folder, reflect=True, stay=True, security=security, limits=limits)
        servers.append(app._Server(experiment, options).run(stop))
    await asyncio.gather(*servers)


def _number_from(folder: Path, experiment: Experiment, session_id: int) -> None:
    """Have the run's sessions numbered above one that its journal remembers."""
    if session_id and not (RunLayout(folder).journal_file).exists():
        journal = Journal(RunLayout(folder).journal_file, identity(experiment))
        journal.remember(ParticipantRecord(experiment.names[0], session_id, 0, finished=False))
        journal.close()


def _received(coordinators: Mapping[str, Coordinator]) -> Mapping[str, int]:
    return {name: coordinator.run_state.bytes_in for name, coordinator in coordinators.items()}


def _usage(coordinators: Mapping[str, Coordinator]) -> Mapping[str, Any]:
    gc.collect()
    return {
        "rss": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "fds": len(os.listdir("/proc/self/fd")),  # noqa: PTH208 - names alone, one of which is gone by then
        "threads": len(os.listdir("/proc/self/task")),  # noqa: PTH208
        "tasks": len(asyncio.all_tasks()),
        "sessions": {name: len(coordinator._rounds._sessions) for name, coordinator in coordinators.items()},
        "outboxes": {name: len(coordinator._outboxes) for name, coordinator in coordinators.items()},
    }


if __name__ == "__main__":
    main()
