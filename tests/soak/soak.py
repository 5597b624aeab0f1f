"""A long run under random faults, `make soak`: does it stay bounded, and end with the bits of an undisturbed one?

A server and its workers are real processes with a TCP proxy between them. Every few seconds one of them is killed, stopped
or asked to end, or the network is cut, silent, slow or damaging. Whatever ends is started again. The server is left
alive for the first half (of the time or of the rounds), so that its memory, descriptors and threads can be watched over a long life; in the second half
it is killed, stopped and ended like the others. Then the faults cease, the run comes to its end, and every student's
weights are compared, bit for bit, with those of the same experiment in one process without any fault.

Everything random follows from --seed, save when things happen: that is up to the machine.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from codistill.config.experiment import load
from codistill_deploy.console.progress import PlainProgress
from codistill_deploy.launch.in_process import run_in_process
from codistill_deploy.run_folder import RunFolder
from system.proxy import Proxy
from system.support import COMMAND, assert_bit_equal, rounds_trained, weights

_BATCH, _SAMPLES = 50, 300
_SAMPLE_SECONDS = 2.0
_WARM_UP_SECONDS = 30.0
_FINISH_SECONDS = 900.0
_console = Console(highlight=False, soft_wrap=True)


def _experiment(rounds: int) -> dict[str, Any]:
    epochs = max(1, rounds * _BATCH // _SAMPLES)
    return {
        "name": "soak",
        "data": {"dataset": "digits", "train_size": _SAMPLES, "test_size": 100, "augment": {"crop_padding": 1}},
        "training": {
            "epochs": epochs,
            "batch_size": _BATCH,
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "evaluate_every": max(1, epochs // 4),
            "checkpoint_every": 2,
        },
        "distillation": {"method": "kdcl", "ensemble": "min_logit"},
        "exchange": {"give_up_after": 300, "connect_timeout": 120},
        "students": [
            {"name": "mlp", "model": "mlp", "model_args": {"dropout": 0.2}},
            {"name": "cnn", "model": "cnn"},
            {"name": "vit", "model": "vit"},
        ],
    }


class RunProcess:
    """A process of the run, started again whenever it ends before its time."""

    def __init__(self, name: str, arguments: list[str], log: Path) -> None:
        self.name = name
        self.lives = 0
        self._arguments = arguments
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def done(self) -> bool:
        return self._process is not None and self._process.poll() == 0

    @property
    def pid(self) -> int | None:
        """Its process, None while there is none."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def keep_alive(self, *, ends: bool) -> None:
        if self.pid is not None or (ends and self.done):
            return
        self.lives += 1
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*COMMAND, *self._arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def tell(self, number: signal.Signals) -> bool:
        """Send a signal; return whether there was a process to send it to."""
        pid = self.pid
        if pid is None:
            return False
        os.kill(pid, number)
        return True

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True)
class Usage:
    """The resources of the server's process at one time."""

    pid: int
    at: float
    resident: int
    descriptors: int
    threads: int


@dataclass
class Tally:
    """The outcome of one kind of fault."""

    recoveries: list[float] = field(default_factory=list[float])


@dataclass
class Cluster:
    """The run under test."""

    folder: Path
    server: RunProcess
    workers: list[RunProcess]
    proxy: Proxy

    def keep_alive(self) -> None:
        self.server.keep_alive(ends=False)
        for worker in self.workers:
            worker.keep_alive(ends=True)

    @property
    def done(self) -> bool:
        return all(worker.done for worker in self.workers)

    def usage(self, now: float) -> Usage | None:
        pid = self.server.pid
        if pid is None:
            return None
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            return Usage(
                pid,
                now,
                pages * os.sysconf("SC_PAGE_SIZE"),
                len(list(Path(f"/proc/{pid}/fd").iterdir())),
                len(list(Path(f"/proc/{pid}/task").iterdir())),
            )
        except (OSError, IndexError):
            return None

    def wait(self, seconds: float, *, until: Callable[[], bool] = lambda: False) -> bool:
        """Keep everybody alive for so long, or until something is true; return whether it is."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.keep_alive()
            if until():
                return True
            time.sleep(0.02)
        return until()


def _stopped(cluster: Cluster, process: RunProcess, seconds: float) -> None:
    if process.tell(signal.SIGSTOP):
        cluster.wait(seconds)
        process.tell(signal.SIGCONT)


def _faults(cluster: Cluster, chance: random.Random) -> dict[str, Callable[[], None]]:
    """Return what can happen, by name; each returns when the fault itself is over."""
    proxy = cluster.proxy

    def worker() -> RunProcess:
        return chance.choice(cluster.workers)

    def slow() -> None:
        for link in (proxy.up, proxy.down):
            link.delay, link.rate, link.loss = 0.1, 1e6, 0.05
        cluster.wait(chance.uniform(1, 4))
        for link in (proxy.up, proxy.down):
            link.delay, link.rate, link.loss = 0.0, None, 0.0

    def silent() -> None:
        proxy.up.hold = proxy.down.hold = True
        cluster.wait(chance.uniform(0.5, 4))
        proxy.up.hold = proxy.down.hold = False

    def damaging() -> None:
        proxy.up.corrupt_every = proxy.down.corrupt_every = 50_000
        cluster.wait(chance.uniform(0.5, 2))
        proxy.up.corrupt_every = proxy.down.corrupt_every = None
        proxy.cut()  # the next bit to flip may be drawn already

    return {
        "worker killed (SIGKILL)": lambda: void(worker().tell(signal.SIGKILL)),
        "worker ended (SIGTERM)": lambda: void(worker().tell(signal.SIGTERM)),
        "worker stopped (SIGSTOP)": lambda: _stopped(cluster, worker(), chance.uniform(0.5, 4)),
        "network cut": lambda: void(proxy.cut(chance.choice(("reset", "end")))),
        "network silent": silent,
        "network slow and lossy": slow,
        "network damages bits": damaging,
        "server killed (SIGKILL)": lambda: void(cluster.server.tell(signal.SIGKILL)),
        "server ended (SIGTERM)": lambda: void(cluster.server.tell(signal.SIGTERM)),
        "server stopped (SIGSTOP)": lambda: _stopped(cluster, cluster.server, chance.uniform(0.5, 4)),
    }


def void(_: object) -> None:
    """Make nothing of a result."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(folder: Path, rounds: int, seed: int) -> Cluster:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "soak.yaml"
    path.write_text(yaml.safe_dump(_experiment(rounds), sort_keys=False), encoding="utf-8")
    run = folder / "run"
    upstream = f"127.0.0.1:{_free_port()}"
    proxy = Proxy(upstream, seed)
    serve = ["serve", str(path), "--run-dir", str(run), "--listen", upstream, "--stay"]
    workers = [
        RunProcess(
            name,
            ["work", str(path), "--run-dir", str(run), "--student", name, "--server", proxy.address],
            folder / f"{name}.log",
        )
        for name in load(path).names
    ]
    return Cluster(run, RunProcess("server", serve, folder / "server.log"), workers, proxy)


def _growth(samples: list[Usage]) -> list[tuple[str, float, float]]:
    """Return what the server took early and late in its longest life, as medians of a quarter of it each."""
    by_life: dict[int, list[Usage]] = {}
    for sample in samples:
        by_life.setdefault(sample.pid, []).append(sample)
    longest = max(by_life.values(), key=lambda life: life[-1].at - life[0].at)
    settled = [sample for sample in longest if sample.at - longest[0].at > _WARM_UP_SECONDS] or longest
    quarter = max(1, len(settled) // 4)
    early, late = settled[:quarter], settled[-quarter:]

    def median(of: list[Usage], name: str, unit: float = 1) -> float:
        return statistics.median(getattr(sample, name) / unit for sample in of)

    return [
        ("resident memory, MiB", median(early, "resident", 2**20), median(late, "resident", 2**20)),
        ("file descriptors", median(early, "descriptors"), median(late, "descriptors")),
        ("threads", median(early, "threads"), median(late, "threads")),
        ("watched for, minutes", 0.0, (longest[-1].at - longest[0].at) / 60),
    ]


def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="Minutes of faults.")] = 15.0,
    rounds: Annotated[int, typer.Option(min=6, help="Rounds of the run.")] = 12_000,
    interval: Annotated[float, typer.Option(min=0.1, help="Mean seconds between two faults.")] = 3.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the faults.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result to a file.")
    ] = None,
) -> None:
    """Run the soak and end with 1 if anything is not as it must be."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="codistill-soak-") as folder:
        cluster = _start(Path(folder), rounds, seed)
        try:
            result = _soak(cluster, Path(folder), chance, 60 * minutes, interval, rounds)
        finally:
            for process in (*cluster.workers, cluster.server):
                process.end()
            cluster.proxy.close()
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    raise typer.Exit(0 if result["bit_equal"] and result["flat"] else 1)


def _soak(
    cluster: Cluster, folder: Path, chance: random.Random, seconds: float, interval: float, rounds: int
) -> dict[str, Any]:
    def trained() -> int:
        return rounds_trained(cluster.folder)

    started = time.monotonic()
    assert cluster.wait(180, until=lambda: trained() > 0), f"no round closed; see the logs in {folder}"
    calm_from, calm = time.monotonic(), trained()
    cluster.wait(5)
    round_seconds = 5 / max(1, trained() - calm)
    _console.print(f"undisturbed: {1 / round_seconds:.0f} rounds/s")

    faults = _faults(cluster, chance)
    tallies = {name: Tally() for name in faults}
    samples: list[Usage] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_SAMPLE_SECONDS):
            usage = cluster.usage(time.monotonic())
            if usage is not None:
                samples.append(usage)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    told = time.monotonic()
    while time.monotonic() - calm_from < seconds and not cluster.done:
        cluster.wait(chance.expovariate(1 / interval))
        spared = max((time.monotonic() - calm_from) / seconds, trained() / rounds) < 0.5
        name = chance.choice([name for name in faults if not (spared and name.startswith("server"))])
        before, at = trained(), time.monotonic()
        faults[name]()
        if not cluster.wait(240, until=lambda before=before: trained() > before + 1 or cluster.done):
            raise AssertionError(f"no round closed within 240 s of '{name}'; see the logs in {folder}")
        tallies[name].recoveries.append(time.monotonic() - at)
        if time.monotonic() - told > 10:
            told = time.monotonic()
            count = sum(len(tally.recoveries) for tally in tallies.values())
            left = max(0.0, seconds - (told - calm_from))
            _console.print(f"{count} faults, round {trained()}, {left:.0f} s of faults left")
    _console.print("no more faults; the run goes on to its end")
    finished = cluster.wait(_FINISH_SECONDS, until=lambda: cluster.done)
    over.set()
    watcher.join()
    assert finished, f"the run did not end within {_FINISH_SECONDS:.0f} s; see the logs in {folder}"
    took = time.monotonic() - started

    reference = RunFolder(folder / "undisturbed")
    experiment = load(folder / "soak.yaml")
    reference.start(experiment, mode="in-process", resume=False)
    run_in_process(experiment, reference, PlainProgress(Console(quiet=True)), threading.Event())
    try:
        assert_bit_equal(weights(cluster.folder), weights(reference.path))
        equal = True
    except AssertionError as error:
        _console.print(f"NOT EQUAL: {error}")
        equal = False
    growth = _growth(samples)
    flat = all(late <= 1.2 * early + 8 for what, early, late in growth if "minutes" not in what)
    _show(tallies, growth, round_seconds, trained(), took, cluster, equal=equal, flat=flat)
    return {
        "faults": {name: len(tally.recoveries) for name, tally in tallies.items()},
        "recovery_rounds": {
            name: statistics.median(tally.recoveries) / round_seconds
            for name, tally in tallies.items()
            if tally.recoveries
        },
        "growth": growth,
        "rounds": trained(),
        "seconds": took,
        "bit_equal": equal,
        "flat": flat,
    }


def _show(
    tallies: dict[str, Tally],
    growth: list[tuple[str, float, float]],
    round_seconds: float,
    rounds: int,
    took: float,
    cluster: Cluster,
    *,
    equal: bool,
    flat: bool,
) -> None:
    _console.print("\n| fault | times | median recovery, rounds | longest, rounds |\n|---|---|---|---|")
    for name, tally in tallies.items():
        times = [seconds / round_seconds for seconds in tally.recoveries] or [0.0]
        _console.print(f"| {name} | {len(tally.recoveries)} | {statistics.median(times):.0f} | {max(times):.0f} |")
    _console.print("\n| server | early | late |\n|---|---|---|")
    for what, early, late in growth:
        _console.print(f"| {what} | {early:.1f} | {late:.1f} |")
    faults = sum(len(tally.recoveries) for tally in tallies.values())
    lives = ", ".join(f"{process.name} {process.lives}" for process in (cluster.server, *cluster.workers))
    _console.print(
        f"\n{faults} faults in {took / 60:.1f} min; {rounds} rounds closed; lives: {lives}; "
        f"{cluster.proxy.cuts} connections cut, "
        f"{cluster.proxy.up.damaged + cluster.proxy.down.damaged} bits flipped; "
        f"weights {'bit-equal to' if equal else 'DIFFERENT FROM'} the undisturbed run's; "
        f"the server's use of memory, descriptors and threads {'is flat' if flat else 'GROWS'}"
    )


if __name__ == "__main__":
    typer.run(main)
